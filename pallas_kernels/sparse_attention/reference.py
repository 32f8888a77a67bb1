"""Attention over selected keys in plain XLA: forward, backward, and from a paged cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tiling
from pallas_kernels.numerics import einsum, softmax, softmax_from_lse, softmax_gradient
from pallas_kernels.sparse_attention.pages import CachePages, Fp8Pages, dequantize


def gather(table, indices):
    """Rows of `[B, S, D]` at `[B, T, K]`, and which exist: an index outside `0..S-1` reads 0."""
    keys = table.shape[1]
    valid = (indices >= 0) & (indices < keys)
    slot = jnp.where(valid, indices, keys)
    rows = jax.vmap(lambda t, i: t.at[i].get(mode="fill", fill_value=0))(table, slot)
    return rows, valid


def scatter_add(total, indices, rows):
    """Adds rows `[B, T, K, D]` to `[B, S, D]` at `[B, T, K]`; an index outside is dropped."""
    keys = total.shape[1]
    slot = jnp.where((indices >= 0) & (indices < keys), indices, keys)
    return jax.vmap(lambda t, i, r: t.at[i].add(r, mode="drop"))(total, slot, rows)


def _attend(q, rows, valid, *, value_width, scale):
    """One block of queries over its own rows `[B, T, K, C+R]`."""
    scores = scale * einsum("BTND,BTKD->BTNK", q, rows)
    weights, total, lse = softmax(scores, valid[:, :, None])
    # Over the whole row and cut afterwards: cutting the rows first would copy them.
    out = einsum("BTNK,BTKD->BTND", weights, rows)[..., :value_width] / total
    return out.astype(q.dtype), lse


def _forward_bytes(heads: int, selected: int, width: int) -> int:
    """Workspace of `_attend` and its gather for one query."""
    return 4 * selected * (2 * width + 2 * heads) + 16 * heads * width


@functools.partial(jax.jit, static_argnames=("value_width", "scale", "workspace_bytes"))
def forward(q, kv, indices, *, value_width: int, scale: float, workspace_bytes: int):
    """`(out [B, T, N, value_width], lse [B, T, N])`."""
    batch, queries, heads, width = q.shape
    blocks = tiling.plan(
        batch=batch,
        queries=queries,
        fixed=lambda _: 0,
        per_query=lambda _: _forward_bytes(heads, indices.shape[2], width),
        workspace_bytes=workspace_bytes,
    )

    def block(_, kv, inputs, __):
        q, indices = inputs
        return (), _attend(q, *gather(kv, indices), value_width=value_width, scale=scale)

    return tiling.over_blocks(block, blocks, kv, (q, indices))[1]


def _attend_gradient(q, rows, valid, out, lse, dout, dlse, *, scale):
    """fp32 gradients of q and of the rows of one block of queries."""
    scores = scale * einsum("BTND,BTKD->BTNK", q, rows)
    weights = softmax_from_lse(scores, valid[:, :, None], lse)
    # The value is the first columns of the row that is also the key: with dout as wide as a row,
    # both gradients of the row are one product.
    wide = jnp.pad(dout, [(0, 0)] * 3 + [(0, q.shape[-1] - dout.shape[-1])])
    dweights = einsum("BTND,BTKD->BTNK", wide, rows)
    dscores = scale * softmax_gradient(weights, dweights, out, dout, dlse)
    dq = einsum("BTNK,BTKD->BTND", dscores, rows)
    both = jnp.concatenate([dscores, weights], axis=2), jnp.concatenate([q, wide], axis=2)
    return dq, einsum("BTNK,BTND->BTKD", *both)


@functools.partial(jax.jit, static_argnames=("scale", "workspace_bytes", "dkv_dtype"))
def backward(
    q, kv, indices, out, lse, dout, dlse, *, scale: float, workspace_bytes: int, dkv_dtype=None
):
    """Gradients of q and kv, added up in fp32, in their dtypes or that of kv in another."""
    batch, queries, heads, width = q.shape
    selected = indices.shape[2]
    blocks = tiling.plan(
        batch=batch,
        queries=queries,
        fixed=lambda _: 4 * kv.shape[1] * width,
        per_query=lambda _: 4 * selected * (3 * width + 5 * heads) + 32 * heads * width,
        workspace_bytes=workspace_bytes,
    )

    def block(dkv, kv, inputs, at):
        q, indices, *rest = inputs
        indices = jnp.where(at.fresh[:, None], indices, -1)
        dq, drows = _attend_gradient(q, *gather(kv, indices), *rest, scale=scale)
        return scatter_add(dkv, indices, drows), dq.astype(q.dtype)

    dkv, dq = tiling.over_blocks(
        block,
        blocks,
        kv,
        (q, indices, out, lse, dout, dlse),
        start=lambda kv: jnp.zeros(kv.shape, jnp.float32),
        finish=lambda dkv: dkv.astype(dkv_dtype or kv.dtype),
    )
    return dq, dkv


@functools.partial(jax.jit, static_argnames=("value_width", "scale", "workspace_bytes"))
def decode(q, pages: CachePages, slots, *, value_width: int, scale: float, workspace_bytes: int):
    """`(out, lse)` of queries over physical slots of a paged cache, which all batch rows share."""
    batch, queries, heads, width = q.shape
    selected = slots.shape[2]
    pool = jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), pages)
    blocks = tiling.plan(
        batch=1,
        queries=batch * queries,
        fixed=lambda _: 0,
        per_query=lambda _: _forward_bytes(heads, selected, width),
        workspace_bytes=workspace_bytes,
    )

    def block(_, pool, inputs, __):
        q, slots = inputs
        if isinstance(pool, Fp8Pages):
            parts, (valid, *_) = zip(*(gather(part, slots) for part in pool), strict=True)
            rows = dequantize(*parts)
        else:
            rows, valid = gather(pool, slots)
        return (), _attend(q, rows, valid, value_width=value_width, scale=scale)

    inputs = q.reshape(1, -1, heads, width), slots.reshape(1, -1, selected)
    _, (out, lse) = tiling.over_blocks(block, blocks, pool, inputs)
    return out.reshape(batch, queries, heads, -1), lse.reshape(batch, queries, heads)
