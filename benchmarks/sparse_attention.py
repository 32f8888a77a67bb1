"""The forward of sparse attention on a GPU: checked against fp32, then timed.

    python -m benchmarks.sparse_attention [--quick]

FLOPs are counted as 2 T N K (C + R + C), what a dense product over the selected keys takes.
"""

from __future__ import annotations

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from pallas_kernels.sparse_attention import forward_sm90, reference

T, N, K, C, R = 4096, 128, 2048, 512, 64
SCALE = (128 + 64) ** -0.5


def selections(rng: np.random.Generator, queries: int, keys: int, selected: int, kind: str):
    """Ascending indices `[1, queries, selected]`.

    `random` is a uniform choice, with nothing in common between neighbours. `recent` is nearer to
    what an indexer picks: an eighth the latest keys, 16 sinks, half kept from the query before.
    """
    rows = np.empty((1, queries, selected), np.int32)
    previous = np.sort(rng.choice(keys, selected, replace=False, shuffle=False))
    for t in range(queries):
        if kind == "random":
            chosen = rng.choice(keys, selected, replace=False, shuffle=False)
        else:
            end = keys - queries + t + 1
            fixed = np.concatenate([np.arange(16), np.arange(end - selected // 8, end)])
            kept = rng.permutation(previous)[: selected // 2]
            fresh = rng.choice(end, selected, replace=False)
            chosen = np.unique(np.concatenate([fixed, kept]))
            chosen = np.concatenate([chosen, np.setdiff1d(fresh, chosen)])[:selected]
            previous = chosen
        rows[0, t] = np.sort(chosen)
    return rows


def inputs(rng, queries, heads, keys, *, width=C + R):
    q = jnp.asarray(rng.standard_normal((1, queries, heads, width), np.float32), jnp.bfloat16)
    kv = jnp.asarray(rng.standard_normal((1, keys, width), np.float32), jnp.bfloat16)
    return q, kv


def errors(q, kv, indices, out, lse, *, value_width=C, scale=SCALE) -> dict[str, float]:
    """Against fp32 on the same bf16 inputs."""
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    expected, expected_lse = reference.forward(
        *wide, indices, value_width=value_width, scale=scale, workspace_bytes=2**31
    )
    out = out.astype(jnp.float32)
    finite = jnp.isfinite(expected_lse)
    dot = jnp.sum(out * expected)
    norms = jnp.sqrt(jnp.sum(out**2) * jnp.sum(expected**2))
    return {
        "abs": float(jnp.max(jnp.abs(out - expected))),
        "relative": float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)),
        "1-cosine": float(1 - dot / norms),
        "lse": float(jnp.max(jnp.where(finite, jnp.abs(lse - expected_lse), 0.0))),
        "empty_differ": int(jnp.sum(jnp.isfinite(lse) != finite)),
    }


def check(forward=forward_sm90.forward) -> None:
    rng = np.random.default_rng()
    for queries, heads, keys, selected in ((64, 128, 8192, 2048), (200, 64, 3000, 448)):
        q, kv = inputs(rng, queries, heads, keys)
        rows = selections(rng, queries, keys, selected, "random")
        count = rng.integers(0, selected + 1, queries)
        count[:4] = [0, 1, 64, selected]
        rows = np.where(np.arange(selected) < count[:, None], rows, -1)
        rows[0, 5, 7] = keys  # outside: to be ignored
        rows = jnp.asarray(rows)
        out, lse = forward(q, kv, rows, value_width=C, scale=SCALE)
        print((queries, heads, keys, selected), errors(q, kv, rows, out, lse), flush=True)


def measure(forward=forward_sm90.forward, sizes=(8192, 32768, 131072), kinds=("random",), heads=N):
    rng = np.random.default_rng(0)
    results = []
    for keys in sizes:
        for kind in kinds:
            q, kv = inputs(rng, T, heads, keys)
            rows = jnp.asarray(selections(rng, T, keys, K, kind))

            def run(q, kv, rows):
                return forward(q, kv, rows, value_width=C, scale=SCALE)

            time = timing.device_time(run, q, kv, rows)
            rate = time.tflops(2 * T * heads * K * (2 * C + R))
            results.append({"keys": keys, "kind": kind, "ms": time.median_ms, "TFLOP/s": rate})
            shares = {k[:40]: round(v, 4) for k, v in time.kernels.items()}
            print(
                keys, kind, heads, f"{time.median_ms:.3f} ms {rate:.0f} TFLOP/s", shares, flush=True
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="random selections only")
    options = parser.parse_args()
    print(json.dumps(timing.environment()))
    check()
    results = measure(kinds=("random",) if options.quick else ("random", "recent"))
    rates = timing.matmul_rates()
    print(json.dumps({"results": results, "matmul": rates, "device": str(jax.devices()[0])}))


if __name__ == "__main__":
    main()
