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

Where a batch row has no more queries than one consumer holds, as in decoding, that would multiply
padding: then a block is 128 / I queries, all consumers read them, and each takes a quarter of every
tile of keys. What bounds it is reading the keys.

Shared memory: queries, two blocks where they fit (2 x 64 KiB at 64 x 128 e4m3), a ring of key
tiles in the rest. Registers: 112 a consumer thread (64 accumulators, 32 weights), 32 a producer's.

Scores outside a query's range are -inf. In live tiles the consumers write them; the rest is filled
from a constant tile by TMA stores that the producer interleaves with its loads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import indexer_tile
from pallas_kernels.lightning_indexer import tile_shares
from pallas_kernels.lightning_indexer.scores_operands import (
    Operands,
    Problem,
    Tiling,
    default_tiling,
    operands,
    round_up,
    sm_count,
)
from pallas_kernels.types import KeyRange

_PRODUCER_REGISTERS = 32


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
    interpret: Any = None,
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
    batch, queries, heads, width = q.shape
    if 0 in (batch, queries, k.shape[1]):
        return jnp.zeros((batch, queries, k.shape[1]), jnp.float32)
    tiling = tiling or default_tiling(heads, width, q.dtype, queries)
    problem = Problem(k.shape[1], heads, queries, tiling, ctas or sm_count(), fill, interpret)
    x = operands(q, k, w, ranges, k_scale, problem)
    window = jax.tree.map(lambda leaf: leaf[0], windows(x, problem))
    return score_window(x, window, problem)[..., : problem.keys]


def indexer_scores_op(q, k, w, ranges: KeyRange, k_scale, *, workspace_bytes: int):
    """`indexer_scores` by the signature of the reference; it needs no workspace."""
    del workspace_bytes
    return indexer_scores(q, k, w, ranges, k_scale)


class Window(NamedTuple):
    """What a launch works on, beside the operands; all windows together have one axis more."""

    first: jax.Array  # i32 [1], its first query
    start: jax.Array  # i32 [B, rows], of its queries, in whole blocks
    end: jax.Array
    shares: tile_shares.Shares


def windows(x: Operands, problem: Problem) -> Window:
    """All windows of `problem.queries` queries, and who does what in each."""
    rows = round_up(problem.queries, problem.block)
    start, end = (jnp.moveaxis(b.reshape(b.shape[0], -1, rows), 1, 0) for b in (x.start, x.end))
    cut = functools.partial(
        tile_shares.cut,
        block=problem.block, tile=problem.tiling.keys, keys=problem.keys, ctas=problem.ctas,
    )  # fmt: skip
    first = jnp.arange(start.shape[0], dtype=jnp.int32)[:, None] * problem.queries
    return Window(first, start, end, jax.vmap(cut)(start, end))


def score_window(x: Operands, window: Window, problem: Problem):
    """Scores of a window's `problem.queries` queries: f32 `[B, queries, S']`.

    S' is S rounded up to four, for TMA's 16 bytes; the columns beyond S are undefined.
    """
    batch, tiling = x.q.shape[0], problem.tiling
    inputs = _Inputs(x.q, x.k, x.w, window.start, window.end, window.first, *window.shares)
    scale = () if x.k_scale is None else (x.k_scale,)

    def body(*refs, **scratch):
        *refs, out = refs
        inputs, scale = _Inputs(*refs[: len(_Inputs._fields)]), refs[len(_Inputs._fields) :]
        kernel = _Kernel(problem, inputs, scale[0] if scale else None, out, _Scratch(**scratch))
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == tiling.consumers)(kernel.produce)
        pl.when(warpgroup < tiling.consumers)(kernel.consume)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (batch, problem.queries, round_up(problem.keys, 4)), jnp.float32
        ),
        scratch_types=_scratch(problem, x)._asdict(),
        grid=(problem.ctas,),
        grid_names=("cta",),
        num_threads=tiling.consumers + 1,
        thread_name="warpgroup",
        kernel_name="dsa_indexer_scores",
        interpret=problem.interpret,
    )(*inputs, *scale)


class _Inputs(NamedTuple):
    """Arrays in global memory, beside the key scales."""

    q: Any  # [B, T' * I, H]
    k: Any  # [B, S', H]
    w: Any  # f32 [B, T'' * I]
    start: Any  # i32 [B, window]
    end: Any
    window: Any  # i32 [1], the query at which the window starts
    first: Any  # the fields of `Shares`
    after: Any
    first_block: Any
    last_block: Any


class _Scratch(NamedTuple):
    """Shared memory and barriers."""

    q: Any  # [query buffers, consumers, 128, H]
    k: Any  # [stages, keys, H]
    k_scale: Any  # f32 [stages, keys], or None
    hidden: Any  # [block, 64] of -inf
    staging: Any  # the consumers' scores, in interpret mode
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any


def _scratch(problem: Problem, x: Operands) -> _Scratch:
    tiling, width, dtype = problem.tiling, x.q.shape[-1], x.q.dtype
    scales = None if x.k_scale is None else plgpu.SMEM((tiling.stages, tiling.keys), jnp.float32)
    swizzled = indexer_tile.transforms(width, dtype)
    groups = 1 if tiling.shared else tiling.consumers
    q_full, q_free = (
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiling.query_buffers)
        for arrivals in (groups, tiling.consumers)
    )
    staging = (tiling.consumers, problem.tokens, indexer_tile.KEYS)
    queries = (tiling.query_buffers, groups, indexer_tile.COLUMNS, width)
    return _Scratch(
        q=plgpu.SMEM(queries, dtype, transforms=swizzled),
        k=plgpu.SMEM((tiling.stages, tiling.keys, width), dtype, transforms=swizzled),
        k_scale=scales,
        hidden=plgpu.SMEM((problem.block, indexer_tile.KEYS), jnp.float32),
        staging=plgpu.SMEM(staging, jnp.float32) if problem.interpret else None,
        q_full=q_full,
        q_free=q_free,
        k_full=plgpu.Barrier(num_arrivals=1 if scales is None else 2, num_barriers=tiling.stages),
        k_free=plgpu.Barrier(num_arrivals=tiling.consumers, num_barriers=tiling.stages),
    )


def _consumer_registers(consumers: int) -> int:
    """What the register file leaves a consumer thread; 112 for four warpgroups of them."""
    at_launch = 65536 // (128 * (consumers + 1)) // 8 * 8
    return ((consumers + 1) * at_launch - _PRODUCER_REGISTERS) // consumers // 8 * 8


class _Piece(NamedTuple):
    """The part of a block of queries that falls to this CTA: live tiles `low` to `high` of it."""

    i: Any  # the how many-th block of this CTA
    batch: Any
    token: Any  # its first query, in the window
    first: Any  # its first live tile of keys
    live: Any  # how many are live
    low: Any
    high: Any
    step: Any  # tiles of this CTA before it


class _Kernel:
    """The program of a CTA."""

    def __init__(self, problem: Problem, inputs: _Inputs, k_scale, out, scratch: _Scratch):
        self.problem, self.tiling = problem, problem.tiling
        self.gmem, self.k_scale, self.out, self.smem = inputs, k_scale, out, scratch
        self.interpret = problem.interpret is not None
        self.parts = problem.tiling.keys // indexer_tile.KEYS
        self.window = inputs.window[0]

    def over_pieces(self, body: Callable[[_Piece], None]):
        """Calls `body` for each block of this CTA's share; returns how many, and their tiles."""
        blocks_of_row = pl.cdiv(self.problem.queries, self.problem.block)
        shares = tile_shares.Shares(*self.gmem[-len(tile_shares.Shares._fields) :])

        def one(i, block, live, low, high, step):
            batch = lax.div(block, blocks_of_row)
            token = lax.rem(block, blocks_of_row) * self.problem.block
            body(_Piece(i, batch, token, shares.first[block], live, low, high, step))

        return tile_shares.over_blocks(shares, lax.axis_index("cta"), self.problem.ctas, one)

    def produce(self):
        """The producer: queries of each block, its keys, and -inf for what it does not see."""
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        smem = self.smem
        if self.problem.fill:
            smem.hidden[...] = jnp.full_like(smem.hidden, -jnp.inf)
            plgpu.commit_smem()

        def piece(x: _Piece):
            self.load_queries(x)
            # So many dead tiles go with each live one that none is left after the last.
            portion = lax.div(pl.cdiv(self.problem.keys, self.tiling.keys) - 1, x.live)

            def tile(j, _):
                self.load_keys(x, j)
                if self.problem.fill:
                    self.hide(x, portion, x.low + j)

            lax.fori_loop(0, x.high - x.low, tile, None)

        pieces, steps = self.over_pieces(piece)
        for slot in range(self.tiling.stages):
            pl.when(slot < steps)(lambda slot=slot: plgpu.barrier_wait(smem.k_free.at[slot]))
        for slot in range(self.tiling.query_buffers):
            pl.when(slot < pieces)(lambda slot=slot: plgpu.barrier_wait(smem.q_free.at[slot]))
        if self.problem.fill:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def load_queries(self, x: _Piece):
        """The queries of a block, a warpgroup's at a time."""
        smem, slot = self.smem, lax.rem(x.i, self.tiling.query_buffers)
        pl.when(x.i >= self.tiling.query_buffers)(lambda: plgpu.barrier_wait(smem.q_free.at[slot]))
        for group in range(self.problem.block // self.problem.tokens):
            token = self.window + x.token + group * self.problem.tokens
            rows = pl.ds(token * self.problem.heads, indexer_tile.COLUMNS)
            plgpu.copy_gmem_to_smem(
                self.gmem.q.at[x.batch, rows], smem.q.at[slot, group], smem.q_full.at[slot]
            )

    def load_keys(self, x: _Piece, j):
        """The j-th tile of keys of a piece."""
        smem, step = self.smem, x.step + j
        slot = lax.rem(step, self.tiling.stages)
        pl.when(step >= self.tiling.stages)(lambda: plgpu.barrier_wait(smem.k_free.at[slot]))
        keys = pl.ds((x.first + x.low + j) * self.tiling.keys, self.tiling.keys)
        plgpu.copy_gmem_to_smem(
            self.gmem.k.at[x.batch, keys], smem.k.at[slot], smem.k_full.at[slot]
        )
        if self.k_scale is not None:
            plgpu.copy_gmem_to_smem(
                self.k_scale.at[x.batch, keys], smem.k_scale.at[slot], smem.k_full.at[slot]
            )

    def hide(self, x: _Piece, portion, j):
        """Fills the dead tiles that go with live tile j of a block."""
        dead = pl.cdiv(self.problem.keys, self.tiling.keys) - x.live
        rows = pl.ds(x.token, self.problem.block)

        def fill(i, _):
            tile = jnp.where(i < x.first, i, i + x.live)
            for part in range(self.parts):
                key = tile * self.tiling.keys + part * indexer_tile.KEYS
                plgpu.copy_smem_to_gmem(
                    self.smem.hidden, self.out.at[x.batch, rows, pl.ds(key, indexer_tile.KEYS)]
                )

        low, high = jnp.minimum(j * portion, dead), jnp.minimum((j + 1) * portion, dead)
        lax.fori_loop(low, high, fill, None)

    def consume(self):
        """A consumer: the scores of its queries."""
        consumers = self.tiling.consumers
        plgpu.set_max_registers(_consumer_registers(consumers), action="increase")
        warpgroup = lax.axis_index("warpgroup")
        if not self.interpret:
            pl.when(warpgroup == consumers - 1)(lambda: indexer_tile.start_turns(consumers))
        self.over_pieces(functools.partial(self.score, warpgroup))
        if self.interpret:
            plgpu.wait_smem_to_gmem(0)

    def score(self, warpgroup, x: _Piece):
        """A consumer's scores of a piece: all keys for its queries, or its keys for all."""
        smem, problem, shared = self.smem, self.problem, self.tiling.shared
        group = 0 if shared else warpgroup
        token = x.token + group * problem.tokens
        columns = pl.ds((self.window + token) * problem.heads, indexer_tile.COLUMNS)
        weights = plgpu.load(
            self.gmem.w.at[x.batch, columns],
            layout=plgpu.Layout.WGMMA.reduce(0),
            optimized=False,
        )
        start, length = indexer_tile.load_ranges(
            self.gmem.start, self.gmem.end, x.batch, token, problem.tokens, self.interpret
        )
        # Of a tile's keys all, or this consumer's.
        parts = self.parts // (self.tiling.consumers if shared else 1)
        first_row = warpgroup * (parts * indexer_tile.KEYS) if shared else 0
        rows = pl.ds(first_row, parts * indexer_tile.KEYS)
        q_slot = lax.rem(x.i, self.tiling.query_buffers)
        plgpu.barrier_wait(smem.q_full.at[q_slot])
        plgpu.barrier_wait(smem.k_full.at[lax.rem(x.step, self.tiling.stages)])

        def tile(j, _):
            slot, following = (
                lax.rem(x.step + j + ahead, self.tiling.stages) for ahead in range(2)
            )
            for part in range(parts):
                row = first_row + part * indexer_tile.KEYS
                key = (x.first + x.low + j) * self.tiling.keys + row
                scales = None
                if self.k_scale is not None:
                    tile_scales = smem.k_scale.at[slot, rows]
                    scales = indexer_tile.load_scales(tile_scales, part, self.interpret)
                dots = indexer_tile.multiply(
                    smem.k.at[slot, rows], part, smem.q.at[q_slot, group], warpgroup,
                    consumers=self.tiling.consumers, interpret=self.interpret,
                )  # fmt: skip
                if part == parts - 1:  # while the tensor cores work
                    pl.when(j + 1 < x.high - x.low)(
                        lambda: plgpu.barrier_wait(smem.k_full.at[following])
                    )
                indexer_tile.store_scores(
                    dots, weights, start, length, scales, self.out, x.batch, token, key,
                    heads=problem.heads, keys=problem.keys, queries=problem.queries,
                    staging=smem.staging.at[warpgroup] if self.interpret else None,
                )  # fmt: skip
            plgpu.barrier_arrive(smem.k_free.at[slot])

        lax.fori_loop(0, x.high - x.low, tile, None)
        plgpu.barrier_arrive(smem.q_free.at[q_slot])
