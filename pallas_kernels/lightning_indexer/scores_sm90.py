# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Indexer scores on Hopper.

The work is the list of live tiles, block of queries by block of queries: 64 or more keys that some
query of the block may see. Every CTA takes an equal, contiguous share of that list, so that causal
and packed ranges balance to a tile, and streams the keys of its share through a TMA ring.

One CTA per SM: a producer warpgroup (one thread issues TMA) and four consumer warpgroups. A block
is `4 * 128 / I` queries, 128 / I for each consumer, whose 128 query rows stay in shared memory for
the whole share of the block; all four consumers read the same keys. Each multiplies 64 keys at a
time against its 128 (token, head) columns and reduces the heads in registers (`indexer_tile`).
While one warpgroup reduces, the others keep the tensor cores busy.

Shared memory: queries, two blocks where they fit (2 x 64 KiB at 64 x 128 e4m3), a ring of key
tiles in the rest. Registers: 112 a consumer thread (64 accumulators, 32 weights), 32 a producer's.

Scores outside a query's range are -inf. In live tiles the consumers write them; the rest is filled
from a constant tile by TMA stores that the producer interleaves with its loads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import indexer_tile
from pallas_kernels.lightning_indexer import tile_shares
from pallas_kernels.types import KeyRange

_CONSUMERS = 4
_DEFAULT_SMS = 132  # of an H100 SXM, where there is no device to ask
_SMEM_BYTES = 232448 - 16384  # beside barriers and the tile of -inf


_PRODUCER_REGISTERS = 32


def _consumer_registers(consumers: int) -> int:
    """What the register file leaves a consumer thread; 112 for four warpgroups of them."""
    at_launch = 65536 // (128 * (consumers + 1)) // 8 * 8
    return ((consumers + 1) * at_launch - _PRODUCER_REGISTERS) // consumers // 8 * 8


class Tiling(NamedTuple):
    """What may be tuned: keys of a tile, tiles in the ring, blocks of queries in flight."""

    keys: int
    stages: int
    query_buffers: int
    consumers: int = _CONSUMERS


def default_tiling(heads: int, width: int, dtype) -> Tiling:
    """Key tiles of 256 where two fit beside the queries, else of 128; then as many as fit.

    Fewer heads mean more tokens, whose pointers and ranges live through a tile: at 128 keys they
    all but fit the registers.
    """
    row = width * jnp.dtype(dtype).itemsize
    queries = _CONSUMERS * indexer_tile.COLUMNS * row
    buffers = 2 if 2 * queries <= _SMEM_BYTES * 2 // 3 else 1
    room = _SMEM_BYTES - buffers * queries
    keys = 256 if heads == 64 and room >= 2 * 256 * row else 128
    return Tiling(keys, min(room // (keys * row), 8), buffers)


def unsupported(q, k) -> str | None:
    """Why this kernel cannot serve such queries and keys; None where it can."""
    *_, heads, width = q.shape
    if q.dtype not in (jnp.float8_e4m3fn, jnp.bfloat16) or k.dtype != q.dtype:
        return f"q and k are {q.dtype} and {k.dtype}, the kernel takes bfloat16 or float8_e4m3fn"
    if heads not in (16, 32, 64):
        return f"q has I = {heads} heads, the kernel takes 16, 32 or 64"
    if width not in (64, 128):
        return f"q has heads of width H = {width}, the kernel takes 64 or 128"
    return None


class Operands(NamedTuple):
    """Arguments as the kernel takes them: see `operands`."""

    q: jax.Array  # [B, T' * I, H]
    k: jax.Array  # [B, S', H]
    w: jax.Array  # f32 [B, T'' * I]
    start: jax.Array  # i32 [B, T''], 0 <= start, end <= S
    end: jax.Array
    k_scale: jax.Array | None  # f32 [B, S'']


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
        interpret: interpret mode on the CPU, for tests.
    """

    keys: int
    heads: int
    queries: int
    tiling: Tiling
    ctas: int
    fill: bool = True
    interpret: plgpu.InterpretGPUParams | None = None

    @property
    def tokens(self) -> int:
        """Queries of a warpgroup."""
        return indexer_tile.COLUMNS // self.heads

    @property
    def block(self) -> int:
        """Queries of a CTA."""
        return self.tokens * self.tiling.consumers


@functools.partial(jax.jit, static_argnames=("fill", "tiling", "ctas", "interpret"))
def indexer_scores(
    q,
    k,
    w,
    ranges: KeyRange,
    k_scale=None,
    *,
    fill: bool = True,
    tiling: Tiling | None = None,
    ctas: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
):
    """`[B, T, S]` scores: `k_scale[s] sum_i w[t, i] relu(q[t, i] . k[s])`, -inf outside the range.

    Args:
        q: `[B, T, I, H]`, e4m3 or bf16.
        k: `[B, S, H]`, dtype of q.
        w: f32 `[B, T, I]`.
        ranges: the keys each query may see.
        k_scale: f32 `[B, S]`, or None for 1.
        fill, tiling, ctas, interpret: as in `Problem`; None for what suits device and operands.
    """
    _, queries, heads, width = q.shape
    tiling = tiling or default_tiling(heads, width, q.dtype)
    problem = Problem(k.shape[1], heads, queries, tiling, ctas or sm_count(), fill, interpret)
    scores = score_window(operands(q, k, w, ranges, k_scale, problem), 0, problem)
    return scores[..., : problem.keys]


def operands(q, k, w, ranges: KeyRange, k_scale, problem: Problem) -> Operands:
    """Pads what is cheap to pad to whole windows of queries and tiles of keys.

    TMA clips what hangs over the end of q, k and the scores, but wants q and k to be no smaller
    than a box and, as Mosaic tiles them, a multiple of eight rows; only other sizes copy k.
    """
    batch, queries, _, width = q.shape
    keys, tile = problem.keys, problem.tiling.keys
    rows = _round_up(_round_up(queries, problem.queries), problem.block)
    q = _pad(q, 1, problem.tokens).reshape(batch, -1, width)
    k = _pad(k, 1, max(_round_up(keys, 8), tile))
    w = _pad(w, 1, rows).reshape(batch, -1)
    start, end = (_pad(jnp.clip(x.astype(jnp.int32), 0, keys), 1, rows) for x in ranges)
    if k_scale is not None:
        k_scale = _pad(k_scale, 1, _round_up(keys, tile))
    return Operands(q, k, w, start, end, k_scale)


def score_window(x: Operands, first, problem: Problem):
    """Scores of `problem.queries` queries from query `first` on: f32 `[B, queries, S']`.

    S' is S rounded up to four, for TMA's 16 bytes; the columns beyond S are undefined.
    """
    batch, width = x.q.shape[0], x.q.shape[-1]
    tiling, block = problem.tiling, problem.block
    first = jnp.asarray(first, jnp.int32)
    rows = _round_up(problem.queries, block)
    start, end = (lax.dynamic_slice_in_dim(b, first, rows, axis=1) for b in (x.start, x.end))
    shares = tile_shares.cut(
        start, end, block=block, tile=tiling.keys, keys=problem.keys, ctas=problem.ctas
    )
    scale = () if x.k_scale is None else (x.k_scale,)
    swizzled = indexer_tile.transforms(width, x.q.dtype)
    query_barrier = plgpu.Barrier(num_arrivals=tiling.consumers, num_barriers=tiling.query_buffers)
    return plgpu.kernel(
        functools.partial(_kernel, problem=problem),
        out_type=jax.ShapeDtypeStruct(
            (batch, problem.queries, _round_up(problem.keys, 4)), jnp.float32
        ),
        scratch_types=dict(
            q_smem=plgpu.SMEM(
                (tiling.query_buffers, tiling.consumers, indexer_tile.COLUMNS, width),
                x.q.dtype,
                transforms=swizzled,
            ),
            k_smem=plgpu.SMEM((tiling.stages, tiling.keys, width), x.k.dtype, transforms=swizzled),
            hidden_smem=plgpu.SMEM((block, indexer_tile.KEYS), jnp.float32),
            out_smem=plgpu.SMEM((tiling.consumers, problem.tokens, indexer_tile.KEYS), jnp.float32)
            if problem.interpret
            else None,
            q_full=query_barrier,
            q_free=query_barrier,
            k_full=plgpu.Barrier(num_barriers=tiling.stages),
            k_free=plgpu.Barrier(num_arrivals=tiling.consumers, num_barriers=tiling.stages),
        ),
        grid=(problem.ctas,),
        grid_names=("cta",),
        num_threads=tiling.consumers + 1,
        thread_name="warpgroup",
        kernel_name="dsa_indexer_scores",
        interpret=problem.interpret,
    )(x.q, x.k, x.w, start, end, first[None], *shares, *scale)


def indexer_scores_op(q, k, w, ranges: KeyRange, k_scale, *, workspace_bytes: int):
    """`indexer_scores` by the signature of the reference; it needs no workspace."""
    del workspace_bytes
    return indexer_scores(q, k, w, ranges, k_scale)


def _kernel(
    q_gmem, k_gmem, w_gmem, start_gmem, end_gmem, window_gmem,
    first_gmem, after_gmem, first_block_gmem, last_block_gmem, *rest,
    problem: Problem,
    q_smem, k_smem, hidden_smem, out_smem, q_full, q_free, k_full, k_free,
):  # fmt: skip
    *scale_gmem, out_gmem = rest
    scale_gmem = scale_gmem[0] if scale_gmem else None
    tiling, tokens, heads = problem.tiling, problem.tokens, problem.heads
    fill, interpret = problem.fill, problem.interpret is not None
    block_queries = problem.block
    blocks_of_row = pl.cdiv(problem.queries, block_queries)
    tiles, parts = pl.cdiv(problem.keys, tiling.keys), tiling.keys // indexer_tile.KEYS
    window = window_gmem[0]
    warpgroup = lax.axis_index("warpgroup")
    cta = lax.axis_index("cta")
    shares = tile_shares.Shares(first_gmem, after_gmem, first_block_gmem, last_block_gmem)

    def over_blocks(body):
        """`body(i, batch, token, first tile, tiles, from, to, step)` for each block."""

        def one(i, block, tiles, low, high, step):
            batch = lax.div(block, blocks_of_row)
            token = lax.rem(block, blocks_of_row) * block_queries
            body(i, batch, token, first_gmem[block], tiles, low, high, step)

        return tile_shares.over_blocks(shares, cta, problem.ctas, one)

    @pl.when(warpgroup == tiling.consumers)
    def _produce():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        if fill:
            hidden_smem[...] = jnp.full_like(hidden_smem, -jnp.inf)
            plgpu.commit_smem()

        def block(i, batch, token, first, count, low, high, step):
            slot = lax.rem(i, tiling.query_buffers)

            @pl.when(i >= tiling.query_buffers)
            def _():
                plgpu.barrier_wait(q_free.at[slot])

            for consumer in range(tiling.consumers):
                row = (window + token + consumer * tokens) * heads
                plgpu.copy_gmem_to_smem(
                    q_gmem.at[batch, pl.ds(row, indexer_tile.COLUMNS)],
                    q_smem.at[slot, consumer],
                    q_full.at[slot],
                )

            # So many dead tiles go with each live one that none is left after the last.
            portion = lax.div(tiles - 1, count)

            def load(j, _):
                at = step + j
                slot = lax.rem(at, tiling.stages)

                @pl.when(at >= tiling.stages)
                def _():
                    plgpu.barrier_wait(k_free.at[slot])

                key = (first + low + j) * tiling.keys
                plgpu.copy_gmem_to_smem(
                    k_gmem.at[batch, pl.ds(key, tiling.keys)], k_smem.at[slot], k_full.at[slot]
                )
                if fill:
                    hide(batch, token, first, count, portion, low + j)

            lax.fori_loop(0, high - low, load, None)

        def hide(batch, token, first, count, portion, j):
            """The dead tiles that go with live tile j of `count`."""
            dead = tiles - count

            def one(i, _):
                tile = jnp.where(i < first, i, i + count)
                for part in range(parts):
                    key = tile * tiling.keys + part * indexer_tile.KEYS
                    keys = pl.ds(key, indexer_tile.KEYS)
                    plgpu.copy_smem_to_gmem(
                        hidden_smem, out_gmem.at[batch, pl.ds(token, block_queries), keys]
                    )

            lax.fori_loop(
                jnp.minimum(j * portion, dead), jnp.minimum((j + 1) * portion, dead), one, None
            )

        blocks, steps = over_blocks(block)
        for slot in range(tiling.stages):
            pl.when(slot < steps)(lambda slot=slot: plgpu.barrier_wait(k_free.at[slot]))
        for slot in range(tiling.query_buffers):
            pl.when(slot < blocks)(lambda slot=slot: plgpu.barrier_wait(q_free.at[slot]))
        if fill:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup < tiling.consumers)
    def _consume():
        plgpu.set_max_registers(_consumer_registers(tiling.consumers), action="increase")
        mine = warpgroup * tokens
        if not interpret:

            @pl.when(warpgroup == tiling.consumers - 1)
            def _():
                indexer_tile.start_turns(tiling.consumers)

        def block(i, batch, token, first, count, low, high, step):
            del count
            token = token + mine
            columns = pl.ds((window + token) * heads, indexer_tile.COLUMNS)
            weights = plgpu.load(
                w_gmem.at[batch, columns], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
            )
            seen = load_ranges(batch, token)
            q_slot = lax.rem(i, tiling.query_buffers)
            plgpu.barrier_wait(q_full.at[q_slot])

            plgpu.barrier_wait(k_full.at[lax.rem(step, tiling.stages)])

            def tile(j, _):
                slot = lax.rem(step + j, tiling.stages)
                for part in range(parts):
                    key = (first + low + j) * tiling.keys + part * indexer_tile.KEYS
                    scales = load_scales(batch, key)
                    dots = multiply(k_smem.at[slot], part, q_smem.at[q_slot, warpgroup])
                    if part == parts - 1:  # while the tensor cores work
                        pl.when(j + 1 < high - low)(
                            lambda: plgpu.barrier_wait(
                                k_full.at[lax.rem(step + j + 1, tiling.stages)]
                            )
                        )
                    store(dots, weights, seen, scales, batch, token, key)
                plgpu.barrier_arrive(k_free.at[slot])

            lax.fori_loop(0, high - low, tile, None)
            plgpu.barrier_arrive(q_free.at[q_slot])

        def load_ranges(batch, token):
            if interpret:
                some = pl.ds(token, tokens)
                start = start_gmem[batch, some]
                return start, jnp.maximum(end_gmem[batch, some] - start, 0)
            return indexer_tile.load_ranges(start_gmem, end_gmem, batch, token, tokens)

        def load_scales(batch, key):
            if scale_gmem is None:
                return None
            if interpret:
                return scale_gmem[batch, pl.ds(key, indexer_tile.KEYS)]
            return indexer_tile.load_scales(scale_gmem, batch, key)

        def multiply(k_tile, part, q_tile):
            if interpret:
                return indexer_tile.multiply_interpretable(k_tile, part, q_tile)
            return indexer_tile.multiply(
                k_tile, part, q_tile, warpgroup, consumers=tiling.consumers
            )

        def store(dots, weights, seen, scales, batch, token, key):
            if not interpret:
                return indexer_tile.store_scores(
                    dots, weights, *seen, scales, out_gmem, batch, token, key,
                    heads=heads, keys=problem.keys, queries=problem.queries,
                )  # fmt: skip
            scores = indexer_tile.scores_interpretable(
                dots, weights, *seen, scales, key, heads=heads
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[warpgroup] = scores
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out_smem.at[warpgroup],
                out_gmem.at[batch, pl.ds(token, tokens), pl.ds(key, indexer_tile.KEYS)],
            )

        over_blocks(block)
        if interpret:
            plgpu.wait_smem_to_gmem(0)


def _pad(x, axis: int, size: int):
    if x.shape[axis] >= size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def sm_count() -> int:
    """How many SMs the device has."""
    device = jax.devices()[0]
    return getattr(device, "core_count", _DEFAULT_SMS) if device.platform == "gpu" else _DEFAULT_SMS
