"""The backward of sparse attention on a GPU: checked against fp32, then timed.

    python -m benchmarks.ops sparse_attention_grad --json FILE

FLOPs are counted as five products, 2 T N K (3 (C + R) + 2 C): what recomputing S, and dP, dV, dK
and dQ take over the selected keys. What is timed is all of it: delta, the lists and the sums too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.sparse_attention import SCALE, SELECTIONS, C, K, N, R, T, inputs, random_selections
from pallas_kernels.sparse_attention import backward_sm90, forward_sm90, reference

FLOP = 2 * T * N * K * (3 * (C + R) + 2 * C)


def gradients(q, kv, picked, dout, dlse, backward=backward_sm90.backward, **options):
    """`(dq, dkv)` with out and lse from fp32."""
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    out, lse = reference.forward(*wide, picked, value_width=C, scale=SCALE, workspace_bytes=2**31)
    if backward is reference.backward:
        q, kv, dout = *wide, dout.astype(jnp.float32)
    out = out.astype(q.dtype)
    return backward(q, kv, picked, out, lse, dout, dlse, scale=SCALE, **options)


def check() -> list[dict]:
    """Relative errors against fp32, and whether 20 repeats are bit-equal."""
    rng = np.random.default_rng()
    results = []
    for queries, heads, keys, selected in ((64, 128, 8192, 2048), (200, 64, 3000, 448)):
        q, kv = inputs(rng, 1, queries, heads, keys)
        picked = random_selections(rng, queries, keys, selected)
        count = rng.integers(0, selected + 1, queries)
        count[:4] = [0, 1, 64, selected]
        picked = np.where(np.arange(selected) < count[:, None], picked, -1)
        picked[0, 5, 7] = keys  # outside: to be ignored
        picked = jnp.asarray(picked)
        dout = jnp.asarray(rng.standard_normal((*q.shape[:3], C), np.float32), jnp.bfloat16)
        dlse = jnp.asarray(rng.standard_normal(q.shape[:3], np.float32))
        arguments = q, kv, picked, dout, dlse
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
    return results


def measure(keys: int, kind: str) -> dict:
    """The time of one kind of selections."""
    rng = np.random.default_rng(0)
    q, kv = inputs(rng, 1, T, N, keys)
    selected = jnp.asarray(SELECTIONS[kind](rng, T, keys, K))
    dout = jnp.asarray(rng.standard_normal((1, T, N, C), np.float32), jnp.bfloat16)
    out, lse = forward_sm90.forward(q, kv, selected, value_width=C, scale=SCALE)
    run = functools.partial(backward_sm90.backward, scale=SCALE)
    arguments = q, kv, selected, out, lse, dout, jnp.zeros_like(lse)
    time = timing.device_time(run, *arguments, repeats=10)
    largest = sorted(time.kernels.items(), key=lambda item: -item[1])[:6]
    return {
        "op": "sparse_attention_grad",
        "kind": kind,
        "queries": T,
        "keys": keys,
        "topk": K,
        "ms": round(time.median_ms, 4),
        "min_ms": round(time.min_ms, 4),
        "max_ms": round(time.max_ms, 4),
        "tflops": round(time.tflops(FLOP), 1),
        "kernels_ms": {name[:40]: round(ms, 3) for name, ms in largest},
    }


def rows(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """Random selections; where checked also recent ones, and the errors on small shapes."""
    errors = check() if check_at else []
    for width in keys:
        yield measure(width, "random") | ({"errors": errors} if width in check_at else {})
        if width in check_at:
            yield measure(width, "recent")
