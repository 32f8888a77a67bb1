"""Attention over key ranges in plain XLA, heads apart: forward and backward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tiling
from pallas_kernels.numerics import einsum, softmax, softmax_from_lse, softmax_gradient
from pallas_kernels.types import KeyRange


@functools.partial(jax.jit, static_argnames=("scale", "workspace_bytes"))
def forward(q, k, v, ranges: KeyRange, *, scale: float, workspace_bytes: int):
    """`(out [B, T, N, V], lse [B, T, N])`."""
    batch, queries, heads, width = q.shape
    keys, value_width = v.shape[1], v.shape[3]
    blocks = tiling.plan(
        batch=batch,
        queries=queries,
        heads=heads,
        # A block's own copies of q, k, v and out, and k and v once more in fp32.
        fixed=lambda n: n * (8 * keys + 4 * queries) * (width + value_width),
        per_query=lambda n: n * (8 * keys + 8 * (width + value_width)),
        workspace_bytes=workspace_bytes,
    )

    def block(_, own, inputs, __):
        (k, v), (q, ranges) = own, inputs
        scores = scale * einsum("BTND,BSND->BNTS", q, k)
        weights, total, lse = softmax(scores, ranges.mask(keys)[:, None])
        out = einsum("BNTS,BSNV->BNTV", weights, v) / total
        return (), (jnp.swapaxes(out, 1, 2).astype(q.dtype), jnp.swapaxes(lse, 1, 2))

    return tiling.over_blocks(block, blocks, (k, v), (q, ranges), heads=heads)[1]


@functools.partial(jax.jit, static_argnames=("scale", "workspace_bytes"))
def backward(
    q, k, v, ranges: KeyRange, out, lse, dout, dlse, *, scale: float, workspace_bytes: int
):
    """Gradients of q, k and v in their dtypes; those of k and v are added up in fp32."""
    batch, queries, heads, width = q.shape
    keys, value_width = v.shape[1], v.shape[3]
    blocks = tiling.plan(
        batch=batch,
        queries=queries,
        heads=heads,
        fixed=lambda n: n * (14 * keys + 8 * queries) * (width + value_width),
        per_query=lambda n: n * (16 * keys + 16 * (width + value_width)),
        workspace_bytes=workspace_bytes,
    )

    def block(sums, own, inputs, at):
        (k, v), (q, ranges, *rest) = own, inputs
        visible = ranges.mask(keys) & at.fresh[:, None]
        dq, dk, dv = _block_gradient(q, k, v, visible, *rest, scale=scale)
        return (sums[0] + dk, sums[1] + dv), dq.astype(q.dtype)

    (dk, dv), dq = tiling.over_blocks(
        block,
        blocks,
        (k, v),
        (q, ranges, out, lse, dout, dlse),
        heads=heads,
        start=lambda own: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), own),
        finish=lambda sums: (sums[0].astype(k.dtype), sums[1].astype(v.dtype)),
    )
    return dq, dk, dv


def _block_gradient(q, k, v, visible, out, lse, dout, dlse, *, scale):
    """fp32 gradients of q, k and v of one block of queries."""
    out, lse, dout, dlse = (jnp.swapaxes(x, 1, 2) for x in (out, lse, dout, dlse))
    scores = scale * einsum("BTND,BSND->BNTS", q, k)
    weights = softmax_from_lse(scores, visible[:, None], lse)
    dweights = einsum("BNTV,BSNV->BNTS", dout, v)
    dscores = scale * softmax_gradient(weights, dweights, out, dout, dlse)
    return (
        einsum("BNTS,BSND->BTND", dscores, k),
        einsum("BNTS,BTND->BSND", dscores, q),
        einsum("BNTS,BNTV->BSNV", weights, dout),
    )
