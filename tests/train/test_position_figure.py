"""Cost against position: what is drawn is what was measured, and the report's lines are scaled."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import position_figure as figure
from benchmarks import positions
from benchmarks.positions import MODES, POSITIONS, calls
from pallas_kernels import Selection
from train.cost import LayerShape


@pytest.fixture
def results():
    rows = [
        {"op": "position", "kind": f"{mode} {part}", "keys": t, "us_per_token": us * t / 1024}
        for mode in ("prefill", "decode")
        for part, us in (("dense", 0.1), ("indexer", 0.01), ("sparse", 0.004))
        for t in POSITIONS
    ]
    environment = {"gpu": "a GPU", "jax": "0", "date": "today"}
    return {"runs": [{"environment": environment}], "rows": rows}


def test_every_part_is_timed_at_its_position():
    found = {(c.mode, c.part): c for mode in MODES for c in calls(mode, 8192, 131_072)}
    assert len(found) == 6
    assert {c.tokens for c in found.values()} == {4096, 64}
    for call in found.values():
        _, keys, *_ = arguments = jax.eval_shape(call.make)
        if arguments[-1].__class__ is Selection:
            assert keys.shape[1] == 131_072
        else:
            assert keys.shape[1] == 8192


def test_selections_are_of_the_filled_part(monkeypatch):
    monkeypatch.setattr(positions, "QUERIES", 8)
    monkeypatch.setattr(positions, "SEQUENCES", 2)
    monkeypatch.setattr(positions, "SHAPE", LayerShape(heads=1, latent=4, rotary=4, topk=16))
    found = {(c.mode, c.part): c for mode in MODES for c in calls(mode, 64, 128)}
    for mode in MODES:
        indices = found[mode, "sparse"].make()[2].indices
        assert (jnp.diff(indices) > 0).all()
        assert indices.min() >= 0
        assert 40 < indices.max() < 64
    every = found["decode", "dense"].make()[2].indices
    assert (every == jnp.where(jnp.arange(128) < 64, jnp.arange(128), -1)).all()


def test_operations_are_those_of_the_visible_keys():
    found = {(c.mode, c.part): c for mode in MODES for c in calls(mode, 8192, 131_072)}
    pairs = sum(range(8192 - 4096 + 1, 8192 + 1))
    assert positions.flop(found["prefill", "dense"]) == 2 * 128 * 320 * pairs
    assert positions.flop(found["prefill", "indexer"]) == 2 * 64 * 128 * pairs
    assert positions.flop(found["decode", "sparse"]) == 2 * 128 * 1088 * 2048 * 64
    assert positions.flop(found["decode", "dense"]) == 2 * 128 * 1088 * 8192 * 64


def test_sparse_is_indexer_and_attention(results):
    assert figure.sparse(results, "decode")[131_072] == pytest.approx(0.014 * 128)


def test_the_dense_lines_agree_at_the_last_position(results):
    for mode in ("prefill", "decode"):
        last = figure.REPORT[mode]["dense"][-1][1]
        assert figure.factor(results, mode) * last == pytest.approx(0.1 * 128)


def test_the_report_slopes():
    """Dollars per million tokens and 1K positions, as its text on Figure 3 can be read."""
    (low, a), (high, b) = figure.REPORT["prefill"]["dense"]
    assert 1024 * (b - a) / (high - low) == pytest.approx(0.00479, rel=0.01)
    (low, a), (high, b) = figure.REPORT["decode"]["sparse"][1:]
    assert 1024 * (b - a) / (high - low) == pytest.approx(0.00082, rel=0.02)


def test_it_is_drawn(results, tmp_path, monkeypatch):
    source, target = tmp_path / "r.json", tmp_path / "f.png"
    source.write_text(json.dumps(results))
    monkeypatch.setattr("sys.argv", ["figure", str(target), str(source)])
    figure.main()
    assert target.stat().st_size > 10_000
