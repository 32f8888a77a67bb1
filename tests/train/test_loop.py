"""Whole runs: stage changes, resumes, and what goes wrong on the way."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from small_runs import MODEL, quiet, run_config, token_file

from dsa_jax import checkpoint as model_files
from dsa_jax import presets
from dsa_jax.checkpoint import CheckpointError
from dsa_jax.sharding import MeshConfig, make_mesh
from train.checkpoints import Checkpoints, SaveError
from train.config import BranchConfig, CheckpointConfig, OptimizerConfig
from train.diagnose import NonFiniteError
from train.lock import Lock
from train.loop import train
from train.optimizer import make_optimizer
from train.stages import Group, Stage, group_of
from train.start import plan, start
from train.state import Skeleton, new_state
from train.tracker import read_metrics


def arrays(model) -> dict[str, np.ndarray]:
    return jax.device_get(Skeleton(model).params(model))


def assert_bit_equal(one, other):
    assert set(one) == set(other)
    for path, leaf in one.items():
        assert leaf.tobytes() == other[path].tobytes(), path


def without_times(path):
    timed = ("seconds", "data_seconds", "checkpoint_seconds", "tokens_per_second")
    timed += ("tflops_per_device",)
    records = read_metrics(path, "train")
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tokens(folder):
    return token_file(folder)


@pytest.fixture(scope="module")
def dense(folder, tokens):
    run = run_config(Stage.DENSE, folder, tokens, model=MODEL.without_indexer())
    return train(run, console=quiet())


@pytest.fixture(scope="module")
def warm_config(folder, tokens, dense):
    return run_config(Stage.WARMUP, folder, tokens, init_from=dense.config.output)


@pytest.fixture(scope="module")
def warmup(warm_config):
    return train(warm_config, console=quiet())


@pytest.fixture(scope="module")
def sparse(folder, tokens, warmup):
    # On four devices, from a run on one: parameters do not care where they were.
    run = run_config(
        Stage.SPARSE,
        folder,
        tokens,
        init_from=warmup.checkpoint_dir / "4",
        mesh=MeshConfig(data=2, fsdp=2),
    )
    seen = []

    def evaluate(model, step):
        seen.append(step)
        return {"heads": model.config.index_n_heads}

    return train(run, console=quiet(), evaluate=evaluate, evaluate_every=2), seen


def test_stages_hand_over_parameters_and_position(dense, warmup, sparse, folder):
    before, after = arrays(dense.model), arrays(warmup.model)
    indexers = {p for p in after if group_of(p) is Group.INDEXER}
    assert indexers == set(after) - set(before)
    assert_bit_equal(before, {p: after[p] for p in before})
    moved = arrays(sparse[0].model)
    for path in after:
        assert not np.array_equal(after[path], moved[path]), path
    for number, result in enumerate((dense, warmup, sparse[0]), 1):
        run = json.loads((result.checkpoint_dir / "4" / "run" / "metadata").read_text())
        assert run["position"]["row"] == 16 * number  # 4 steps of 4 rows a stage
    rngs = {Checkpoints(r.checkpoint_dir, MODEL).record(4).rng for r in (dense, warmup, sparse[0])}
    assert len(rngs) == 1
    first = read_metrics(warmup.metrics_path, "start")[0]
    assert "with new indexers" in first["origin"]
    assert first["trainable"] + first["frozen"] == first["parameters"]


def test_metrics_of_each_stage(dense, warmup, sparse):
    assert [r["step"] for r in read_metrics(sparse[0].metrics_path, "train")] == [1, 2, 3, 4]
    shown = {k for result in (dense, warmup, sparse[0]) for k in result.metrics}
    assert {"lm_loss", "kl", "expert_load_max", "correction_bias_max"} < shown
    assert "kl" not in dense.metrics
    assert "lm_loss" not in warmup.metrics
    assert {"gradient_norm_main", "gradient_norm_indexer"} < set(sparse[0].metrics)
    assert len(warmup.metrics["kl_layers"]) == 2
    # The biases move in the dense and the sparse stage and stand still in between.
    biases = [r.metrics["correction_bias_max"] for r in (dense, warmup, sparse[0])]
    assert biases[0] == biases[1] == pytest.approx(0.004, rel=0.51)
    assert sparse[1] == [2, 4]
    evals = read_metrics(sparse[0].metrics_path, "eval")
    assert [(r["step"], r["heads"]) for r in evals] == [(2, 6), (4, 6)]


def test_exported_model_is_the_trained_one(warmup):
    assert not warmup.interrupted
    loaded = model_files.load(warmup.model_dir)
    assert loaded.config == MODEL
    assert_bit_equal(arrays(loaded), arrays(warmup.model))


def test_checkpoints_are_kept_as_asked(warmup):
    steps = sorted(p.name for p in warmup.checkpoint_dir.iterdir())
    assert steps == ["2", "4"]


def test_finished_run_is_not_run_again(warm_config, warmup):
    again = train(warm_config, console=quiet())
    assert (again.step, again.metrics) == (4, {})
    assert_bit_equal(arrays(again.model), arrays(warmup.model))


def test_sigterm_saves_and_the_resume_is_bit_equal(warm_config, warmup, tmp_path):
    run = dataclasses.replace(warm_config, output=tmp_path / "run")

    def terminate(model, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    first = train(run, console=quiet(), evaluate=terminate, evaluate_every=1)
    assert first.interrupted
    assert first.model_dir is None
    assert first.step == 2  # the step after the signal is the last; an odd one would be saved too
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    second = train(run, console=quiet())
    assert (second.interrupted, second.step) == (False, 4)
    assert_bit_equal(arrays(second.model), arrays(warmup.model))
    assert without_times(second.metrics_path) == without_times(warmup.metrics_path)


def test_another_config_is_refused_by_field(warm_config, warmup):
    other = dataclasses.replace(warm_config, seed=5, model=MODEL.replace(index_topk=4))
    with pytest.raises(ValueError, match=r"another config") as error:
        train(other, console=quiet())
    lines = str(error.value).splitlines()[1:3]
    assert lines == ["  model.index_topk: 8 -> 4", "  seed: 0 -> 5"]


def test_changed_data_is_refused(warm_config, warmup, tmp_path):
    tokens = np.load(warm_config.data.sources[0])
    np.save(tmp_path / "tokens.npy", tokens[:-1])
    run = dataclasses.replace(
        warm_config,
        output=tmp_path / "run",
        data=dataclasses.replace(warm_config.data, sources=(str(tmp_path / "tokens.npy"),)),
    )
    message = r"tokens\.npy \(6128 bytes before, 6126 now\) changed since the checkpoint"
    with pytest.raises(ValueError, match=message):
        train(run, console=quiet())
    tokens[7] += 1
    np.save(tmp_path / "tokens.npy", tokens)
    with pytest.raises(ValueError, match=r"tokens\.npy \(same size, other content\)"):
        train(run, console=quiet())


def test_a_second_run_in_the_same_folder_is_refused(warm_config):
    with (
        Lock(warm_config.output),
        pytest.raises(ValueError, match=r"another run is at work there"),
    ):
        train(warm_config, console=quiet())


WRONG_STARTS = {
    "no such folder": ({"init_from": "nowhere"}, FileNotFoundError, "does not exist"),
    "sparse from dense": ({"stage": Stage.SPARSE}, ValueError, "run a warm-up stage on it first"),
    "other width": (
        {"model": MODEL.replace(kv_lora_rank=24)},
        ValueError,
        r"kv_a_layernorm/weight is \[32\], the model needs \[24\]",
    ),
    "missing layer": (
        {"model": MODEL.replace(num_hidden_layers=3)},
        ValueError,
        r"missing layers/2/",
    ),
    "left over": (
        {"model": presets.get("tiny").replace(num_hidden_layers=2)},
        ValueError,
        r"not in the model: layers/0/mlp/experts",
    ),
}


@pytest.mark.parametrize("case", WRONG_STARTS)
def test_starts_that_do_not_fit_are_refused(warm_config, tmp_path, case):
    fields, kind, message = WRONG_STARTS[case]
    if "init_from" in fields:
        fields = {"init_from": tmp_path / fields["init_from"]}
    run = dataclasses.replace(warm_config, output=tmp_path / "run", **fields)
    run = dataclasses.replace(run, bias_update_speed=None)
    with pytest.raises(kind, match=message):
        train(run, console=quiet())


def test_starting_from_an_exported_model(warm_config, warmup, tmp_path):
    """Its parameters, bit for bit; it has no data position."""
    run = dataclasses.replace(
        warm_config, output=tmp_path, init_from=warmup.model_dir, mesh=MeshConfig(fsdp=2)
    )
    mesh = make_mesh(run.mesh)
    begun = start(plan(run, mesh))
    assert begun.position is None
    assert_bit_equal(jax.device_get(begun.state.params), arrays(warmup.model))
    assert int(begun.state.step) == 0
    assert len(begun.state.params["lm_head/weight"].sharding.device_set) == 2


def test_nan_stops_with_step_layer_and_last_good_checkpoint(warm_config, tmp_path):
    """A rate of 1e30 makes step 1 leave monsters; step 2 meets them."""
    run = dataclasses.replace(
        warm_config,
        output=tmp_path / "run",
        optimizer=OptimizerConfig(
            indexer=BranchConfig(learning_rate=1e30), warmup_fraction=0.0, schedule="constant"
        ),
        checkpoint=CheckpointConfig(interval=1),
    )
    good = re.escape(str(tmp_path / "run" / "checkpoints" / "1"))
    with pytest.raises(NonFiniteError, match=rf"step 2: .*indexer.*in layer 0.*{good}"):
        train(run, console=quiet())
    kinds = [r["kind"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert kinds == ["start", "train", "train", "non_finite"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


def test_disk_that_fills_up_while_saving(warm_config, warmup, tmp_path):
    """Writes beyond 8 kB fail from step 3 on; step 2 stays and is resumed, bit for bit."""
    run = dataclasses.replace(warm_config, output=tmp_path / "run")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(model, step):
        if step == 3:
            while not (tmp_path / "run" / "checkpoints" / "2").exists():
                time.sleep(0.01)
            size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8192, old[1]))
        return {}

    try:
        with pytest.raises(SaveError, match=r"step 2 is whole in .*make room") as error:
            train(run, console=quiet(), evaluate=fill, evaluate_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "File too large" in str(error.value)
    # What a writer that was still at work left behind has another name, and goes at the next start.
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir() if p.name.isdigit()] == ["2"]
    result = train(run, console=quiet())
    assert_bit_equal(arrays(result.model), arrays(warmup.model))
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]


def test_a_save_that_failed_is_reported_before_the_next_begins(warmup, tmp_path, monkeypatch):
    """... with what is whole on disk, and once: closing does not repeat it in Orbax's words."""
    checkpoints = Checkpoints(tmp_path, MODEL, keep=2)
    (tmp_path / "2").mkdir()
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()

    def fails():
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints.manager, "wait_until_finished", fails)
    monkeypatch.setattr(checkpoints.manager, "close", fails)
    with pytest.raises(OSError, match="No space"):  # nothing was said yet
        checkpoints.close()
    with pytest.raises(SaveError, match=r"No space left on device.*step 2 is whole"):
        checkpoints.save(6, None, None)
    checkpoints.close()


def test_too_little_room_is_seen_before_writing(warmup, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    record = Checkpoints(warmup.checkpoint_dir, MODEL).record(4)
    params = Skeleton(warmup.model).params(warmup.model)
    state = new_state(warmup.config, params, make_optimizer(warmup.config))
    checkpoints = Checkpoints(tmp_path, MODEL, keep=1)
    with pytest.raises(SaveError, match=r"step 2 needs 0\.\d MB, .*0\.0 MB free.*none is whole"):
        checkpoints.save(2, state, record)
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoint_names_the_way_out(warm_config, warmup, tmp_path):
    shutil.copytree(warm_config.output, tmp_path / "run")
    run = dataclasses.replace(warm_config, output=tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "4"
    for file in (newest / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoints/4.* to go on from step 2"):
        train(run, console=quiet())
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "run" / "model")
    result = train(run, console=quiet())
    assert_bit_equal(arrays(result.model), arrays(warmup.model))
