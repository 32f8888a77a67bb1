"""The benchmark of two GPUs, on two CPU devices, and its processes."""

import json
import queue
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import ragged, two_gpus
from benchmarks.mesh_case import run
from benchmarks.two_gpus import (
    OVERLAP,
    OVERLAP_ELSEWHERE,
    PARTS,
    ROWS,
    Case,
    Report,
    Worker,
    cases,
    compare,
    next_ready,
    report_needs,
)

ANSWERS = """
print('{"ready": 0.5}', flush=True)
assert input() == "go"
print("not JSON")
print('{"row": {"losses": [3.0, 2.0], "step_ms": 4.0}}', flush=True)
"""
NEEDS = """
import json, sys
case = json.loads(sys.argv[1])
assert sys.argv[2] == "--needs"
print(json.dumps({"stage": case["stage"], "mesh": case["mesh"]}))
"""
HANGS = """
import faulthandler, signal, time
faulthandler.register(signal.SIGUSR1)
print('{"ready": 0.5}', flush=True)
time.sleep(60)
"""


def worker(tmp_path, program):
    return Worker(Case("tiny", "warmup", "one"), tmp_path / "log", (sys.executable, "-c", program))


def test_a_case_has_its_turn(tmp_path):
    case = worker(tmp_path, ANSWERS)
    assert case.hear(20) == {"ready": 0.5}
    row = case.turn(20)
    case.end()
    assert row == {"losses": [3.0, 2.0], "step_ms": 4.0}
    beside = compare(row, {"losses": [3.0, 2.5], "step_ms": 6.0})
    assert beside["loss_differences"] == [0, pytest.approx(0.2)]
    assert beside["scaling_efficiency"] == 0.75
    # Two meshes of two GPUs have nothing to scale against.
    beside = compare(row, {"losses": [3.0, 2.5], "step_ms": 6.0}, "fsdp 2")
    assert beside["loss_differences_from"] == "fsdp 2"
    assert "scaling_efficiency" not in beside


def test_a_case_that_hangs_says_where(tmp_path):
    case = worker(tmp_path, HANGS)
    assert case.hear(20) == {"ready": 0.5}
    failed = case.turn(0.5)["failed"]
    assert "silent for 0 s" in failed
    assert "in <module>" in failed
    case.end()
    assert case.process.returncode is not None


def test_who_is_ready_first_goes_first():
    slow, quick, late = (SimpleNamespace(said=queue.Queue()) for _ in range(3))
    quick.said.put({"ready": 1.0})
    waiting: Any = [slow, quick, late]
    assert next_ready(waiting, time.perf_counter() + 5) is quick
    slow.said.put({"ready": 2.0})
    assert next_ready(waiting, time.perf_counter() + 5) is slow
    # Nobody is, and there is no more time: the first one is asked what keeps it.
    assert next_ready(waiting[2:], time.perf_counter()) is late


def test_a_case_that_fails_says_why(tmp_path):
    failed = worker(tmp_path, "raise SystemExit('no GPU')").hear(20)["row"]["failed"]
    assert "ended with status 1: no GPU" in failed


def test_every_case_is_there_once_and_one_gpu_comes_first():
    todo = cases(PARTS, ("sparse", "warmup"), ("fsdp 2", "context 2"), tiny=False, steps=4)
    names = [case.name for case in todo]
    overlap = len(OVERLAP) + len(OVERLAP_ELSEWHERE)
    assert len(set(names)) == len(names) == 6 + 6 + 1 + 4 + overlap + len(ROWS)
    assert names.index("small warmup one") < names.index("small warmup context 2")
    # Each set of options differs from that of the scheduler alone by what it is named for.
    options = [tuple(case.options.items()) for case in todo if case.label and "fsdp" in case.mesh]
    assert len(set(options)) == len(OVERLAP)


def test_large_models_need_two_gpus(tmp_path, monkeypatch):
    """What is compiled and said; the sizes themselves only a compiler for GPUs can check."""
    monkeypatch.setattr(two_gpus, "PROGRAM", (sys.executable, "-c", NEEDS))
    report = Report(tmp_path / "needs.json", {})
    report_needs(("sparse", "warmup"), ("fsdp 2",), False, report)
    rows = json.loads((tmp_path / "needs.json").read_text())["cases"]
    assert list(rows) == [
        "large sparse one",
        "large sparse fsdp 2",
        "large warmup one",
        "large warmup fsdp 2",
    ]
    assert rows["large warmup fsdp 2"] == {"stage": "warmup", "mesh": "fsdp 2"}


def test_what_is_saved_on_two_devices_goes_on_on_one():
    row = run(Case("tiny", "warmup", "resumed"))
    assert row["bit_equal"]
    # bf16 products of halves of a batch; a state that was not restored starts from another KL.
    assert row["relative_difference"] < 1e-4, row


def test_ragged_exchanges_are_watched(tmp_path):
    """On CPUs both ways are the padded one: that it runs, compares, and says where it stopped."""
    kinds = ("rows", "numbers", "none")
    given = {"rows": 64, "width": 8, "kinds": kinds, "timed": False, "tiny": True}
    row = ragged.watch("as it is", given, 100, tmp_path)
    assert row == {
        "difference": {"rows": 0, "numbers": 0},
        "stopped_at": "compiling none",
        "why": "status 1: KeyError: 'none'",
    }


def test_exchanges_tell_rows_apart():
    """Runs of unlike lengths that lie close on the other side, and no row twice."""
    _, (x, first, send, there, receive) = ragged._exchanges(64, 8)["numbers"]
    send, there = send.reshape(2, 2), there.reshape(2, 2)
    assert send[0, 0] != send[0, 1]
    assert send[0, 1] != send[1, 0]
    np.testing.assert_array_equal(receive.reshape(2, 2), send.T)
    np.testing.assert_array_equal(there[1], there[0] + send[0])
    assert (first.reshape(2, 2)[:, 1] == send[:, 0]).all()
    assert len(np.unique(x)) == len(x)
