"""KL between the attention's distribution and the indexer's in plain XLA, with its gradient.

For a query t with support R (its key range, or its selected keys) and indexer scores I:

    p[s]  = sum_n A[n, s] / sum_n,s A[n, s],   A[n, s] = exp(scale q[n] . k[s] - lse[n])
    kl    = sum_s p[s] (log p[s] - log softmax(I)[s])
    dI[s] = softmax(I)[s] - p[s]
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tiling
from pallas_kernels.lightning_indexer.reference import score, score_gradient
from pallas_kernels.numerics import einsum, softmax, softmax_from_lse
from pallas_kernels.sparse_attention.reference import gather, scatter_add
from pallas_kernels.types import KeyRange


def normalised(mass):
    """L1-normalises the heads' summed attention, `[B, T, S]`; a row of zeros stays zero."""
    total = mass.sum(axis=-1, keepdims=True)
    return mass / jnp.where(total == 0, 1.0, total)


def divergence(p, scores, visible):
    """`kl [B, T]`."""
    _, _, lse = softmax(scores, visible)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    held = p > 0  # 0 log 0 = 0, and nothing is added to p to make the logarithm finite
    log_p = jnp.log(jnp.where(held, p, 1.0))
    return jnp.where(held, p * (log_p - (scores - lse)), 0.0).sum(axis=-1)


def scores_gradient(p, scores, visible):
    """Gradient of `divergence` for the scores, `[B, T, S]`; 0 outside the support."""
    weights, total, _ = softmax(scores, visible)
    # p sums to 1, or to 0 where no head put any mass: then kl is 0 whatever the scores.
    return weights / total * p.sum(axis=-1, keepdims=True) - p


def _dense_target(q, k, lse, visible, *, row, scale, heads):
    """p `[B, T, S]` of one block of queries, `heads` heads at once; k is whole: cut at `row`."""

    def some_heads(head, inputs):
        q, lse = inputs
        some_keys = tiling.cut(k, (row, 0, head), (q.shape[0], None, heads))
        scores = scale * einsum("BTND,BSND->BNTS", q, some_keys)
        return softmax_from_lse(scores, visible[:, None], jnp.swapaxes(lse, 1, 2)).sum(axis=1)

    zeros = jnp.zeros(visible.shape, jnp.float32)
    return normalised(tiling.sum_over_heads(some_heads, heads, zeros, (q, lse)))


def _sparse_target(q, rows, lse, valid, *, scale):
    """p `[B, T, K]` of one block of queries over its own rows `[B, T, K, C+R]`."""
    scores = scale * einsum("BTND,BTKD->BTNK", q, rows)
    return normalised(softmax_from_lse(scores, valid[:, :, None], lse).sum(axis=2))


def _dense_plan(iq, q, k, *, backward, workspace_bytes):
    batch, queries, heads, width = q.shape
    index_heads, index_width = iq.shape[2:]
    keys = k.shape[1]
    copies = 4 if backward else 1
    return tiling.plan(
        batch=batch,
        queries=queries,
        heads=heads,
        fixed=lambda n: keys * (8 * n * width + 4 * copies * index_width),
        per_query=lambda n: (
            4 * keys * (2 * n + copies * index_heads + 8)
            + 8 * (n * width + copies * index_heads * index_width)
        ),
        workspace_bytes=workspace_bytes,
    )


@functools.partial(jax.jit, static_argnames=("scale", "workspace_bytes"))
def dense_forward(iq, ik, iw, q, k, lse, ranges: KeyRange, *, scale: float, workspace_bytes: int):
    """`kl [B, T]` over the key range."""
    keys = k.shape[1]
    blocks = _dense_plan(iq, q, k, backward=False, workspace_bytes=workspace_bytes)

    def block(_, ik, inputs, at):
        iq, iw, q, lse, ranges = inputs
        visible = ranges.mask(keys)
        p = _dense_target(q, k, lse, visible, row=at.row, scale=scale, heads=blocks.heads)
        return (), divergence(p, score(iq, ik, iw), visible)

    return tiling.over_blocks(block, blocks, ik, (iq, iw, q, lse, ranges))[1]


@functools.partial(jax.jit, static_argnames=("scale", "workspace_bytes", "dik_dtype"))
def dense_backward(
    iq, ik, iw, q, k, lse, ranges: KeyRange, g, *,
    scale: float, workspace_bytes: int, dik_dtype=None,
):  # fmt: skip
    """Gradients of iq, ik and iw, given that of `kl`; in their dtypes, or that of ik in another."""
    keys = k.shape[1]
    blocks = _dense_plan(iq, q, k, backward=True, workspace_bytes=workspace_bytes)

    def block(dik, ik, inputs, at):
        iq, iw, q, lse, ranges, g = inputs
        visible = ranges.mask(keys)
        p = _dense_target(q, k, lse, visible, row=at.row, scale=scale, heads=blocks.heads)
        dscores = scores_gradient(p, score(iq, ik, iw), visible)
        dscores *= jnp.where(at.fresh, g, 0.0)[..., None]
        diq, more, diw = score_gradient(iq, ik, iw, dscores)
        return dik + more, (diq.astype(iq.dtype), diw)

    dik, (diq, diw) = tiling.over_blocks(
        block,
        blocks,
        ik,
        (iq, iw, q, lse, ranges, g),
        start=lambda ik: jnp.zeros(ik.shape, jnp.float32),
        finish=lambda dik: dik.astype(dik_dtype or ik.dtype),
    )
    return diq, dik, diw


def dense_forward_and_backward(*arguments, scale: float, workspace_bytes: int, dik_dtype=None):
    """`(kl, gradients)`: both of the above, the gradients given that of `kl` last."""
    *inputs, g = arguments
    options = dict(scale=scale, workspace_bytes=workspace_bytes)
    gradients = dense_backward(*inputs, g, **options, dik_dtype=dik_dtype)
    return dense_forward(*inputs, **options), gradients


def _sparse_plan(iq, ik, q, indices, *, backward, workspace_bytes):
    batch, queries, heads, width = q.shape
    index_heads, index_width = iq.shape[2:]
    selected = indices.shape[2]
    copies = 3 if backward else 2
    return tiling.plan(
        batch=batch,
        queries=queries,
        fixed=lambda _: 4 * ik.shape[1] * index_width if backward else 0,
        per_query=lambda _: (
            4 * selected * (2 * width + copies * index_width + 2 * heads + copies * index_heads + 8)
            + 8 * (heads * width + copies * index_heads * index_width)
        ),
        workspace_bytes=workspace_bytes,
    )


@functools.partial(jax.jit, static_argnames=("scale", "workspace_bytes"))
def sparse_forward(iq, ik, iw, q, kv, lse, indices, *, scale: float, workspace_bytes: int):
    """`kl [B, T]` over the selected keys."""
    blocks = _sparse_plan(iq, ik, q, indices, backward=False, workspace_bytes=workspace_bytes)

    def block(_, own, inputs, __):
        (ik, kv), (iq, iw, q, lse, indices) = own, inputs
        picked, valid = gather(kv, indices)
        p = _sparse_target(q, picked, lse, valid, scale=scale)
        return (), divergence(p, score(iq, gather(ik, indices)[0], iw), valid)

    return tiling.over_blocks(block, blocks, (ik, kv), (iq, iw, q, lse, indices))[1]


def sparse_forward_for_backward(*inputs, scale: float, workspace_bytes: int):
    """`(kl [B, T], what the backward needs)`."""
    return sparse_forward(*inputs, scale=scale, workspace_bytes=workspace_bytes), inputs


@functools.partial(jax.jit, static_argnames=("scale", "workspace_bytes", "dik_dtype"))
def sparse_backward(inputs, g, *, scale: float, workspace_bytes: int, dik_dtype=None):
    """Gradients of iq, ik and iw, given that of `kl`; in their dtypes, or that of ik in another."""
    iq, ik, iw, q, kv, lse, indices = inputs
    blocks = _sparse_plan(iq, ik, q, indices, backward=True, workspace_bytes=workspace_bytes)

    def block(dik, own, inputs, at):
        (ik, kv), (iq, iw, q, lse, indices, g) = own, inputs
        indices = jnp.where(at.fresh[:, None], indices, -1)
        picked, valid = gather(kv, indices)
        p = _sparse_target(q, picked, lse, valid, scale=scale)
        keys = gather(ik, indices)[0]
        dscores = g[..., None] * scores_gradient(p, score(iq, keys, iw), valid)
        diq, dkeys, diw = score_gradient(iq, keys, iw, dscores)
        return scatter_add(dik, indices, dkeys), (diq.astype(iq.dtype), diw)

    dik, (diq, diw) = tiling.over_blocks(
        block,
        blocks,
        (ik, kv),
        (iq, iw, q, lse, indices, g),
        start=lambda own: jnp.zeros(own[0].shape, jnp.float32),
        finish=lambda dik: dik.astype(dik_dtype or ik.dtype),
    )
    return diq, dik, diw
