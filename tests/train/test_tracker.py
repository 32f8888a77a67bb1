"""The metrics file survives kills and resumes; the console and TensorBoard get the same records."""

import io
import json
import math
import struct
import sys

import jax.numpy as jnp
import pytest
from rich.console import Console

from train.tracker import ConsoleTracker, JsonlTracker, TensorBoardTracker, Trackers, read_metrics


def test_one_object_a_line_and_flushed_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(path, {"stage": "warmup"})
    tracker.log("train", 1, {"loss": jnp.float32(0.5), "kl_layers": jnp.array([1.0, 2.0])})
    # Nothing was closed: a kill now must find the line on disk.
    assert json.loads(path.read_text()) == {
        "kind": "train",
        "step": 1,
        "stage": "warmup",
        "loss": 0.5,
        "kl_layers": [1.0, 2.0],
    }


def test_non_finite_numbers_stay_json(tmp_path):
    path = tmp_path / "m.jsonl"
    JsonlTracker(path).log("train", 1, {"a": math.nan, "b": -math.inf, "c": jnp.array([jnp.inf])})
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (record["a"], record["b"], record["c"]) == ("nan", "-inf", ["inf"])


def test_a_torn_line_costs_itself_only(tmp_path):
    path = tmp_path / "m.jsonl"
    first = JsonlTracker(path, {"stage": "sparse"})
    for step in (1, 2, 3):
        first.log("train", step, {"loss": step})
    first.close()
    path.write_bytes(path.read_bytes()[:-7])  # killed while writing step 3
    torn = path.read_bytes()
    second = JsonlTracker(path, {"stage": "sparse"})
    second.log("resume", 1, {})
    for step in (2, 3):  # the checkpoint was of step 1: step 2 runs again
        second.log("train", step, {"loss": 10 * step})
    second.close()
    assert path.read_bytes().startswith(torn)
    records = read_metrics(path, "train")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1), (2, 20), (3, 30)]
    assert len(read_metrics(path)) == 4


def test_stages_in_one_file_keep_their_own_steps(tmp_path):
    path = tmp_path / "m.jsonl"
    for stage in ("dense", "warmup"):
        JsonlTracker(path, {"stage": stage}).log("train", 1, {})
    assert [r["stage"] for r in read_metrics(path, "train")] == ["dense", "warmup"]


def test_console_writes_lines_where_there_is_no_terminal():
    out = io.StringIO()
    tracker = Trackers([ConsoleTracker(Console(file=out, width=200), "warmup", total=4)])
    for step in range(1, 5):
        tracker.log("train", step, {"loss": 1 / step, "kl_layers": [1.0]})
    tracker.log("eval", 4, {"recall": 0.5, "overlap": [0.1, 0.2]})
    tracker.close()
    text = out.getvalue()
    assert "warmup 4/4  loss 0.25" in text
    assert "warmup step 4 eval: recall 0.5" in text
    assert "overlap" not in text


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'dsa-jax\[tensorboard\]'"):
        TensorBoardTracker(tmp_path)


def events(folder):
    """The records of the event files: length, checksum, an event, checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports]

    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    tracker = TensorBoardTracker(tmp_path)
    for step in (1, 2, 3):
        tracker.log("train", step, {"loss": 1 / step, "kl_layers": [1.0, 2.0], "note": "text"})
    tracker.close()
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert (2, "train/loss", 0.5) in scalars
    assert (3, "train/kl_layers/01", 2.0) in scalars
    assert len(scalars) == 9  # texts are left out

    # A run that was killed after step 3 and goes on from step 1: what it wrote later is hidden,
    # and nothing is lost though both began within a second.
    tracker = TensorBoardTracker(tmp_path, start=1)
    tracker.log("train", 2, {"loss": 0.25})
    tracker.close()
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert starts == [1, 2]
    written = [v.tag for e in events(tmp_path) for v in e.summary.value]
    assert len(written) == 9 + 1
