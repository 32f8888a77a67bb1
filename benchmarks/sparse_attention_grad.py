"""The backward of sparse attention on a GPU: checked against fp32, then timed.

    python -m benchmarks.sparse_attention_grad [--quick] [--json FILE]

FLOPs are counted as five products, 2 T N K (3 (C + R) + 2 C): what recomputing S, and dP, dV, dK
and dQ take over the selected keys. What is timed is all of it: delta, the lists and the sums too.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.sparse_attention import SCALE, C, K, N, R, T, inputs, selections
from pallas_kernels.sparse_attention import backward_sm90, forward_sm90, reference

FLOP = 2 * T * N * K * (3 * (C + R) + 2 * C)


def gradients(q, kv, rows, dout, dlse, backward=backward_sm90.backward, **options):
    """`(dq, dkv)` with out and lse from fp32."""
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    out, lse = reference.forward(*wide, rows, value_width=C, scale=SCALE, workspace_bytes=2**31)
    if backward is reference.backward:
        q, kv, dout = *wide, dout.astype(jnp.float32)
    out = out.astype(q.dtype)
    return backward(q, kv, rows, out, lse, dout, dlse, scale=SCALE, **options)


def check() -> list[dict]:
    """Relative errors against fp32, and whether 20 repeats are bit-equal."""
    rng = np.random.default_rng()
    results = []
    for queries, heads, keys, selected in ((64, 128, 8192, 2048), (200, 64, 3000, 448)):
        q, kv = inputs(rng, queries, heads, keys)
        rows = selections(rng, queries, keys, selected, "random")
        count = rng.integers(0, selected + 1, queries)
        count[:4] = [0, 1, 64, selected]
        rows = np.where(np.arange(selected) < count[:, None], rows, -1)
        rows[0, 5, 7] = keys  # outside: to be ignored
        rows = jnp.asarray(rows)
        dout = jnp.asarray(rng.standard_normal((*q.shape[:3], C), np.float32), jnp.bfloat16)
        dlse = jnp.asarray(rng.standard_normal(q.shape[:3], np.float32))
        arguments = q, kv, rows, dout, dlse
        found = gradients(*arguments)
        expected = gradients(*arguments, reference.backward, workspace_bytes=2**31)
        errors = {
            name: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
            for name, a, b in zip(("dq", "dkv"), found, expected, strict=True)
        }
        again = (gradients(*arguments) for _ in range(20))
        equal = all(jax.tree.all(jax.tree.map(jnp.array_equal, found, x)) for x in again)
        shape = {"T": queries, "N": heads, "S": keys, "K": selected}
        results.append({**shape, **errors, "bit_equal": bool(equal)})
        print(results[-1], flush=True)
    return results


def measure(kinds, sizes=(8192, 32768, 131072)) -> list[dict]:
    rng = np.random.default_rng(0)
    results = []
    for keys in sizes:
        for kind in kinds:
            q, kv = inputs(rng, T, N, keys)
            rows = jnp.asarray(selections(rng, T, keys, K, kind))
            dout = jnp.asarray(rng.standard_normal((1, T, N, C), np.float32), jnp.bfloat16)
            out, lse = forward_sm90.forward(q, kv, rows, value_width=C, scale=SCALE)
            run = functools.partial(backward_sm90.backward, scale=SCALE)
            arguments = q, kv, rows, out, lse, dout, jnp.zeros_like(lse)
            time = timing.device_time(run, *arguments, repeats=10)
            row = {"S": keys, "kind": kind, "ms": time.median_ms, "TFLOP/s": time.tflops(FLOP)}
            largest = sorted(time.kernels.items(), key=lambda item: -item[1])[:6]
            row["kernels"] = {name[:40]: round(ms, 3) for name, ms in largest}
            results.append(row)
            print(json.dumps(row), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="random selections only")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    found = {
        "environment": timing.environment(),
        "check": check(),
        "results": measure(("random",) if options.quick else ("random", "recent")),
        "matmul": timing.matmul_rates(),
    }
    print(json.dumps(found["matmul"]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
