"""What of the benchmarks can be seen without a GPU."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import ops, sparse_attention, timing

RESULTS = Path(timing.__file__).parent / "results"


@pytest.mark.parametrize("name", ops.OPS)
def test_ops_exist(name):
    assert callable(ops.function(name))


@pytest.mark.parametrize("kind", ["causal", "packed"])
def test_training_selections(kind):
    """Keys up to the query, all of them or K; where documents are packed, of its own alone."""
    rows = sparse_attention.training_selections(kind, 2600)
    assert rows.shape == (1, 2600, 2048)
    for t in (0, 1023, 1024, 2047, 2599):
        first = t // 1024 * 1024 if kind == "packed" else 0
        picked = rows[0, t, : min(t + 1 - first, 2048)]
        assert picked.min() >= first
        assert picked.max() <= t
        assert (jnp.diff(picked) > 0).all()
        assert (rows[0, t, len(picked) :] == -1).all()


def test_the_flush_is_not_counted(monkeypatch):
    """Wherever it is reported; a call whose kernels cannot be told from it is refused."""
    call = [("loop_add_fusion", 0.01), ("scores", 2.0), ("topk", 1.0), ("topk", 1.0)]

    def seen(fn, *args, repeats=2):
        flush = [("wrapped_popcnt", 9.0)]
        if args[0] is fn_buffer:
            return [flush] * repeats
        return [call + flush, [call[0], *flush, *call[1:]]]

    fn_buffer = jnp.zeros(1)
    monkeypatch.setattr(timing, "_kernels", seen)
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 4)
    monkeypatch.setattr(jnp, "zeros", lambda *_: fn_buffer)
    found = timing.device_time(lambda x: x, jnp.ones(3))
    assert found.median_ms == pytest.approx(4.01)
    assert found.kernels == {"loop_add_fusion": 0.01, "scores": 2.0, "topk": 2.0}
    call.append(("wrapped_popcnt", 0.1))
    with pytest.raises(RuntimeError, match="wrapped_popcnt"):
        timing.device_time(lambda x: x, jnp.ones(3))


def test_a_call_ends_with_the_flush(monkeypatch):
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 4)
    monkeypatch.setattr(timing, "_REST_SECONDS", 0)
    order = []
    cold = timing._Cold(jax.jit(lambda x: x))
    cold.fn, cold.flush = (lambda *_, name=name: order.append(name) for name in ("call", "flush"))
    cold(jnp.ones(2))
    assert order == ["call", "flush"]


def test_results_are_kept_beside_each_other(tmp_path):
    """A figure that is measured again replaces the old one; the others stay, with their run."""
    path = tmp_path / "results.json"
    for run, ms in enumerate([3.0, 2.0]):
        results = ops.Results(path)
        results.runs.append({"number": run})
        results.add({"op": "topk", "keys": 8, "ms": ms})
        results.add({"op": "topk", "keys": 16 + run, "ms": ms})
    found = json.loads(path.read_text())
    assert found["runs"] == [{"number": 0}, {"number": 1}]
    assert [(row["run"], row["keys"], row["ms"]) for row in found["rows"]] == [
        (0, 16, 3.0), (1, 8, 2.0), (1, 17, 2.0),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("indexer_*.json")), ids=lambda p: p.stem)
def test_figure(path, tmp_path, monkeypatch):
    """It is drawn from the results in the repository."""
    pytest.importorskip("matplotlib")  # which the environments that only compile kernels lack
    from benchmarks import figure

    results = json.loads(path.read_text())
    assert [keys for keys, _ in figure.points(results, "lightning_indexer")] == [
        keys for keys, _ in figure.ceiling(results)
    ]
    monkeypatch.setattr("sys.argv", ["figure", str(path), str(tmp_path / "figure.png")])
    figure.main()
    assert (tmp_path / "figure.png").stat().st_size > 10_000
