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

from benchmarks import sparse_attention as forward
from benchmarks import timing
from benchmarks.sparse_attention import SCALE, SELECTIONS, C, K, N, R, T
from pallas_kernels.sparse_attention import backward_sm90, forward_sm90, reference

FLOP = 2 * T * N * K * (3 * (C + R) + 2 * C)

backward = functools.partial(backward_sm90.backward, scale=SCALE)


@forward.quick_jit
def expected(q, kv, rows, out, lse, dout, dlse):
    """`(dq, dkv)` in fp32, of the same bf16 inputs."""
    q, kv, out, dout = (x.astype(jnp.float32) for x in (q, kv, out, dout))
    options = {"scale": SCALE, "workspace_bytes": 2**31}
    return reference.backward(q, kv, rows, out, lse, dout, dlse, **options)


@jax.jit
def errors(found, expected):
    """Relative to the norm."""

    def error(a, b):
        return jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)

    return dict(zip(("dq", "dkv"), map(error, found, expected), strict=True))


def check() -> list[dict]:
    """Relative errors against fp32, and how many of 20 repeats are bit-equal."""
    rng = np.random.default_rng()
    results = []
    for queries, heads, keys, selected in ((64, 128, 8192, 2048), (200, 64, 3000, 448)):
        q, kv = forward.inputs(rng, 1, queries, heads, keys)
        picked = forward.random_selections(rng, queries, keys, selected)
        picked = forward.ragged(rng, picked, keys)
        dout, dlse = (
            forward.normal(seed, (1, queries, heads, *width))
            for seed, width in zip(rng.integers(2**31, size=2), ((C,), ()), strict=True)
        )
        out, lse = forward.expected(q, kv, picked)
        arguments = q, kv, picked, out.astype(q.dtype), lse, dout, dlse.astype(jnp.float32)
        found = backward(*arguments)
        shape = {"T": queries, "N": heads, "S": keys, "K": selected}
        found_errors = errors(found, expected(*arguments))
        equal = forward.equal_runs(functools.partial(backward, *arguments), found)
        of_each = {name: x.item() for name, x in found_errors.items()}
        results.append({**shape, **of_each, "equal_runs": equal})
    return results


def measure(keys: int, kind: str) -> dict:
    """The time of one kind of selections."""
    rng = np.random.default_rng(0)
    q, kv = forward.inputs(rng, 1, T, N, keys)
    selected = jnp.asarray(SELECTIONS[kind](rng, T, keys, K))
    dout = forward.normal(1, (1, T, N, C))
    out, lse = forward_sm90.forward(q, kv, selected, value_width=C, scale=SCALE)
    arguments = q, kv, selected, out, lse, dout, jnp.zeros_like(lse)
    time = timing.device_time(backward, *arguments, repeats=10)
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
