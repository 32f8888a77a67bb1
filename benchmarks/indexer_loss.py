"""Times the warm-up loss and its gradient: `python -m benchmarks.ops indexer_kl_dense`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import device_time
from pallas_kernels import KeyRange
from pallas_kernels.dense_attention import forward_sm90
from pallas_kernels.indexer_loss import dense_sm90, reference

SCALE = 192**-0.5
WORKSPACE_BYTES = 2**30


def inputs(length: int, heads: int = 128, seed: int = 0):
    """Random indexer and attention at the sizes of DeepSeek-V3.2, with lse of causal attention."""
    key = jax.random.split(jax.random.key(seed), 6)

    def normal(i, *shape):
        return jax.random.normal(key[i], (1, length, *shape), jnp.bfloat16)

    iq, ik, q, k = normal(0, 64, 128), normal(1, 128), normal(2, heads, 192), normal(3, heads, 192)
    iw = jax.random.normal(key[4], (1, length, 64)) / 64**0.5 / 128**0.5
    g = jnp.full((1, length), 1 / length)
    ranges = KeyRange.causal(1, length)
    _, lse = forward_sm90.attend(q, k, k[..., :128], ranges, scale=SCALE)
    return iq, ik, iw, q, k, lse, ranges, g


def flop(length: int, heads: int = 128) -> float:
    """Of the target, the scores and their two gradients, each counted once, over visible pairs."""
    return length * (length + 1) / 2 * 2.0 * (heads * 192 + 3 * 64 * 128)


def check(length: int = 1500, heads: int = 16) -> dict:
    """Value and gradient against fp32, into memory that held NaN, and the bits of 20 runs."""
    *arrays, ranges, _ = inputs(length, heads, seed=1)
    start = jnp.where(jnp.arange(length) >= 700, 700, 0)[None]  # two documents
    end = ranges.end.at[:, 500:510].set(0)
    ranges = KeyRange(start, end)
    iq, ik, iw, q, k, _ = arrays
    g = jax.random.normal(jax.random.key(5), (1, length))
    _, lse = forward_sm90.attend(q, k, k[..., :128], ranges, scale=SCALE)
    arguments = (iq, ik, 100 * iw, q, k, lse, ranges)
    jnp.full((2**28,), jnp.nan, jnp.float32).block_until_ready().delete()
    run = functools.partial(dense_sm90.run, *arguments, g, scale=SCALE, workspace_bytes=2**23)
    kl, gradient = run()
    wide = [x.astype(jnp.float32) for x in arguments[:6]]
    options = dict(scale=SCALE, workspace_bytes=2**30)
    with jax.default_matmul_precision("highest"):
        want = reference.dense_forward(*wide, ranges, **options)
        want_gradient = reference.dense_backward(*wide, ranges, g, **options)
    same = 0
    for _ in range(20):
        again = run()
        same += all(
            bool(jnp.array_equal(x, y))
            for x, y in zip(jax.tree.leaves(again), jax.tree.leaves((kl, gradient)), strict=True)
        )
    return {
        "kl_error": float(jnp.abs(kl - want).max()),
        "kl_mean": float(want.mean()),
        "gradient_errors": [_error(x, y) for x, y in zip(gradient, want_gradient, strict=True)],
        "equal_runs": same,
    }


def _error(found, want) -> float:
    found, want = (np.asarray(x, np.float64) for x in (found, want))
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def dense(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """Value and gradient together, at each length; errors on a small shape."""
    errors = check() if check_at else {}
    for length in keys:
        yield _dense(length) | (errors if length in check_at else {})


def _dense(length: int) -> dict:
    *arrays, ranges, g = inputs(length)
    run = functools.partial(dense_sm90.run, scale=SCALE, workspace_bytes=WORKSPACE_BYTES)
    timing = device_time(run, *arrays, ranges, g, repeats=3)
    kernels = {name: round(ms, 3) for name, ms in timing.kernels.items() if ms > 0.1}
    return {
        "op": "indexer_kl_dense",
        "keys": length,
        "ms": timing.median_ms,
        "tflops": timing.tflops(flop(length)),
        "kernels": kernels,
    }
