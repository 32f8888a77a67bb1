"""Times the indexer's losses, value and gradient.

python -m benchmarks.ops indexer_kl_dense indexer_kl_sparse --json FILE
python -m benchmarks.ops indexer_kl_sparse_training --keys 8192 --json FILE
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sparse_attention
from benchmarks.timing import Timing, compiled, device_time, equal_runs, reference_jit
from pallas_kernels import KeyRange, Selection, indexer_kl_sparse
from pallas_kernels.dense_attention import forward_sm90
from pallas_kernels.dispatch import Implementation
from pallas_kernels.indexer_loss import dense_sm90, reference
from pallas_kernels.sparse_attention import backward_sm90
from pallas_kernels.sparse_attention import forward_sm90 as sparse_forward_sm90
from pallas_kernels.sparse_attention import reference as sparse_reference

SCALE = 192**-0.5
WORKSPACE_BYTES = 2**30


@functools.partial(jax.jit, static_argnames=("length", "heads", "seed"))
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

    @reference_jit
    def reference_of(arrays, ranges, g):
        wide = [x.astype(jnp.float32) for x in arrays]
        options = dict(scale=SCALE, workspace_bytes=2**30)
        return reference.dense_forward_and_backward(*wide, ranges, g, **options)

    want, want_gradient = reference_of(arguments[:6], ranges, g)
    return {
        "kl_error": float(jnp.abs(kl - want).max()),
        "kl_mean": float(want.mean()),
        "gradient_errors": [_error(x, y) for x, y in zip(gradient, want_gradient, strict=True)],
        "equal_runs": equal_runs(run, (kl, gradient)),
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


class Sparse(NamedTuple):
    """Arguments of the sparse stage's loss."""

    iq: jax.Array
    ik: jax.Array
    iw: jax.Array
    q: jax.Array
    kv: jax.Array
    lse: jax.Array  # 0 where inputs are made: the attention's own is to replace it
    indices: jax.Array
    g: jax.Array  # gradient of kl


@functools.partial(jax.jit, static_argnames=("seed", "keys"))
def _sparse_inputs(indices, *, keys: int, seed: int) -> Sparse:
    key = jax.random.split(jax.random.key(seed), 6)
    queries, a = indices.shape[1], sparse_attention

    def normal(i, *shape):
        return jax.random.normal(key[i], (1, *shape), jnp.bfloat16)

    iq, ik = normal(0, queries, 64, 128), normal(1, keys, 128)
    q, kv = normal(2, queries, a.N, a.C + a.R), normal(3, keys, a.C + a.R)
    iw = jax.random.normal(key[4], (1, queries, 64)) / 64**0.5 / 128**0.5
    g = jax.random.uniform(key[5], (1, queries), minval=0.5, maxval=1.5) / queries
    lse = jnp.zeros(q.shape[:3], jnp.float32)
    return Sparse(iq, ik, iw, q, kv, lse, indices, g)


def _sparse_value(x: Sparse, implementation: Implementation):
    return indexer_kl_sparse(
        x.iq, x.ik, x.iw, x.q, x.kv, x.lse, Selection(x.indices),
        scale=sparse_attention.SCALE, implementation=implementation,
    )  # fmt: skip


def _sparse_loss(x: Sparse, implementation: Implementation):
    """`(kl, its gradients for iq, ik and iw)`."""

    def kl(iq, ik, iw):
        return _sparse_value(x._replace(iq=iq, ik=ik, iw=iw), implementation)

    value, pull = jax.vjp(kl, x.iq, x.ik, x.iw)
    return value, pull(x.g)


@reference_jit
def _sparse_lse(x: Sparse):
    a = sparse_attention
    wide = x.q.astype(jnp.float32), x.kv.astype(jnp.float32)
    options = {"value_width": a.C, "scale": a.SCALE, "workspace_bytes": 2**31}
    return sparse_reference.forward(*wide, x.indices, **options)[1]


def check_sparse(queries: int = 64, keys: int = 8192) -> dict:
    """As `check`, on queries with 0 to 2048 keys, some of them outside."""
    rng = np.random.default_rng()
    rows = sparse_attention.random_selections(rng, queries, keys, sparse_attention.K)
    count = rng.integers(0, sparse_attention.K + 1, queries)
    count[:4] = [0, 1, 64, sparse_attention.K]
    rows = np.where(np.arange(sparse_attention.K) < count[:, None], rows, -1)
    rows[0, 5, 7] = keys
    x = _sparse_inputs(jnp.asarray(rows), keys=keys, seed=int(rng.integers(2**31)))
    lse = _sparse_lse(x)
    x = x._replace(iw=100 * x.iw, lse=lse)
    jnp.full((2**28,), jnp.nan, jnp.float32).block_until_ready().delete()
    run = jax.jit(functools.partial(_sparse_loss, implementation="mosaic"))
    kl, gradient = run(x)

    @reference_jit
    def reference_of(x):
        wide = {name: getattr(x, name).astype(jnp.float32) for name in ("iq", "ik", "q", "kv")}
        return _sparse_loss(x._replace(**wide), "xla")

    want, want_gradient = reference_of(x)
    return {
        "kl_error": float(jnp.abs(kl - want).max()),
        "kl_mean": float(want.mean()),
        "gradient_errors": [_error(a, b) for a, b in zip(gradient, want_gradient, strict=True)],
        "equal_runs": equal_runs(lambda: run(x), (kl, gradient)),
    }


def sparse(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """Value and gradient, at each number of keys; errors on a small shape."""
    errors = check_sparse() if check_at else {}
    for length in keys:
        yield _sparse(length) | (errors if length in check_at else {})


_sparse_loss_by_kernels = jax.jit(functools.partial(_sparse_loss, implementation="mosaic"))


@functools.cache
def _sparse_timing(keys: int) -> Timing:
    """For all that ask: to compile it takes far longer than to time it."""
    return device_time(_sparse_loss_by_kernels, _selected_inputs(keys), repeats=10)


def _sparse(keys: int) -> dict:
    a = sparse_attention
    return {"op": "indexer_kl_sparse", **_sparse_figures(keys, a.T * a.K, _sparse_timing(keys))}


def _sparse_figures(keys: int, pairs: int, loss: Timing) -> dict:
    a = sparse_attention
    return {
        "keys": keys,
        "ms": round(loss.median_ms, 4),
        "tflops": loss.tflops(2.0 * pairs * (a.N * (a.C + a.R) + 3 * 64 * 128)),
        "kernels": {name: round(ms, 3) for name, ms in loss.kernels.items() if ms > 0.02},
    }


def sparse_training(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """Value and gradient for the queries of a training step, which are all of its tokens."""
    del check_at
    for length in keys:
        for kind in sparse_attention.TRAINING_KINDS:
            rows = jnp.asarray(sparse_attention.training_selections(kind, length))
            x = _sparse_inputs(rows, keys=length, seed=0)
            x = x._replace(lse=jnp.full_like(x.lse, 9.1))
            loss = device_time(_sparse_loss_by_kernels, x, repeats=10)
            figures = _sparse_figures(length, int((rows >= 0).sum()), loss)
            yield {"op": "indexer_kl_sparse_training", "kind": kind, **figures}


def sparse_share(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """What the loss adds to the attention it belongs to, forward and backward."""
    del check_at
    for length in keys:
        yield _sparse_share(length)


def _sparse_share(keys: int) -> dict:
    a = sparse_attention
    x = _selected_inputs(keys)
    attend = functools.partial(sparse_forward_sm90.forward, value_width=a.C, scale=a.SCALE)
    arguments = x.q, x.kv, x.indices
    out, lse = jax.eval_shape(attend, *arguments)
    pull = functools.partial(backward_sm90.backward, scale=a.SCALE)
    calls = [(attend, arguments), (pull, (*arguments, out, lse, out, lse))]
    forward, backward = compiled(calls)
    out, lse = forward(*arguments)
    gradients = jnp.roll(out, 1, axis=1), jnp.zeros_like(lse)
    times = {
        "loss_ms": _sparse_timing(keys),
        "forward_ms": device_time(forward, *arguments, repeats=10),
        "backward_ms": device_time(backward, *arguments, out, lse, *gradients, repeats=10),
    }
    loss, *attention = (timing.median_ms for timing in times.values())
    return {
        "op": "indexer_kl_sparse of attention",
        "keys": keys,
        **{name: round(timing.median_ms, 4) for name, timing in times.items()},
        "of_attention": round(loss / sum(attention), 4),
    }


def _selected_inputs(keys: int) -> Sparse:
    """Of random selections; lse, which no time depends on, is about what attention gives."""
    a = sparse_attention
    rows = a.random_selections(np.random.default_rng(0), a.T, keys, a.K)
    x = _sparse_inputs(jnp.asarray(rows), keys=keys, seed=0)
    return x._replace(lse=jnp.full_like(x.lse, 9.1))
