# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""What the warm-up loss teaches, on Hopper: the heads' attention summed, against the scores.

    p[t, s]  = sum_n exp(scale q[t, n] . k[s, n] - lse[t, n]) / N
    kl[t]    = sum_s p (log p - log softmax(score))
    d[t, s]  = g[t] (softmax(score) - p)

A CTA takes a tile of 128 queries and 192 keys through all heads, like a matrix product whose
accumulators are exponentiated and added up head by head: the 128 x 192 of p live in registers and
leave as 2 bytes a pair of the window's `d`. Two consumer warpgroups of 64 queries take turns, one
multiplies while the other exponentiates; a producer streams the operands in chunks of 64 columns.

lse normalises every head, so that the sum over the heads needs no other divisor than N. Masks
enter once, at the end: exp of a pair that is not seen may be inf, but is never used.

Shared memory: five stages of 40 KiB; `d` leaves through the consumer's own part of them. Registers:
240 a consumer thread (96 of scores, 96 of sums), 24 a producer's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.tiles import CHUNK, LOG2E, SWIZZLED
from pallas_kernels.hopper.wgmma import multiply

ROWS = 64  # queries of a consumer
CONSUMERS = 2
BLOCK = ROWS * CONSUMERS  # queries of a CTA
PAIR = 2 * BLOCK  # queries that are live or not together
TILE = 192  # keys
STAGES = 5
_TOGETHER = 8  # blocks of queries that go through all keys side by side
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 240, 24


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static of a call.

    Attributes:
        batch: B.
        heads: N.
        width: P+R, a multiple of 64.
        keys: S, whole tiles.
        queries: queries of a window, whole pairs of tiles.
        scale: factor of the dot products.
        gradient: whether `d` is wanted beside kl.
        interpret: parameters of the GPU interpreter, or None.
    """

    batch: int
    heads: int
    width: int
    keys: int
    queries: int
    scale: float
    gradient: bool
    interpret: Any = None


class Rows(NamedTuple):
    """What belongs to a query, and which tiles of keys are live for a pair of tiles of queries."""

    start: Any  # i32 [B, T']
    end: Any
    g: Any  # f32 [B, T']: gradient of kl
    first: Any  # i32 [B, T' / PAIR]: the first live tile
    count: Any  # how many are


class _Scratch(NamedTuple):
    q: Any  # [stages, consumers, 64, 64]; d in the end
    k: Any  # [stages, 192, 64]
    kl: Any  # [consumers, 64]
    full: Any
    free: Any
    turn: Any


def window(first, q, k, lse, scores, scores_lse, rows: Rows, problem: Problem):
    """`(kl parts f32 [B, S / 192, queries], d bf16 [B, queries, S] or None)` of a window.

    Both are undefined in tiles that are not live.

    Args:
        first: i32, the query at which the window starts, a multiple of `PAIR`.
        q: `[B, T, N, P+R]` bf16.
        k: `[B, S, N, P+R]` bf16.
        lse: f32 `[B, N, T']`, in base 2.
        scores: f32 `[B, queries, S]`, the indexer's; undefined in what a query does not see.
        scores_lse: f32 `[B, queries]`, natural.
        rows: of all queries, padded with queries that see nothing to whole windows.
        problem: what is static.
    """
    p = problem
    out_type = [jax.ShapeDtypeStruct((p.batch, p.keys // TILE, p.queries), jnp.float32)]
    if p.gradient:
        out_type.append(jax.ShapeDtypeStruct((p.batch, p.queries, p.keys), jnp.bfloat16))
    results = plgpu.kernel(
        functools.partial(_body, p),
        out_type=out_type,
        scratch_types=_Scratch(
            q=plgpu.SMEM((STAGES, CONSUMERS, ROWS, CHUNK), q.dtype, transforms=SWIZZLED),
            k=plgpu.SMEM((STAGES, TILE, CHUNK), q.dtype, transforms=SWIZZLED),
            kl=plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            full=plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
            turn=plgpu.Barrier(num_arrivals=CONSUMERS),
        )._asdict(),
        grid=(p.batch * (p.keys // TILE) * (p.queries // BLOCK),),
        grid_names=("tile",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="dsa_indexer_target",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=p.interpret,
    )(jnp.asarray(first, jnp.int32)[None], q, k, lse, scores, scores_lse, *rows)
    return results[0], results[1] if p.gradient else None


class _Place(NamedTuple):
    """Where a CTA works."""

    batch: Any
    row: Any  # in the window
    query: Any  # of all
    tile: Any


def _body(p: Problem, first, q, k, lse, scores, scores_lse, /, *refs, **scratch):
    rows, (kl, *d) = Rows(*refs[: len(Rows._fields)]), refs[len(Rows._fields) :]
    smem = _Scratch(**scratch)
    blocks, tiles = p.queries // BLOCK, p.keys // TILE
    i = lax.axis_index("tile")
    batch, i = lax.div(i, blocks * tiles), lax.rem(i, blocks * tiles)
    some = lax.div(i, _TOGETHER * tiles)
    i -= some * (_TOGETHER * tiles)
    together = jnp.minimum(_TOGETHER, blocks - some * _TOGETHER)
    tile = lax.div(i, together)
    row = (some * _TOGETHER + lax.rem(i, together)) * BLOCK
    origin = pl.multiple_of(first[0], PAIR)
    place = _Place(batch, row, origin + row, tile)
    of_all = lax.div(origin + row, PAIR)
    since = tile - rows.first[batch, of_all]
    live = (since >= 0) & (since < rows.count[batch, of_all])
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(live & (warpgroup == CONSUMERS))
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        _produce(p, q, k, place, smem)

    @pl.when(live & (warpgroup < CONSUMERS))
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        mass = _sum_heads(p, warpgroup, lse, place, smem)
        some = pl.ds(place.row + warpgroup * ROWS, ROWS)
        keys = pl.ds(place.tile * TILE, TILE)
        divergence, gradient = _compare(
            p, mass, warpgroup, scores.at[batch, some, keys], scores_lse, rows, place
        )
        smem.kl.at[warpgroup][...] = divergence
        if gradient is not None:
            for c in range(TILE // CHUNK):
                columns = slice(c * CHUNK, (c + 1) * CHUNK)
                smem.q.at[c, warpgroup][...] = gradient[:, columns].astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.kl.at[warpgroup], kl.at[batch, tile, some])
        if p.gradient:
            for c in range(TILE // CHUNK):
                columns = pl.ds(place.tile * TILE + c * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(smem.q.at[c, warpgroup], d[0].at[batch, some, columns])
        plgpu.wait_smem_to_gmem(0)


def _produce(p: Problem, q, k, place: _Place, smem: _Scratch):
    """Streams q and k, head by head, in chunks of columns."""
    chunks = p.width // CHUNK

    def head(n, _):
        for c in range(chunks):
            step = n * chunks + c
            slot = lax.rem(step, STAGES)
            pl.when(step >= STAGES)(lambda slot=slot: plgpu.barrier_wait(smem.free.at[slot]))
            columns = pl.ds(c * CHUNK, CHUNK)
            for consumer in range(CONSUMERS):
                some = pl.ds(place.query + consumer * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(
                    q.at[place.batch, some, n, columns],
                    smem.q.at[slot, consumer],
                    smem.full.at[slot],
                )
            plgpu.copy_gmem_to_smem(
                k.at[place.batch, pl.ds(place.tile * TILE, TILE), n, columns],
                smem.k.at[slot],
                smem.full.at[slot],
            )

    lax.fori_loop(0, p.heads, head, None)
    for slot in range(min(STAGES, p.heads * chunks)):
        plgpu.barrier_wait(smem.free.at[slot])


def _sum_heads(p: Problem, warpgroup, lse, place: _Place, smem: _Scratch):
    """The sum over heads of exp(scale q . k - lse): f32 [64, 192]."""
    chunks = p.width // CHUNK
    some = pl.ds(place.query + warpgroup * ROWS, ROWS)
    row = plgpu.Layout.WGMMA.reduce(1)

    def hand_over():
        plgpu.barrier_arrive(smem.turn)
        plgpu.barrier_wait(smem.turn)

    def load(n):
        return plgpu.load(lse.at[place.batch, n, some], layout=row, optimized=False)

    def head(n, carry):
        mass, bound = carry
        following = load(jnp.minimum(n + 1, p.heads - 1))  # a head ahead: it comes from far
        steps = []
        slots = [lax.rem(n * chunks + c, STAGES) for c in range(chunks)]
        for slot in slots:
            steps.append(functools.partial(plgpu.barrier_wait, smem.full.at[slot]))
            steps.append((smem.q.at[slot, warpgroup], smem.k.at[slot].T))
        steps.append(hand_over)
        for c, slot in enumerate(slots):
            steps.append(functools.partial(plgpu.wgmma_wait, chunks - 1 - c))
            steps.append(functools.partial(plgpu.barrier_arrive, smem.free.at[slot]))
        dots = multiply((ROWS, TILE), steps, p.interpret is not None)
        mass += jnp.exp2(dots * (p.scale * LOG2E) - lax.broadcast_in_dim(bound, dots.shape, [0]))
        mass = lax.optimization_barrier(mass)
        hand_over()
        return mass, following

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, TILE), jnp.float32), plgpu.Layout.WGMMA)
    pl.when(warpgroup == 1)(hand_over)
    mass, _ = lax.fori_loop(0, p.heads, head, (zeros, load(0)))
    pl.when(warpgroup == 0)(hand_over)
    return mass


def _compare(p: Problem, mass, warpgroup, scores, scores_lse, rows: Rows, place: _Place):
    """`(kl's part [64], d [64, 192])` of a tile."""
    row = plgpu.Layout.WGMMA.reduce(1)
    offset = warpgroup * ROWS
    here = (place.batch, pl.ds(place.row + offset, ROWS))
    of_all = (place.batch, pl.ds(place.query + offset, ROWS))

    def wide(x):
        return lax.broadcast_in_dim(x, mass.shape, [0])

    start, end, g = (
        plgpu.load(x.at[of_all], layout=row, optimized=False)
        for x in (rows.start, rows.end, rows.g)
    )
    log_sum = plgpu.load(scores_lse.at[here], layout=row, optimized=False)
    scores = plgpu.load(scores, layout=plgpu.Layout.WGMMA, optimized=False)
    columns = plgpu.broadcasted_iota(jnp.int32, mass.shape, 1, layout=plgpu.Layout.WGMMA)
    key = place.tile * TILE
    seen = (columns >= wide(start - key)) & (columns < wide(end - key))
    target = jnp.where(seen, mass * (1 / p.heads), 0.0)
    log_weight = jnp.where(seen, scores - wide(log_sum), 0.0)
    held = target > 0  # 0 log 0 = 0
    log_target = jnp.log(jnp.where(held, target, 1.0))
    divergence = jnp.where(held, target * (log_target - log_weight), 0.0).sum(axis=1)
    if not p.gradient:
        return divergence, None
    weight = jnp.where(seen, jnp.exp(log_weight), 0.0)
    return divergence, (weight - target) * wide(g)
