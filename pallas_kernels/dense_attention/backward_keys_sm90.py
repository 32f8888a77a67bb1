# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Dense attention on Hopper, backward: the gradients of keys and values.

    P  = exp(scale q k - lse)      dS = P (dout v - delta)
    dk = scale sum_t dS q          dv = sum_t P dout

A CTA takes 128 keys of a head, 64 a consumer, and goes through the queries from the first to the
last that see any of them, 64 at a time. Keys are the rows of its products, so that P and dS come
out transposed, as the left factors of dv and dk, and stay in registers. Each sum over queries has
one order: the result is the same in every run.

Shared memory at 192/128: k 48 KiB and v 32 KiB (dk and dv leave through them), three stages of 64
queries and their dout, 120 KiB. Registers of a consumer thread: 96 of dk, 64 of dv, 32 each of
scores and of dout v.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dense_attention import key_tiles
from pallas_kernels.hopper.tiles import CHUNK, LOG2E, SWIZZLED
from pallas_kernels.hopper.wgmma import Product, multiply, multiply_add
from pallas_kernels.types import KeyRange

ROWS = 64  # keys of a consumer
CONSUMERS = 2
BLOCK = ROWS * CONSUMERS
TILE = 64  # queries
STAGES = 3
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 240, 24


class _Scratch(NamedTuple):
    k: Any  # [consumers x chunks, 64, 64]: keys, then their gradient
    v: Any  # [consumers x chunks, 64, 64]: values, then theirs
    q: Any  # [stages, 64, P+R]
    dout: Any  # [stages, 64, V]
    lse: Any  # [stages, 64]
    delta: Any  # [stages, 64]
    own_full: Any
    full: Any
    free: Any
    turn: Any


class _Problem(NamedTuple):
    heads: int
    blocks: int
    key_chunks: int
    value_chunks: int
    scale: float
    interpret: bool


def gradient(q, k, v, ranges: KeyRange, lse, delta, dout, *, scale: float, interpret: Any = None):
    """`(dk [B, S, N, P+R], dv [B, S, N, V])`: arguments as in `backward_queries_sm90`."""
    batch, _, heads, width = q.shape
    keys, value_width = v.shape[1], v.shape[3]
    rows, tiles = key_tiles.plan_queries(ranges, keys=keys, block=BLOCK, tile=TILE)
    key_chunks, value_chunks = width // CHUNK, value_width // CHUNK
    problem = _Problem(
        heads, pl.cdiv(keys, BLOCK), key_chunks, value_chunks, scale, interpret is not None
    )
    own = [(CONSUMERS * chunks, ROWS, CHUNK) for chunks in (key_chunks, value_chunks)]
    scratch = _Scratch(
        k=plgpu.SMEM(own[0], q.dtype, transforms=SWIZZLED),
        v=plgpu.SMEM(own[1], q.dtype, transforms=SWIZZLED),
        q=plgpu.SMEM((STAGES, TILE, width), q.dtype, transforms=SWIZZLED),
        dout=plgpu.SMEM((STAGES, TILE, value_width), q.dtype, transforms=SWIZZLED),
        lse=plgpu.SMEM((STAGES, TILE), jnp.float32),
        delta=plgpu.SMEM((STAGES, TILE), jnp.float32),
        own_full=plgpu.Barrier(num_arrivals=key_chunks + value_chunks, num_barriers=CONSUMERS),
        full=plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        turn=plgpu.Barrier(num_barriers=CONSUMERS),
    )
    return plgpu.kernel(
        functools.partial(_body, problem),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
        scratch_types={f"_{name}": value for name, value in scratch._asdict().items()},
        grid=(batch * heads * problem.blocks,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="dsa_dense_attention_dkv",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, dout, lse, delta, *rows, *tiles)


def _body(p: _Problem, q, k, v, dout, lse, delta, start, end, *refs, **scratch):
    tiles, (dk, dv) = key_tiles.QueryTiles(*refs[:-2]), refs[-2:]
    smem = _Scratch(**{name[1:]: ref for name, ref in scratch.items()})
    # The first keys, which most queries see under a causal range, come first.
    head_of_batch, block = (op(lax.axis_index("cta"), p.blocks) for op in (lax.div, lax.rem))
    batch, head = lax.div(head_of_batch, p.heads), lax.rem(head_of_batch, p.heads)
    first, count = tiles.first[batch, block], tiles.count[batch, block]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        sources = (
            q.at[batch, :, head], dout.at[batch, :, head], lse.at[batch, head],
            delta.at[batch, head],
        )  # fmt: skip
        _produce(sources, first, count, smem)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        key = block * BLOCK + warpgroup * ROWS
        parts = [
            (array, gradient, ref.at[warpgroup * chunks + i], pl.ds(i * CHUNK, CHUNK))
            for array, gradient, ref, chunks in (
                (k, dk, smem.k, p.key_chunks),
                (v, dv, smem.v, p.value_chunks),
            )
            for i in range(chunks)
        ]
        full = smem.own_full.at[warpgroup]
        for array, _, ref, columns in parts:
            plgpu.copy_gmem_to_smem(array.at[batch, pl.ds(key, ROWS), head, columns], ref, full)
        plgpu.barrier_wait(full)

        def queries(j):
            tile = first + j
            some = (batch, pl.ds(tile * TILE, TILE))
            low, high = tiles.last_start[batch, tile], tiles.first_end[batch, tile]
            whole = (low <= key) & (high >= key + ROWS)
            return whole, start.at[some], end.at[some]

        sums = _consume(p, warpgroup, key, count, queries, smem)
        chunks = [
            total[:, i * CHUNK : (i + 1) * CHUNK] * factor
            for total, factor, count in zip(
                sums, (p.scale, 1.0), (p.key_chunks, p.value_chunks), strict=True
            )
            for i in range(count)
        ]
        for (_, _, ref, _), chunk in zip(parts, chunks, strict=True):
            ref[...] = chunk.astype(k.dtype)
        plgpu.commit_smem()
        for _, gradient, ref, columns in parts:
            plgpu.copy_smem_to_gmem(ref, gradient.at[batch, pl.ds(key, ROWS), head, columns])
        plgpu.wait_smem_to_gmem(0)


def _produce(sources, first, count, smem: _Scratch):
    """Streams the tiles of queries, with their dout, lse and delta."""

    def load(step, _):
        slot = lax.rem(step, STAGES)
        rows = pl.ds((first + step) * TILE, TILE)
        pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
        targets = (smem.q, smem.dout, smem.lse, smem.delta)
        for source, target in zip(sources, targets, strict=True):
            plgpu.copy_gmem_to_smem(source.at[rows], target.at[slot], smem.full.at[slot])

    lax.fori_loop(0, count, load, None)
    for slot in range(STAGES):
        pl.when(slot < count)(lambda slot=slot: plgpu.barrier_wait(smem.free.at[slot]))


def _consume(p: _Problem, warpgroup, key, count, queries, smem: _Scratch):
    """`(sum_t dS q [64, P+R], sum_t P dout [64, V])` of a consumer's keys, fp32."""
    shape = (ROWS, TILE)
    column = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

    def zeros(columns):
        return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)

    def tall(x):
        return lax.broadcast_in_dim(x, shape, [1])

    def mask(scores, start, end):
        keys = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + key
        seen = (keys >= tall(column(start))) & (keys < tall(column(end)))
        return jnp.where(seen, scores, -jnp.inf)

    def products(own, streamed, slot, chunks):
        return [
            (
                own.at[warpgroup * chunks + i],
                streamed.at[slot, :, pl.ds(i * CHUNK, CHUNK)].T,
            )
            for i in range(chunks)
        ]

    def step(j, totals):
        slot = lax.rem(j, STAGES)
        plgpu.barrier_wait(smem.full.at[slot])
        whole, start, end = queries(j)
        plgpu.barrier_wait(smem.turn.at[warpgroup])
        steps = [
            *products(smem.k, smem.q, slot, p.key_chunks),
            functools.partial(plgpu.barrier_arrive, smem.turn.at[1 - warpgroup]),
        ]
        scores = multiply(shape, steps, p.interpret)
        scores = lax.cond(whole, lambda x: x, lambda x: mask(x, start, end), scores)
        weights = jnp.exp2(scores * (p.scale * LOG2E) - tall(column(smem.lse.at[slot])))
        weights, *totals = lax.optimization_barrier((weights.astype(jnp.bfloat16), *totals))
        dweights = multiply(shape, products(smem.v, smem.dout, slot, p.value_chunks), p.interpret)
        dscores = weights.astype(jnp.float32) * (dweights - tall(column(smem.delta.at[slot])))
        dscores = dscores.astype(jnp.bfloat16)
        added = [Product(0, dscores, smem.q.at[slot]), Product(1, weights, smem.dout.at[slot])]
        totals = multiply_add(totals, added, p.interpret)
        plgpu.barrier_arrive(smem.free.at[slot])
        return tuple(totals)

    start = tuple(zeros(chunks * CHUNK) for chunks in (p.key_chunks, p.value_chunks))
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(smem.turn.at[0]))
    totals = lax.fori_loop(0, count, step, start)
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(smem.turn.at[0]))
    return totals
