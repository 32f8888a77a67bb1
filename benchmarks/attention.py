"""Times dense attention: `python -m benchmarks.attention forward --check --json`."""

from __future__ import annotations

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import device_time, environment, matmul_rates
from pallas_kernels import KeyRange
from pallas_kernels.dense_attention import forward_sm90, reference

SHAPES = {  # T = S, N, P+R, V, documents
    "4K": (4096, 128, 192, 128, 1),
    "32K": (32768, 128, 192, 128, 1),
    "32K, packed": (32768, 128, 192, 128, 5),
    "8K, 256/256": (8192, 64, 256, 256, 1),
}


def inputs(length: int, heads: int, width: int, value_width: int, documents: int, seed: int = 0):
    """Random q, k, v in bf16, and causal ranges of documents of uneven length."""
    key = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(key[0], (1, length, heads, width), jnp.bfloat16)
    k = jax.random.normal(key[1], (1, length, heads, width), jnp.bfloat16)
    v = jax.random.normal(key[2], (1, length, heads, value_width), jnp.bfloat16)
    if documents == 1:
        return q, k, v, KeyRange.causal(1, length)
    cuts = np.random.default_rng(seed).choice(length, documents - 1, replace=False)
    ids = 1 + (np.arange(length)[:, None] >= np.sort(cuts)).sum(1)
    return q, k, v, KeyRange.packed(jnp.asarray(ids)[None])


def flop(ranges: KeyRange, heads: int, widths: int) -> float:
    """Of the products over visible pairs; `widths` is the sum of the contracted widths."""
    pairs = np.maximum(np.asarray(ranges.end, np.int64) - np.asarray(ranges.start), 0).sum()
    return 2.0 * heads * widths * float(pairs)


def _error(found, want) -> float:
    found, want = (np.asarray(x, np.float64) for x in (found, want))
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def check_forward(q, k, v, ranges, scale: float, rows: int = 128, heads: int = 2) -> dict:
    """Some rows of some heads against fp32, and the bits of 20 runs."""
    jnp.full((*q.shape[:3], v.shape[3]), jnp.nan, q.dtype).block_until_ready().delete()
    run = functools.partial(forward_sm90.attend, q, k, v, ranges, scale=scale)
    out, lse = run()
    rng = np.random.default_rng(1)
    pick = np.sort(rng.choice(q.shape[1], min(rows, q.shape[1]), replace=False))
    some = np.sort(rng.choice(q.shape[2], heads, replace=False))
    with jax.default_matmul_precision("highest"):
        want, want_lse = reference.forward(
            q[:, pick][:, :, some].astype(jnp.float32),
            k[:, :, some].astype(jnp.float32),
            v[:, :, some].astype(jnp.float32),
            KeyRange(ranges.start[:, pick], ranges.end[:, pick]),
            scale=scale,
            workspace_bytes=2**31,
        )
    same = 0
    for _ in range(20):
        again = run()
        same += bool(jnp.array_equal(again[0], out) & jnp.array_equal(again[1], lse))
    return {
        "relative_error": _error(out[:, pick][:, :, some], want),
        "lse_error": float(jnp.abs(lse[:, pick][:, :, some] - want_lse).max()),
        "finite": bool(jnp.isfinite(out).all()),
        "equal_runs": same,
    }


def forward(name: str, check: bool) -> dict:
    """The forward kernel."""
    q, k, v, ranges = inputs(*SHAPES[name])
    scale = q.shape[-1] ** -0.5
    row: dict = {"op": "dense_attention", "shape": name}
    if check:
        row |= check_forward(q, k, v, ranges, scale)
    timing = device_time(
        functools.partial(forward_sm90.attend, scale=scale), q, k, v, ranges, repeats=10
    )
    work = flop(ranges, q.shape[2], q.shape[3] + v.shape[3])
    return row | {"ms": timing.median_ms, "tflops": timing.tflops(work), "kernels": timing.kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["forward"])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--check", action="store_true", help="against the reference first")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rates = matmul_rates()
    print(rates, flush=True)
    rows = []
    for what in options.what:
        for name in options.shapes:
            row = {"forward": forward}[what](name, options.check)
            rows.append(row | {"of_matmul": row["tflops"] / rates["bf16"]})
            print(rows[-1], flush=True)
    if options.json:
        print(json.dumps({"environment": environment(), "matmul": rates, "rows": rows}))


if __name__ == "__main__":
    main()
