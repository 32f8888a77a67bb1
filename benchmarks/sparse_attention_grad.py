"""The backward of sparse attention on a GPU: checked against fp32, then timed.

    python -m benchmarks.ops sparse_attention_grad --json FILE
    python -m benchmarks.ops sparse_attention_grad_training --keys 8192 --json FILE

FLOPs are counted as five products, 2 T N K (3 (C + R) + 2 C): what recomputing S, and dP, dV, dK
and dQ take over the selected keys. What is timed is all of it: delta, the lists and the sums too.
The queries of a training step are all of its tokens; those that see fewer than K keys count with
what they see.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sparse_attention as forward
from benchmarks import timing
from benchmarks.sparse_attention import SCALE, SELECTIONS, C, K, N, R, T
from pallas_kernels.sparse_attention import backward_sm90, reference

FLOP = 2 * T * N * K * (3 * (C + R) + 2 * C)

SHAPES = ((64, 128, 8192, 2048),)  # T, N, S, K of the checks

backward = jax.jit(functools.partial(backward_sm90.backward, scale=SCALE))


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


def check(queries: int, heads: int, keys: int, selected: int) -> dict:
    """Relative errors against fp32, and how many of 20 repeats are bit-equal."""
    rng = np.random.default_rng()
    q, kv = forward.inputs(rng, 1, queries, heads, keys)
    picked = forward.ragged(rng, forward.random_selections(rng, queries, keys, selected), keys)
    seeds = rng.integers(2**31, size=2)
    dout = forward.normal(seeds[0], (1, queries, heads, C))
    dlse = forward.normal(seeds[1], (1, queries, heads)).astype(jnp.float32)
    out, lse = forward.expected(q, kv, picked)
    given = q, kv, picked, out.astype(q.dtype), lse, dout, dlse
    found = backward(*given)
    of_each = {name: x.item() for name, x in errors(found, expected(*given)).items()}
    equal = forward.equal_runs(functools.partial(backward, *given), found)
    shape = {"T": queries, "N": heads, "S": keys, "K": selected}
    return {**shape, **of_each, "equal_runs": equal}


def arguments(kind: str, keys: int):
    """Those of `backward` for a kind of selections; always the same."""
    q, kv, selected = forward.arguments(kind, keys)
    return q, kv, selected, *_given(T)


def _given(queries: int):
    """`(out, lse, dout, dlse)`.

    out is any, and lse what it is on average: the forward kernel would take longer to compile than
    all that is timed here.
    """
    out, dout = (forward.normal(seed, (1, queries, N, C)) for seed in (1, 2))
    lse = jnp.full((1, queries, N), math.log(K) + (C + R) * SCALE**2 / 2)
    return out, lse, dout, jnp.zeros_like(lse)


def measure(kind: str, keys: int) -> dict:
    """The time of one kind of selections, and of its longest kernels."""
    return _timed("sparse_attention_grad", kind, keys, arguments(kind, keys))


def _timed(op: str, kind: str, keys: int, given) -> dict:
    time = timing.device_time(backward, *given, repeats=10)
    largest = sorted(time.kernels.items(), key=lambda item: -item[1])[:6]
    queries, pairs = given[0].shape[1], int((given[2] >= 0).sum())
    return {
        "op": op,
        "kind": kind,
        "queries": queries,
        "keys": keys,
        "topk": K,
        "ms": round(time.median_ms, 4),
        "spread_ms": [round(time.min_ms, 4), round(time.max_ms, 4)],
        "tflops": round(time.tflops(FLOP * pairs / (T * K)), 1),
        "kernels_ms": {name[:40]: round(ms, 3) for name, ms in largest},
    }


def rows(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """Every kind of selection at each number of keys; the errors are those of small shapes."""
    checks = [functools.partial(check, *shape) for shape in SHAPES] if check_at else []
    calls = [
        lambda width=width: jax.block_until_ready(backward(*arguments("random", width)))
        for width in keys
    ]
    errors = forward.in_threads(checks + calls)[: len(checks)]
    for width in keys:
        for kind in SELECTIONS:
            yield measure(kind, width) | ({"errors": errors} if width in check_at else {})


def training(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """The queries of a training step, at each number of tokens."""
    del check_at
    for length in keys:
        q, kv = forward.inputs(np.random.default_rng(0), 1, length, N, length)
        given = _given(length)
        for kind in forward.TRAINING_KINDS:
            rows = jnp.asarray(forward.training_selections(kind, length))
            yield _timed("sparse_attention_grad_training", kind, length, (q, kv, rows, *given))
