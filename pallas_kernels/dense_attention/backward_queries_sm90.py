# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Dense attention on Hopper, backward: the gradient of the queries.

    P = exp(scale q k - lse)    dS = P (dout v - delta)    dq = scale sum_s dS k

with delta = out . dout - dlse of each query. The schedule is the forward's: 128 queries of a head
a CTA, 64 a consumer, through the tiles of keys that any of them sees; the two consumers take
turns. The softmax is rebuilt from lse, so that no query waits for another and the sum over keys
has one order.

Shared memory at 192/128: q 48 KiB (dq leaves through it), dout 32 KiB, three stages of 64 keys and
values, 120 KiB. Registers of a consumer thread: 96 of dq, 32 each of scores and of dout v.
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
from pallas_kernels.hopper.wgmma import Product, multiply_add
from pallas_kernels.types import KeyRange

ROWS = 64  # queries of a consumer
CONSUMERS = 2
BLOCK = ROWS * CONSUMERS
TILE = 64  # keys
STAGES = 3
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 240, 24


class _Scratch(NamedTuple):
    q: Any  # [consumers x chunks, 64, 64]: queries, then their gradient
    dout: Any  # [consumers, 64, V]
    k: Any  # [stages, 64, P+R]
    v: Any  # [stages, 64, V]
    own_full: Any
    full: Any
    free: Any
    turn: Any


def gradient(q, k, v, ranges: KeyRange, lse, delta, dout, *, scale: float, interpret: Any = None):
    """dq `[B, T, N, P+R]`.

    Args:
        q, k, v, dout: as in `dense_attention`, bf16; rows in whole groups of 8.
        ranges: the keys each query may see.
        lse: f32 `[B, N, T']` in base 2, inf where a query sees nothing; T' whole blocks.
        delta: f32 `[B, N, T']`.
        scale: factor of the dot products.
        interpret: parameters of the GPU interpreter, or None.
    """
    batch, queries, heads, width = q.shape
    keys, value_width = v.shape[1], v.shape[3]
    rows, tiles = key_tiles.plan(ranges, keys=keys, block=BLOCK, tile=TILE)
    blocks, chunks = pl.cdiv(queries, BLOCK), width // CHUNK
    to_log2 = scale * LOG2E

    def body(q, k, v, dout, lse, delta, start, end, *refs, **scratch):
        tiles, dq = key_tiles.Tiles(*refs[:-1]), refs[-1]
        smem = _Scratch(**{name[1:]: ref for name, ref in scratch.items()})
        head_of_batch = lax.div(lax.axis_index("cta"), blocks)
        block = blocks - 1 - lax.rem(lax.axis_index("cta"), blocks)
        batch, head = lax.div(head_of_batch, heads), lax.rem(head_of_batch, heads)
        work = tiles.at(batch, block)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == CONSUMERS)
        def _():
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            _produce(k.at[batch, :, head], v.at[batch, :, head], work, smem)

        @pl.when(warpgroup < CONSUMERS)
        def _():
            plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            rows = pl.ds(block * BLOCK + warpgroup * ROWS, ROWS)
            full = smem.own_full.at[warpgroup]
            for i in range(chunks):
                some = q.at[batch, rows, head, pl.ds(i * CHUNK, CHUNK)]
                plgpu.copy_gmem_to_smem(some, smem.q.at[warpgroup * chunks + i], full)
            plgpu.copy_gmem_to_smem(dout.at[batch, rows, head], smem.dout.at[warpgroup], full)
            row = functools.partial(
                plgpu.load, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
            )
            of_rows = _OfRows(
                row(lse.at[batch, head, rows]),
                row(delta.at[batch, head, rows]),
                row(start.at[batch, rows]),
                row(end.at[batch, rows]),
            )
            plgpu.barrier_wait(full)
            total = _consume(warpgroup, of_rows, work, smem, chunks, to_log2, interpret is not None)
            for i in range(chunks):
                part = total[:, i * CHUNK : (i + 1) * CHUNK] * scale
                smem.q.at[warpgroup * chunks + i][...] = part.astype(q.dtype)
            plgpu.commit_smem()
            for i in range(chunks):
                some = dq.at[batch, rows, head, pl.ds(i * CHUNK, CHUNK)]
                plgpu.copy_smem_to_gmem(smem.q.at[warpgroup * chunks + i], some)
            plgpu.wait_smem_to_gmem(0)

    scratch = _Scratch(
        q=plgpu.SMEM((CONSUMERS * chunks, ROWS, CHUNK), q.dtype, transforms=SWIZZLED),
        dout=plgpu.SMEM((CONSUMERS, ROWS, value_width), q.dtype, transforms=SWIZZLED),
        k=plgpu.SMEM((STAGES, TILE, width), q.dtype, transforms=SWIZZLED),
        v=plgpu.SMEM((STAGES, TILE, value_width), q.dtype, transforms=SWIZZLED),
        own_full=plgpu.Barrier(num_arrivals=chunks + 1, num_barriers=CONSUMERS),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        turn=plgpu.Barrier(num_barriers=CONSUMERS),
    )
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types={f"_{name}": value for name, value in scratch._asdict().items()},
        grid=(batch * heads * blocks,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="dsa_dense_attention_dq",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, dout, lse, delta, *rows, *tiles)


class _OfRows(NamedTuple):
    """What belongs to a consumer's queries."""

    lse: Any
    delta: Any
    start: Any
    end: Any


def _produce(k, v, work: key_tiles.Work, smem: _Scratch):
    """Streams the tiles of keys and values."""

    def load(step, _):
        slot = lax.rem(step, STAGES)
        keys = pl.ds((work.first + step) * TILE, TILE)
        pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
        plgpu.copy_gmem_to_smem(k.at[keys], smem.k.at[slot], smem.full.at[slot])
        plgpu.copy_gmem_to_smem(v.at[keys], smem.v.at[slot], smem.full.at[slot])

    lax.fori_loop(0, work.count, load, None)
    for slot in range(STAGES):
        pl.when(slot < work.count)(lambda slot=slot: plgpu.barrier_wait(smem.free.at[slot]))


def _consume(warpgroup, rows: _OfRows, work, smem: _Scratch, chunks, to_log2, interpret):
    """`sum_s dS k` of a consumer's queries: f32 [64, P+R]."""
    shape = (ROWS, TILE)

    def zeros(columns):
        return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)

    def wide(x):
        return lax.broadcast_in_dim(x, shape, [0])

    def step(j, total):
        slot = lax.rem(j, STAGES)
        plgpu.barrier_wait(smem.full.at[slot])
        plgpu.barrier_wait(smem.turn.at[warpgroup])
        steps = [
            Product(
                0, smem.q.at[warpgroup * chunks + i], smem.k.at[slot, :, pl.ds(i * CHUNK, CHUNK)].T
            )
            for i in range(chunks)
        ]
        steps += [
            Product(1, smem.dout.at[warpgroup], smem.v.at[slot].T),
            functools.partial(plgpu.barrier_arrive, smem.turn.at[1 - warpgroup]),
        ]
        scores, dweights = multiply_add([zeros(TILE)] * 2, steps, interpret)
        key = (work.first + j) * TILE
        scores = lax.cond(
            work.whole(j),
            lambda x: x,
            lambda x: key_tiles.mask(x, key, rows.start, rows.end),
            scores,
        )
        weights = jnp.exp2(scores * to_log2 - wide(rows.lse))
        dscores = (weights * (dweights - wide(rows.delta))).astype(jnp.bfloat16)
        [total] = multiply_add([total], [Product(0, dscores, smem.k.at[slot])], interpret)
        plgpu.barrier_arrive(smem.free.at[slot])
        return total

    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(smem.turn.at[0]))
    total = lax.fori_loop(0, work.count, step, zeros(chunks * CHUNK))
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(smem.turn.at[0]))
    return total
