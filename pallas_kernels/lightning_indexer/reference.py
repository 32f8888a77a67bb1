"""The lightning indexer in plain XLA: scores, exact top-k, and the scores' gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tiling
from pallas_kernels.numerics import einsum
from pallas_kernels.types import KeyRange

_HIDDEN = np.int32(-(2**31))  # the order of a key outside the range: below everything
_NAN = np.int32(-(2**31) + 1)  # below -inf


def dots(q, k):
    """`q[t, i] . k[s]` in fp32, `[B, T, I, S]`; k `[B, S, H]` or gathered `[B, T, S, H]`."""
    return einsum("BTIH,BSH->BTIS" if k.ndim == 3 else "BTIH,BTSH->BTIS", q, k)


def weigh(dots, w):
    """`sum_i w[t, i] relu(dots[t, i, s])`, `[B, T, S]`."""
    return (w[..., None] * jax.nn.relu(dots)).sum(axis=2)


def score(q, k, w, k_scale=None):
    """Scores of every pair: `k_scale[s] sum_i w[t, i] relu(q[t, i] . k[s])`, `[B, T, S]`."""
    total = weigh(dots(q, k), w)
    return total if k_scale is None else total * k_scale[:, None, :]


def score_gradient(q, k, w, g):
    """Gradients of `score` without a key scale, in fp32, of a block of queries.

    Args:
        q: `[B, T, I, H]`.
        k: `[B, S, H]`, or gathered `[B, T, S, H]`.
        w: `[B, T, I]`.
        g: `[B, T, S]`, gradient of the scores; 0 where a pair does not count.

    Returns:
        Gradients of q, of k in k's shape, and of w.
    """
    product = dots(q, k)
    dw = (g[:, :, None] * jax.nn.relu(product)).sum(axis=-1)
    # The slope of relu at 0 is 0: a key that a head rejects exactly teaches it nothing.
    slope = jnp.where(product > 0, g[:, :, None] * w[..., None], 0.0)
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    if k.ndim == 3:
        return einsum("BTIS,BSH->BTIH", slope, k), einsum("BTIS,BTIH->BSH", slope, q), dw
    return einsum("BTIS,BTSH->BTIH", slope, k), einsum("BTIS,BTIH->BTSH", slope, q), dw


def order(scores, visible):
    """int32 keys that sort as the scores must: number > NaN > outside the range, -0.0 == 0.0."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where(bits == _HIDDEN, 0, bits)  # the bits of -0.0; an addition may be folded away
    ordered = jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    magnitude = bits & np.int32(0x7FFFFFFF)
    ordered = jnp.where(magnitude > np.int32(0x7F800000), _NAN, ordered)
    return jnp.where(visible, ordered, _HIDDEN)


def select(ordered, topk: int):
    """Indices of the `topk` highest keys, ties to the lower index: `[B, T, topk]`, -1 padded.

    The lowest winning value is found bit by bit; then the winners are numbered in the order of
    their index. There is no sort, the result ascends by itself, and nothing depends on how a
    backend breaks ties.

    Args:
        ordered: `[B, T, S]` from `order`.
        topk: at most S.
    """
    keys = ordered.shape[-1]
    unsigned = jax.lax.bitcast_convert_type(ordered, jnp.uint32) ^ np.uint32(2**31)

    def add_bit(i, lowest):
        candidate = lowest | (np.uint32(2**31) >> i.astype(jnp.uint32))
        count = (unsigned >= candidate).sum(axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(count >= topk, candidate, lowest)

    start = tiling.vary_like(jnp.zeros((*ordered.shape[:-1], 1), jnp.uint32), ordered)
    lowest = jax.lax.fori_loop(0, 32, add_bit, start)
    above = unsigned > lowest
    places = topk - above.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    tied = (unsigned == lowest) & (unsigned > 0)
    wins = above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= places))

    number = jnp.cumsum(wins, axis=-1, dtype=jnp.int32).reshape(-1, keys)
    wanted = jnp.arange(1, topk + 1, dtype=jnp.int32)
    find = jax.vmap(lambda row: jnp.searchsorted(row, wanted, method="scan"))
    index = find(number).reshape(*ordered.shape[:-1], topk)
    return jnp.where(index == keys, -1, index).astype(jnp.int32)


def _select_bytes(keys: int, topk: int) -> int:
    """Workspace of `order` and `select` for one query."""
    return 16 * keys + 16 * topk


@functools.partial(jax.jit, static_argnames=("topk", "workspace_bytes"))
def lightning_indexer(q, k, w, ranges: KeyRange, k_scale, *, topk: int, workspace_bytes: int):
    """Scores and selects one block of queries after another; `[B, T, min(topk, S)]`."""
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    topk = min(topk, keys)
    blocks = tiling.plan(
        batch=batch,
        queries=queries,
        fixed=lambda _: 4 * keys * (width + 1),
        per_query=lambda _: 4 * heads * (keys + width) + 4 * keys + _select_bytes(keys, topk),
        workspace_bytes=workspace_bytes,
    )

    def block(_, own, inputs, __):
        (k, k_scale), (q, w, ranges) = own, inputs
        return (), select(order(score(q, k, w, k_scale), ranges.mask(keys)), topk)

    return tiling.over_blocks(block, blocks, (k, k_scale), (q, w, ranges))[1]


@functools.partial(jax.jit, static_argnames=("workspace_bytes",))
def indexer_scores(q, k, w, ranges: KeyRange, k_scale, *, workspace_bytes: int):
    """Scores of all pairs, -inf outside the range; `[B, T, S]`."""
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    blocks = tiling.plan(
        batch=batch,
        queries=queries,
        fixed=lambda _: 4 * keys * (width + 1),
        per_query=lambda _: 4 * heads * (keys + width) + 8 * keys,
        workspace_bytes=workspace_bytes,
    )

    def block(_, own, inputs, __):
        (k, k_scale), (q, w, ranges) = own, inputs
        return (), jnp.where(ranges.mask(keys), score(q, k, w, k_scale), -jnp.inf)

    return tiling.over_blocks(block, blocks, (k, k_scale), (q, w, ranges))[1]


@functools.partial(jax.jit, static_argnames=("workspace_bytes",))
def indexer_scores_gradient(q, k, w, ranges: KeyRange, k_scale, g, *, workspace_bytes: int):
    """Gradients of q, k, w and k_scale given the gradient `[B, T, S]` of `indexer_scores`."""
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    blocks = tiling.plan(
        batch=batch,
        queries=queries,
        fixed=lambda _: 4 * keys * (3 * width + 2),
        per_query=lambda _: 4 * heads * (4 * keys + 3 * width) + 16 * keys,
        workspace_bytes=workspace_bytes,
    )

    def block(sums, own, inputs, at):
        (k, k_scale), (q, w, ranges, g) = own, inputs
        dk, dk_scale = sums
        g = jnp.where(ranges.mask(keys) & at.fresh[:, None], g, 0.0)
        if k_scale is not None:
            dk_scale += (g * score(q, k, w)).sum(axis=1)
            g = g * k_scale[:, None, :]
        dq, more, dw = score_gradient(q, k, w, g)
        return (dk + more, dk_scale), (dq.astype(q.dtype), dw)

    (dk, dk_scale), (dq, dw) = tiling.over_blocks(
        block,
        blocks,
        (k, k_scale),
        (q, w, ranges, g),
        start=lambda own: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), own),
        finish=lambda sums: (sums[0].astype(k.dtype), sums[1]),
    )
    return dq, dk, dw, dk_scale


@functools.partial(jax.jit, static_argnames=("topk", "workspace_bytes"))
def select_topk(scores, ranges: KeyRange, *, topk: int, workspace_bytes: int):
    """Selects from given scores; `[B, T, min(topk, S)]`."""
    batch, queries, keys = scores.shape
    topk = min(topk, keys)
    blocks = tiling.plan(
        batch=batch,
        queries=queries,
        fixed=lambda _: 0,
        per_query=lambda _: _select_bytes(keys, topk),
        workspace_bytes=workspace_bytes,
    )

    def block(_, __, inputs, ___):
        scores, ranges = inputs
        return (), select(order(scores, ranges.mask(keys)), topk)

    return tiling.over_blocks(block, blocks, (), (scores, ranges))[1]
