"""Times the lightning indexer: `python -m benchmarks.indexer scores fused --check --json`."""

from __future__ import annotations

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import device_time, environment, matmul_rates
from pallas_kernels import KeyRange
from pallas_kernels.lightning_indexer import reference, scores_sm90, selection_sm90

KEYS = (8192, 32768, 131072)


def inputs(queries, keys, heads=64, width=128, dtype=jnp.float8_e4m3fn, seed=0):
    """Random queries, keys, weights of both signs, causal ranges and key scales."""
    key = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(key[0], (1, queries, heads, width)).astype(dtype)
    k = jax.random.normal(key[1], (1, keys, width)).astype(dtype)
    w = jax.random.normal(key[2], (1, queries, heads)) / heads
    scale = jax.random.uniform(key[3], (1, keys), minval=0.5, maxval=2.0)
    return q, k, w, KeyRange.causal(1, queries, offset=keys - queries), scale


def flop(ranges: KeyRange, heads: int, width: int) -> float:
    """Of the matrix product over visible pairs."""
    pairs = np.maximum(np.asarray(ranges.end, np.int64) - np.asarray(ranges.start), 0).sum()
    return 2.0 * heads * width * float(pairs)


def check_scores(fn, q, k, w, ranges, k_scale, rows: int = 64) -> dict[str, float]:
    """Masks everywhere, values on some rows against fp32, bits over 20 runs."""
    shape = (q.shape[0], q.shape[1], k.shape[1])
    jnp.full(shape, jnp.nan, jnp.float32).block_until_ready().delete()  # poison what comes next
    out = fn(q, k, w, ranges, k_scale)

    @jax.jit
    def mask_errors(out):
        s = jnp.arange(shape[2], dtype=jnp.int32)
        seen = (s >= ranges.start[..., None]) & (s < ranges.end[..., None])
        return jnp.sum(jnp.where(seen, ~jnp.isfinite(out), out != -jnp.inf))

    pick = np.sort(np.random.default_rng(1).choice(shape[1], min(rows, shape[1]), replace=False))
    some = KeyRange(ranges.start[:, pick], ranges.end[:, pick])
    want = np.asarray(
        reference.indexer_scores(q[:, pick], k, w[:, pick], some, k_scale, workspace_bytes=2**31)
    )
    got = np.asarray(out[:, pick])
    seen = np.isfinite(want)
    x, y = got[seen].astype(np.float64), want[seen].astype(np.float64)
    same = sum(
        bool(jnp.array_equal(out.view(jnp.int32), fn(q, k, w, ranges, k_scale).view(jnp.int32)))
        for _ in range(20)
    )
    return {
        "mask_errors": int(mask_errors(out)),
        "calc_diff": 1 - 2 * (x @ y) / (x @ x + y @ y),
        "relative_error": float(np.linalg.norm(x - y) / np.linalg.norm(y)),
        "equal_runs": same,
    }


def scores(queries: int, keys: int, check: bool) -> dict:
    """The scores kernel."""
    arguments = inputs(queries, keys)
    row: dict = {"op": "indexer_scores", "queries": queries, "keys": keys}
    if check:
        row |= check_scores(scores_sm90.indexer_scores, *arguments)
    timing = device_time(scores_sm90.indexer_scores, *arguments)
    return row | _figures(timing, arguments)


def fused(queries: int, keys: int, check: bool) -> dict:
    """From q, k, w to the selection of 2048 keys, the scores of all queries in one window."""
    arguments = inputs(queries, keys)
    select = functools.partial(
        selection_sm90.lightning_indexer, topk=2048, workspace_bytes=4 * queries * keys
    )
    row: dict = {"op": "lightning_indexer", "queries": queries, "keys": keys}
    if check:
        found = select(*arguments)
        ranges = arguments[3]
        want = reference.select_topk(
            scores_sm90.indexer_scores(*arguments), ranges, topk=2048, workspace_bytes=2**31
        )
        row["wrong_rows"] = int(jnp.sum(jnp.any(found != want, axis=-1)))
        row["equal_runs"] = sum(bool(jnp.array_equal(found, select(*arguments))) for _ in range(20))
    return row | _figures(device_time(select, *arguments), arguments)


def _figures(timing, arguments) -> dict:
    ranges = arguments[3]
    kernels = {name: round(ms, 4) for name, ms in timing.kernels.items() if ms > 0.02}
    return {
        "ms": timing.median_ms,
        "tflops": timing.tflops(flop(ranges, 64, 128)),
        "kernels": kernels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["scores", "fused"])
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--keys", type=int, nargs="*", default=KEYS)
    parser.add_argument("--check", action="store_true", help="against the reference first")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rates = matmul_rates()
    print(rates, flush=True)
    rows = []
    for what in options.what:
        for keys in options.keys:
            row = {"scores": scores, "fused": fused}[what](options.queries, keys, options.check)
            rows.append(row | {"of_matmul": row["tflops"] / rates["e4m3"]})
            print(rows[-1], flush=True)
    if options.json:
        print(json.dumps({"environment": environment(), "matmul": rates, "rows": rows}))


if __name__ == "__main__":
    main()
