"""The loss of the sparse stage on Hopper, and its gradient, bit-equal between runs.

    sparse_pairs_sm90        of every query and selected key the attention's mass and the score
    sparse_divergence_sm90   kl, and d = softmax(score) - p
    sparse_gradient_sm90     from g d the gradients of iq and iw, and of dik a row for every pair

Where dik fits the L2, that kernel adds up the rows there, as integers: their sums have no order.

    sparse_bounds_sm90       bounds the rows of each key, for its unit

Elsewhere rows are stored, in bf16, for a window of queries at a time, and

    sparse_lists_sm90        lists which pairs belong to which keys
    sparse_sums_sm90         adds up the rows of each key in fp32, in the order of the queries

The forward keeps d and the signs of the indexer's products, three times as large as the selection,
for the backward: so the target, which costs most, is built once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from pallas_kernels.hopper import fixed_point
from pallas_kernels.hopper.gather import LANES
from pallas_kernels.hopper.tiles import LOG2E
from pallas_kernels.indexer_loss import (
    sparse_bounds_sm90,
    sparse_divergence_sm90,
    sparse_gradient_sm90,
    sparse_lists_sm90,
    sparse_pairs_sm90,
    sparse_sums_sm90,
)
from pallas_kernels.indexer_loss.sparse_lists_sm90 import BLOCK
from pallas_kernels.sparse_attention.backward_lists import ascending
from pallas_kernels.tiling import vary_like

KEYS = 64  # of a tile
HEADS = 128  # of the attention, that one call takes
INDEX_HEADS = 64
# A window costs passes over dik in fp32 and the ends of its kernels, so that few are better.
WORKSPACE_BYTES = 9 * 2**28
CACHE_BYTES = 2**25  # of sums that stay in the L2 of 50 MB while other things pass through it


def unsupported(iq, ik, q, kv) -> str | None:
    """Why the kernels cannot serve such a call; None where they can."""
    heads, index_width = iq.shape[2:]
    if not (iq.dtype == ik.dtype == q.dtype == kv.dtype == jnp.bfloat16):
        dtypes = f"{iq.dtype}, {ik.dtype}, {q.dtype} and {kv.dtype}"
        return f"iq, ik, q and kv are {dtypes}, the kernel takes bfloat16"
    if heads != INDEX_HEADS:
        return f"iq has I = {heads} heads, the kernel takes {INDEX_HEADS}"
    if index_width != 128:
        return f"iq has heads of width H = {index_width}, the kernel takes 128"
    width = q.shape[-1]
    if width % 64 or width > 576:
        return f"q has C+R = {width} columns, the kernel takes multiples of 64 up to 576"
    return None


class Residuals(NamedTuple):
    """What the backward needs."""

    iq: jax.Array
    ik: jax.Array
    iw: jax.Array
    indices: jax.Array  # i32 [B, T, K']: ascending, S where none is; K' whole tiles
    count: jax.Array  # i32 [B, T]: how many are inside
    d: jax.Array  # f32 [B, T, K']: the gradient of kl for the scores; 0 where no key is selected
    positive: jax.Array  # i32 [B, T, K' / 64, 128]: of `hopper.signs`, which products are positive
    sizes: jax.Array  # f32 [B, T, 64]: the largest |iq| of each head


def forward(iq, ik, iw, q, kv, lse, indices, *, scale: float, workspace_bytes: int = 0):
    """`kl [B, T]`, by the signature of the reference."""
    del workspace_bytes
    return compare(iq, ik, iw, q, kv, lse, indices, scale=scale)[0]


def forward_for_backward(
    iq, ik, iw, q, kv, lse, indices, *, scale: float, workspace_bytes: int = 0
):
    """`(kl [B, T], Residuals)`."""
    del workspace_bytes
    kl, *rest = compare(iq, ik, iw, q, kv, lse, indices, scale=scale, for_gradient=True)
    return kl, Residuals(iq, ik, iw, *rest)


@functools.partial(jax.jit, static_argnames=("scale", "for_gradient", "sms", "interpret"))
def compare(
    iq, ik, iw, q, kv, lse, indices, *,
    scale, for_gradient: bool = False, sms: int = 132, interpret: Any = None,
):  # fmt: skip
    """`[kl]`, then the rest of `Residuals` if asked for."""
    batch, queries, heads, width = q.shape
    rows = kv.shape[1]
    pads = ((0, 0), (0, 0), (0, -indices.shape[2] % KEYS))
    indices = jnp.pad(indices, pads, constant_values=-1)
    if 0 in (*indices.shape, rows):
        nothing, none = jnp.zeros(indices.shape, jnp.float32), jnp.zeros((batch, queries))
        words = jnp.zeros((*indices.shape[:2], indices.shape[2] // KEYS, LANES), jnp.int32)
        rest = indices, none.astype(jnp.int32), nothing, words, jnp.zeros_like(iw)
        return none, *(rest if for_gradient else ())
    inside = (indices >= 0) & (indices < rows)
    indices, count = ascending(indices, rows), inside.sum(axis=-1, dtype=jnp.int32)
    # More than 128 heads are as many queries with the same keys.
    split = -(-heads // HEADS)
    some = -(-heads // split // 64) * 64

    def by_query(x, value):
        pads = [(0, 0), (0, 0), (0, some * split - heads)] + [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, pads, constant_values=value)
        return x.reshape(batch * queries * split, some, *x.shape[3:])

    def repeat(x):
        return jnp.repeat(x.reshape(batch * queries, *x.shape[2:]), split, axis=0)

    # A head of a query without keys has no lse; one that fills up has no mass.
    lse = by_query(jnp.where(jnp.isfinite(lse), lse * LOG2E, 0.0), jnp.inf)
    found = sparse_pairs_sm90.pairs(
        by_query(q, 0), repeat(iq), kv.reshape(-1, width), ik.reshape(-1, ik.shape[-1]),
        lse, repeat(iw), repeat(indices), repeat(_tiles(count)),
        queries=queries * split, rows=rows, scale=scale, sms=sms,
        for_gradient=for_gradient, interpret=interpret,
    )  # fmt: skip
    mass, *found = vary_like(tuple(found), (iq, ik, iw, q, kv))
    mass = mass.reshape(batch, queries, -1, mass.shape[-1])
    # One after the other, not as a sum over an axis: it costs no pass of its own then.
    mass = functools.reduce(jnp.add, [mass[:, :, group] for group in range(mass.shape[2])])
    scores, *rest = (x.reshape(batch, queries, split, *x.shape[1:])[:, :, 0] for x in found)
    kl, *d = _diverge(mass, scores, count, for_gradient, interpret)
    return kl, *((indices, count, *d, *rest) if for_gradient else ())


def _diverge(mass, scores, count, for_gradient: bool, interpret):
    """`[kl]`, and d if asked for, of queries in batches."""
    if interpret is not None:
        exists = jnp.arange(mass.shape[-1], dtype=jnp.int32) < count[..., None]
        return divergence(mass, scores, exists)[: 1 + for_gradient]
    flat = count.reshape(-1), *(x.reshape(-1, x.shape[-1]) for x in (mass, scores))
    found = sparse_divergence_sm90.divergence(*flat, with_d=for_gradient)
    kl, *d = vary_like(tuple(found), mass)
    return kl.reshape(count.shape), *(x.reshape(mass.shape) for x in d)


def divergence(mass, scores, exists):
    """The twin of `sparse_divergence_sm90`."""
    total = jnp.where(exists, mass, 0.0).sum(axis=-1, keepdims=True)
    top = jnp.where(exists, scores, -jnp.inf).max(axis=-1, keepdims=True)
    weights = jnp.where(exists, jnp.exp(scores - top), 0.0).sum(axis=-1, keepdims=True)
    exists &= total > 0  # where no head has put any mass, kl is 0 whatever the scores
    p = jnp.where(exists, mass / total, 0.0)
    log_q = scores - (top + jnp.log(weights))
    log_p = jnp.log(jnp.where(p > 0, p, 1.0))
    kl = jnp.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=-1)
    return kl, jnp.where(exists, jnp.exp(log_q), 0.0) - p


@functools.partial(jax.jit, static_argnames=("scale", "workspace_bytes", "dik_dtype"))
def backward(
    residuals: Residuals, g, *, scale: float = 0.0, workspace_bytes: int = 0, dik_dtype: Any = None
):
    """Gradients of iq, ik and iw, given that of `kl`; in their dtypes, or that of ik in another."""
    del scale
    width, selected = residuals.ik.shape[2], residuals.indices.shape[2]
    window = max(workspace_bytes, WORKSPACE_BYTES) // (max(selected, 1) * (2 * width + 8))
    # Of one piece: a remat policy would part it in two, and the sum in place cannot be handed over.
    run = functools.partial(gradients, window=window, dik_dtype=dik_dtype)
    return sequential_vmap(run)(residuals, g)


def gradients(
    residuals: Residuals, g, *,
    window: int, dik_dtype: Any = None, sms: int = 132, interpret: Any = None,
):  # fmt: skip
    """The gradients, with at most so many queries in a window."""
    iq, ik, iw, indices, count, d, positive, sizes = residuals
    dik_dtype = dik_dtype or ik.dtype
    batch, queries, heads, width = iq.shape
    rows = ik.shape[1]
    if 0 in (*indices.shape, rows):
        return jnp.zeros_like(iq), jnp.zeros_like(ik, dik_dtype), jnp.zeros_like(iw)
    total = batch * queries
    d, indices, g, count, positive = (
        x.reshape(total, *x.shape[2:]) for x in (d, indices, g, count, positive)
    )
    arrays = iq.reshape(total, heads, width), ik.reshape(-1, width), iw.reshape(total, heads)
    arrays = *arrays, d, positive, g, indices, _tiles(count)
    factors = row_factors(g, iw.reshape(total, heads), sizes.reshape(total, heads))
    blocks = -(-batch * rows // BLOCK)
    parts = max(1, -(-2 * sms // blocks)) if blocks < 2 * sms else 1
    window = min(max(1, window), total, sparse_lists_sm90.max_window(d.shape[1]))
    window = -(-total // -(-total // window))  # windows of one size
    plan = _Plan(queries, rows, batch * rows, window, sms)
    cached = in_cache(batch * rows * width)
    # The kernel writes all of it: nothing has to be there before.
    sums = None if cached else jax.new_ref(lax.empty((parts, blocks * BLOCK, width), jnp.float32))

    def step(dik, first):
        if sums is None:
            more, diq, diw = _added(plan, first, arrays, factors, interpret)
            return more if dik is None else dik + more, (diq, diw)
        return dik, _stored(plan, first, arrays, count, sums, interpret)

    firsts = jnp.arange(0, total, window, dtype=jnp.int32)
    if len(firsts) == 1:
        dik, results = step(None, firsts[0])
    else:
        shape = (batch * rows, width) if cached else ()
        nothing = vary_like(jnp.zeros(shape, jnp.float32), residuals)
        dik, results = lax.scan(step, nothing, firsts)
    if sums is not None:
        dik = jax.freeze(sums).sum(axis=0)[: batch * rows]
    # The kernels do not tell over which mesh axes their results vary.
    dik, results = vary_like((dik, results), residuals)
    diq, diw = (
        x.reshape(-1, *like.shape[2:])[:total].reshape(like.shape)
        for x, like in zip(results, (iq, iw), strict=True)
    )
    return diq, dik.reshape(ik.shape).astype(dik_dtype), diw


class _Plan(NamedTuple):
    """The static numbers of a call."""

    queries: int  # T, of one batch row
    rows: int  # S, of one batch row
    keys: int  # of all batch rows
    window: int  # queries of it
    sms: int

    def sizes(self):
        """For the kernels."""
        return {"queries": self.queries, "rows": self.rows, "window": self.window}


def row_factors(g, iw, sizes):
    """f32 `[queries]`: times |d[t, k]|, at least what the row of pair t, k has in any column.

        row[t, k] = g[t] d[t, k] sum_i iw[t, i] 1[score > 0] iq[t, i]

    Args:
        g: f32 `[queries]`, the gradient of kl.
        iw: f32 `[queries, I]`.
        sizes: f32 `[queries, I]`, the largest |iq| of each head.
    """
    # More than the products' factors gain as they are rounded to bf16.
    return (1 + 2**-6) * jnp.abs(g) * (jnp.abs(iw) * sizes).sum(axis=-1)


def in_cache(size: int) -> bool:
    """Whether so many sums stay in the L2 while rows are added to them."""
    return 4 * size <= CACHE_BYTES


def _added(plan: _Plan, first, arrays, factors, interpret):
    """`(dik f32 [batch x S, H], diq, diw)` of a window."""
    per_one, one = fixed_point.units(_bounds(first, arrays, factors, plan, interpret), plan.window)
    sums = jax.new_ref(jnp.zeros((plan.keys, arrays[0].shape[-1]), jnp.int32))
    diq, diw = sparse_gradient_sm90.gradient(
        first.reshape(1),
        *arrays,
        per_one=per_one,
        sums=sums,
        **plan.sizes(),
        sms=plan.sms,
        interpret=interpret,
    )
    return fixed_point.to_floats(jax.freeze(sums), one), diq, diw


def _stored(plan: _Plan, first, arrays, count, sums, interpret):
    """`(diq, diw)` of a window; adds its part of dik to `sums`."""
    first, sizes = first.reshape(1), plan.sizes()
    on = {"sms": plan.sms, "interpret": interpret}
    rows, *results = sparse_gradient_sm90.gradient(first, *arrays, **sizes, **on)
    blocks = sums.shape[1] // BLOCK
    lists = _lists(first, count, arrays[-2], interpret, **sizes, blocks=blocks)
    rows = rows.reshape(-1, rows.shape[-1])
    sparse_sums_sm90.sum_rows(first, rows, *lists, sums, **on)
    return tuple(results)


def _bounds(first, arrays, factors, plan: _Plan, interpret):
    """A bound on what any query of a window adds to each key, f32 `[batch x S]`."""
    *_, d, _, _, indices, _ = arrays
    if interpret is not None:
        return bounds(first, factors, d, indices, plan)
    found = sparse_bounds_sm90.bounds(
        first.reshape(1), factors, d, indices, keys=plan.keys, **plan.sizes(), sms=plan.sms
    )
    return vary_like(found, arrays)


def bounds(first, factors, d, indices, plan: _Plan):
    """The twin of `sparse_bounds_sm90`."""
    # Where so many do not follow, others before them are looked at, too.
    numbers = jnp.arange(len(d), dtype=jnp.int32)
    factors, d, indices, numbers = (
        lax.dynamic_slice_in_dim(x, first, plan.window) for x in (factors, d, indices, numbers)
    )
    bits = lax.bitcast_convert_type(jnp.abs(d * factors[:, None]), jnp.int32)
    keys = indices + (numbers // plan.queries * plan.rows)[:, None]
    keys = jnp.where(indices < plan.rows, keys, plan.keys)
    found = vary_like(jnp.zeros((plan.keys,), jnp.int32), bits)
    found = found.at[keys].max(bits, mode="drop")
    return lax.bitcast_convert_type(found, jnp.float32)


def _lists(first, count, indices, interpret, **sizes):
    """The pairs of a window by blocks of keys."""
    if interpret is None:
        return sparse_lists_sm90.pairs_by_block(first, count, indices, **sizes)
    return sparse_lists_sm90.twin(first, count, indices, **sizes)


def _tiles(count):
    """How many tiles hold each query's keys; at least one."""
    return jnp.maximum(-(-count // KEYS), 1)
