"""SIGKILL at any moment: the next call goes on and ends bit-equal to a run left alone."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import token_file

from train.tracker import read_metrics

SCRIPT = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from train.config import CheckpointConfig
from train.loop import train
from train.stages import Stage
import small_runs, numpy, dataclasses
run = small_runs.run_config(
    Stage.SPARSE, Path(sys.argv[1]), Path(sys.argv[2]), steps=30, batch_size=4,
    checkpoint=CheckpointConfig(interval=1, keep=2), micro_batches=2,
)
result = train(run, console=small_runs.quiet())
from test_loop import arrays
numpy.savez(run.output / "final.npz", **arrays(result.model))
"""


def start(folder: Path, tokens: Path, cache: Path) -> subprocess.Popen:
    here = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": f"{here.parents[1]}:{here}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tokens), str(cache)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE)


def steps_done(folder: Path) -> int:
    path = folder / "sparse" / "metrics.jsonl"
    records = read_metrics(path, "train") if path.exists() else []
    return max((r["step"] for r in records), default=0)


@pytest.mark.slow
def test_killed_runs_end_bit_equal(tmp_path):
    tokens, cache = token_file(tmp_path), tmp_path / "cache"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(whole, tokens, cache)
    assert process.wait(timeout=300) == 0, process.stderr.read().decode()

    rng = random.Random(0)
    resumed_from = []
    for goal in (4, 14):
        process = start(cut, tokens, cache)
        while steps_done(cut) < goal and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.wait()
        assert process.returncode == -9, process.stderr.read().decode()
    process = start(cut, tokens, cache)
    assert process.wait(timeout=300) == 0, process.stderr.read().decode()

    one, other = (np.load(f / "sparse" / "final.npz") for f in (whole, cut))
    assert set(one.files) == set(other.files)
    for path in one.files:
        assert one[path].tobytes() == other[path].tobytes(), path
    lines = (cut / "sparse" / "metrics.jsonl").read_text().splitlines()
    starts = [r for r in map(json.loads, lines) if r["kind"] == "start"]
    resumed_from = [r["step"] for r in starts]
    assert len(starts) == 3
    assert resumed_from[0] == 0
    assert 0 < resumed_from[1] < resumed_from[2] < 30
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(f / "sparse" / "metrics.jsonl", "train")]
        for f in (whole, cut)
    ]
    assert losses[0] == losses[1]
    assert [s for s, _ in losses[1]] == list(range(1, 31))
