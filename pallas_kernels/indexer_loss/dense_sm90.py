"""The warm-up loss on Hopper, with its gradient: one window of queries after another.

For a window the indexer's scores, then the target of each tile beside them (kl, and the gradient
of the scores), then the gradients of iq, ik and iw from that. What lies between the kernels is the
scores (4 bytes) and their gradient (2 bytes) of a window's pairs: bounded by the workspace
whatever T, so that memory is O(T + S). Every kernel and the sums over its parts are deterministic.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.tiles import LOG2E
from pallas_kernels.indexer_loss import gradient_sm90, target_sm90
from pallas_kernels.indexer_loss.target_sm90 import PAIR
from pallas_kernels.lightning_indexer import scores_operands, scores_sm90
from pallas_kernels.tiling import vary_like
from pallas_kernels.types import KeyRange

# Scores, their gradient, and at H = 128 the parts of dik: one of 512 bytes a key for 512 queries.
_TILES = math.lcm(target_sm90.TILE, gradient_sm90.TILE)
_BYTES_OF_PAIR = 4 + 2 + 1


def unsupported(iq, ik, q, k) -> str | None:
    """Why the kernels cannot serve such a call; None where they can."""
    heads, index_width = iq.shape[2:]
    if not (iq.dtype == ik.dtype == q.dtype == k.dtype == jnp.bfloat16):
        dtypes = f"{iq.dtype}, {ik.dtype}, {q.dtype} and {k.dtype}"
        return f"iq, ik, q and k are {dtypes}, the kernel takes bfloat16"
    if heads != gradient_sm90.HEADS:
        return f"iq has I = {heads} heads, the kernel takes {gradient_sm90.HEADS}"
    if index_width not in (64, 128):
        return f"iq has heads of width H = {index_width}, the kernel takes 64 or 128"
    if q.shape[-1] % 64:
        return f"q has heads of width P+R = {q.shape[-1]}, the kernel takes multiples of 64"
    return None


class Gradient(NamedTuple):
    """Of the weighted sum of kl."""

    iq: jax.Array
    ik: jax.Array
    iw: jax.Array


def forward(iq, ik, iw, q, k, lse, ranges: KeyRange, *, scale: float, workspace_bytes: int):
    """`kl [B, T]`, by the signature of the reference."""
    return run(iq, ik, iw, q, k, lse, ranges, None, scale=scale, workspace_bytes=workspace_bytes)[0]


def backward(iq, ik, iw, q, k, lse, ranges: KeyRange, g, **options):
    """Gradients of iq, ik and iw, by the signature of the reference."""
    return run(iq, ik, iw, q, k, lse, ranges, g, **options)[1]


@functools.partial(
    jax.jit, static_argnames=("scale", "workspace_bytes", "dik_dtype", "ctas", "interpret")
)
def run(
    iq, ik, iw, q, k, lse, ranges: KeyRange, g, *,
    scale: float, workspace_bytes: int, dik_dtype: Any = None,
    ctas: int | None = None, interpret: Any = None,
):  # fmt: skip
    """`(kl [B, T], Gradient)`: of `sum(g * kl)`, or None where g is None.

    Args:
        iq, ik, iw, q, k, lse, ranges: as in `indexer_kl_dense`.
        g: f32 `[B, T]`, the gradient of kl, or None.
        scale: the softmax scale of q and k.
        workspace_bytes: bound on a window's scores and their gradient.
        dik_dtype: of the gradient of ik; None is that of ik. It is added up in fp32.
        ctas: how many share the scores; None for one an SM.
        interpret: parameters of the GPU interpreter, or None.
    """
    batch, queries = iq.shape[:2]
    dik_dtype = dik_dtype or ik.dtype
    if 0 in (batch, queries, ik.shape[1]):
        zeros = Gradient(jnp.zeros_like(iq), jnp.zeros_like(ik, dik_dtype), jnp.zeros_like(iw))
        return jnp.zeros((batch, queries), jnp.float32), None if g is None else zeros
    sizes = _sizes(iq, ik, q, g, scale, workspace_bytes, ctas, interpret)
    arrays = _arrays(iq, ik, iw, q, k, lse, ranges, g, sizes)
    window, padded = sizes.target.queries, sizes.padded
    dik = jnp.zeros((batch, sizes.target.keys, ik.shape[2]), jnp.float32)
    step = functools.partial(_window, sizes, arrays)
    windows = scores_sm90.windows(arrays.scores, sizes.scores)
    if padded == window:
        dik, results = step(dik, jax.tree.map(lambda x: x[0], windows))
        results = [x[None] for x in results]
    else:
        dik, results = lax.scan(step, vary_like(dik, (iq, ik, iw, q, k)), windows)
    kl, *results = (
        jnp.moveaxis(x, 0, 1).reshape(batch, padded, *shape)[:, :queries]
        for x, shape in zip(results, ((), iq.shape[2:], iw.shape[2:]), strict=False)
    )
    if g is None:
        return kl, None
    diq, diw = results
    return kl, Gradient(diq, dik[:, : ik.shape[1]].astype(dik_dtype), diw)


class _Sizes(NamedTuple):
    """What is static of a call, kernel by kernel."""

    padded: int  # T, whole windows
    scores: scores_operands.Problem
    target: target_sm90.Problem
    gradient: gradient_sm90.Problem


def _sizes(iq, ik, q, g, scale: float, workspace_bytes: int, ctas, interpret) -> _Sizes:
    batch, queries, heads, width = iq.shape
    keys = scores_operands.round_up(ik.shape[1], _TILES)
    window = _window_queries(batch, queries, keys, workspace_bytes)
    tiling = scores_operands.default_tiling(heads, width, iq.dtype)
    ctas = ctas or scores_operands.sm_count()
    return _Sizes(
        scores_operands.round_up(queries, window),
        scores_operands.Problem(keys, heads, window, tiling, ctas, False, interpret),
        target_sm90.Problem(
            batch, q.shape[2], q.shape[3], keys, window, scale, g is not None, interpret
        ),
        gradient_sm90.Problem(batch, width, keys, window, queries, interpret),
    )


class _Arrays(NamedTuple):
    """Arguments as the kernels take them."""

    scores: scores_operands.Operands
    q: jax.Array
    k: jax.Array
    lse: jax.Array  # f32 [B, N, T'] in base 2
    iq: jax.Array  # [B, T * I, H]
    ik: jax.Array
    iw: jax.Array  # f32 [B, T' * I]
    rows: target_sm90.Rows
    live: gradient_sm90.Live


def _arrays(iq, ik, iw, q, k, lse, ranges: KeyRange, g, sizes: _Sizes) -> _Arrays:
    batch, queries = iq.shape[:2]
    rows, live = _rows(ranges, g, ik.shape[1], sizes.padded)
    clipped = KeyRange(rows.start[:, :queries], rows.end[:, :queries])
    operands = scores_operands.operands(iq, ik, iw, clipped, None, sizes.scores)
    # As TMA takes them: whole groups of 8 rows, no fewer than a box.
    q, k, iq, ik = (
        scores_operands.pad(x, 1, max(scores_operands.round_up(x.shape[1], 8), target_sm90.TILE))
        for x in (q, k, iq, ik)
    )
    lse = scores_operands.pad(jnp.swapaxes(lse, 1, 2) * LOG2E, 2, sizes.padded)
    iq = iq.reshape(batch, -1, iq.shape[-1])
    iw = scores_operands.pad(iw, 1, sizes.padded).reshape(batch, -1)
    return _Arrays(operands, q, k, lse, iq, ik, iw, rows, live)


def _window(sizes: _Sizes, x: _Arrays, dik, some: scores_sm90.Window):
    """`(dik so far, (kl, diq, diw))` of a window."""
    window, keys, first = sizes.target.queries, sizes.target.keys, some.first[0]
    scores = scores_sm90.score_window(x.scores, some, sizes.scores)
    ranges = KeyRange(
        *(lax.dynamic_slice_in_dim(bound, first, window, 1) for bound in (x.rows.start, x.rows.end))
    )
    scores_lse = _log_sum_exp(jnp.where(ranges.mask(keys), scores, -jnp.inf))
    parts, d = target_sm90.window(first, x.q, x.k, x.lse, scores, scores_lse, x.rows, sizes.target)
    kl = jnp.where(_live_tiles(x.rows, first, window, keys), parts, 0.0).sum(axis=1)
    if d is None:
        return dik, (kl,)
    inputs = (first, x.iq, x.ik, x.iw, d, x.live, sizes.gradient)
    diq, diw = gradient_sm90.of_queries(*inputs)
    return dik + gradient_sm90.of_keys(*inputs).sum(axis=1), (kl, diq, diw)


def _log_sum_exp(x):
    """Over the last axis, in one pass: `[B, T]`; -inf where all is."""

    def add(a, b):
        top = jnp.maximum(a[0], b[0])
        finite = jnp.where(top == -jnp.inf, 0.0, top)
        return top, a[1] * jnp.exp(a[0] - finite) + b[1] * jnp.exp(b[0] - finite)

    start = jnp.float32(-jnp.inf), jnp.float32(0)
    top, total = lax.reduce((x, jnp.ones_like(x)), start, add, (x.ndim - 1,))
    return top + jnp.log(total)


def _window_queries(batch: int, queries: int, keys: int, workspace_bytes: int) -> int:
    """Equal windows of whole pairs of tiles that fit the workspace."""
    fit = max(workspace_bytes // (_BYTES_OF_PAIR * batch * keys) // PAIR, 1)
    pairs = -(-queries // PAIR)
    windows = -(-pairs // fit)
    return -(-pairs // windows) * PAIR


def _rows(
    ranges: KeyRange, g, keys: int, padded: int
) -> tuple[target_sm90.Rows, gradient_sm90.Live]:
    start, end = (scores_operands.pad(jnp.clip(x, 0, keys), 1, padded) for x in ranges)
    empty = start >= end  # padded queries too
    low = jnp.where(empty, keys, start).reshape(start.shape[0], -1, PAIR).min(axis=2)
    high = jnp.where(empty, 0, end).reshape(start.shape[0], -1, PAIR).max(axis=2)
    g = jnp.zeros(start.shape, jnp.float32) if g is None else scores_operands.pad(g, 1, padded)
    live = gradient_sm90.Live(*_cover(low, high, gradient_sm90.TILE))
    # The gradient reads whole tiles of its own size: all of their pairs must be written.
    size = gradient_sm90.TILE
    tiles = _cover(size * live.first, size * (live.first + live.count), target_sm90.TILE)
    return target_sm90.Rows(start, end, g, *tiles), live


def _cover(low, high, tile: int):
    """The first and the number of the tiles that cover `low <= s < high`."""
    first = low // tile
    return first, jnp.maximum(-(-high // tile) - first, 0)


def _live_tiles(rows: target_sm90.Rows, first, window: int, keys: int):
    """Which tiles of the target are live for the queries of a window: `[B, tiles, window]`."""
    low, count = (
        jnp.repeat(lax.dynamic_slice_in_dim(x, first // PAIR, window // PAIR, 1), PAIR, axis=1)
        for x in (rows.first, rows.count)
    )
    since = jnp.arange(keys // target_sm90.TILE)[None, :, None] - low[:, None]
    return (since >= 0) & (since < count[:, None])
