"""Cost against position: what is drawn is what was measured, and the report's lines are scaled."""

import json

import pytest

from benchmarks import position_figure as figure
from benchmarks.positions import POSITIONS, calls


@pytest.fixture
def results():
    rows = [
        {"kind": f"{mode} {part}", "keys": t, "us_per_token": us * t / 1024}
        for mode in ("prefill", "decode")
        for part, us in (("dense", 0.1), ("indexer", 0.01), ("sparse", 0.004))
        for t in POSITIONS
    ]
    environment = {"gpu": "a GPU", "jax": "0", "date": "today"}
    return {"runs": [{"environment": environment}], "rows": rows}


def test_every_part_is_timed_at_its_position():
    found = {(c.mode, c.part): c for c in calls(8192)}
    assert len(found) == 6
    assert {c.tokens for c in found.values()} == {4096, 16}


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
    monkeypatch.setattr("sys.argv", ["figure", str(source), str(target)])
    figure.main()
    assert target.stat().st_size > 10_000
