"""What the scores kernel works on: its sizes, and the arrays as it takes them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import indexer_tile
from pallas_kernels.types import KeyRange

_CONSUMERS = 4
_DEFAULT_SMS = 132  # of an H100 SXM, where there is no device to ask
_SMEM_BYTES = 232448 - 16384  # beside barriers and the tile of -inf


class Tiling(NamedTuple):
    """What may be tuned.

    Attributes:
        keys: of a tile.
        stages: tiles in the ring.
        query_buffers: blocks of queries in flight.
        consumers: consumer warpgroups.
        shared: whether consumers share the queries of a block and divide the keys of a tile, as
            decoding wants; else they divide the queries and share the keys.
    """

    keys: int
    stages: int
    query_buffers: int
    consumers: int = _CONSUMERS
    shared: bool = False


def default_tiling(heads: int, width: int, dtype, queries: int | None = None) -> Tiling:
    """Key tiles of 256 where two fit beside the queries, else of 128; then as many as fit.

    Fewer heads mean more tokens, whose pointers and ranges live through a tile: at 128 keys they
    all but fit the registers. So few queries that one warpgroup holds them are shared: divided,
    three in four products would be of padding.

    Args:
        heads, width, dtype: of the queries.
        queries: how many a batch row has; None for many.
    """
    row = width * jnp.dtype(dtype).itemsize
    shared = queries is not None and queries <= indexer_tile.COLUMNS // heads
    block = (1 if shared else _CONSUMERS) * indexer_tile.COLUMNS * row
    buffers = 2 if 2 * block <= _SMEM_BYTES * 2 // 3 else 1
    room = _SMEM_BYTES - buffers * block
    wide = shared or (heads == 64 and room >= 2 * 256 * row)
    keys = 256 if wide else 128
    return Tiling(keys, min(room // (keys * row), 8), buffers, shared=shared)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static of a call.

    Attributes:
        keys: S.
        heads: I.
        queries: queries of one launch.
        tiling: sizes.
        ctas: how many share the work.
        fill: whether tiles that no query of a block sees are filled with -inf; else undefined.
        interpret: `InterpretGPUParams` for interpret mode on the CPU, in tests; else None.
    """

    keys: int
    heads: int
    queries: int
    tiling: Tiling
    ctas: int
    fill: bool = True
    interpret: Any = None

    @property
    def tokens(self) -> int:
        """Queries of a warpgroup."""
        return indexer_tile.COLUMNS // self.heads

    @property
    def block(self) -> int:
        """Queries of a CTA."""
        return self.tokens * (1 if self.tiling.shared else self.tiling.consumers)


class Operands(NamedTuple):
    """Arguments as the kernel takes them: see `operands`."""

    q: jax.Array  # [B, T' * I, H]
    k: jax.Array  # [B, S', H]
    w: jax.Array  # f32 [B, T'' * I]
    start: jax.Array  # i32 [B, T''], 0 <= start, end <= S
    end: jax.Array
    k_scale: jax.Array | None  # f32 [B, S'']


def operands(q, k, w, ranges: KeyRange, k_scale, problem: Problem) -> Operands:
    """Pads what is cheap to pad to whole windows of queries and tiles of keys.

    TMA clips what hangs over the end of q, k and the scores, but wants q and k to be no smaller
    than a box and, as Mosaic tiles them, a multiple of eight rows; only other sizes copy k.
    """
    batch, queries, _, width = q.shape
    keys, tile = problem.keys, problem.tiling.keys
    rows = round_up(round_up(queries, problem.queries), problem.block)
    q = pad(q, 1, problem.tokens).reshape(batch, -1, width)
    k = pad(k, 1, max(round_up(keys, 8), tile))
    w = pad(w, 1, rows).reshape(batch, -1)
    start, end = (pad(jnp.clip(x.astype(jnp.int32), 0, keys), 1, rows) for x in ranges)
    if k_scale is not None:
        k_scale = pad(k_scale, 1, round_up(keys, tile))
    return Operands(q, k, w, start, end, k_scale)


def pad(x, axis: int, size: int):
    """Zeros at the end of an axis, up to a size; what is as large is not copied."""
    if x.shape[axis] >= size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def round_up(x: int, multiple: int) -> int:
    """The next multiple."""
    return -(-x // multiple) * multiple


def sm_count() -> int:
    """How many SMs the device has."""
    device = jax.devices()[0]
    return getattr(device, "core_count", _DEFAULT_SMS) if device.platform == "gpu" else _DEFAULT_SMS
