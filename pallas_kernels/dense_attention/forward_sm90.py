# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Dense attention on Hopper, forward: FlashAttention-3's schedule over key ranges.

One CTA takes 128 queries of one head: a producer warpgroup (one thread issues TMA) and two
consumer warpgroups of 64 queries each, which go through the tiles of keys that any of the 128
queries sees. They take turns: while one multiplies, the other computes its softmax, handing over
at a barrier between the two (`turn`). Tiles that every query sees whole are not masked.

CTAs of a head follow one another, so that its keys and values are read from L2; the last queries,
which see most under a causal range, come first.

Shared memory at 192/128: queries 48 KiB (the output leaves through them), two stages of 128 keys
and values, 160 KiB. Registers: 240 a consumer thread (64 of scores, 64 of output, 32 of weights in
bf16), 24 a producer's.
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

ROWS = 64  # queries of a consumer
CONSUMERS = 2
BLOCK = ROWS * CONSUMERS
STAGES = 2
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 240, 24
# Where the running maximum starts: finite, so that a row without keys has no inf - inf.
_NEVER = -1e30


def unsupported(q, v) -> str | None:
    """Why this kernel cannot serve such queries and values; None where it can."""
    if q.dtype != jnp.bfloat16:
        return f"q, k and v are {q.dtype}, the kernel takes bfloat16"
    for name, axis, width in (("q and k", "P+R", q.shape[-1]), ("v", "V", v.shape[-1])):
        if width % CHUNK or not CHUNK <= width <= 256:
            return (
                f"{name} have heads of width {axis} = {width}, the kernel takes multiples of "
                f"{CHUNK} up to 256"
            )
    return None


class _Problem(NamedTuple):
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    scale: float
    interpret: Any

    @property
    def tile(self) -> int:
        """Keys a tile: what registers and shared memory leave room for."""
        return 128 if self.value_width <= 128 and self.width <= 192 else 64

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.queries, BLOCK)


def forward(q, k, v, ranges: KeyRange, *, scale: float, workspace_bytes: int = 0):
    """`(out [B, T, N, V], lse [B, T, N])`, by the signature of the reference."""
    del workspace_bytes
    return attend(q, k, v, ranges, scale=scale)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def attend(q, k, v, ranges: KeyRange, *, scale: float, interpret: Any = None):
    """`(out [B, T, N, V], lse [B, T, N])`.

    Args:
        q: `[B, T, N, P+R]` bf16.
        k: `[B, S, N, P+R]` bf16.
        v: `[B, S, N, V]` bf16.
        ranges: the keys each query may see.
        scale: factor of the dot products.
        interpret: parameters of the GPU interpreter, or None.
    """
    batch, queries, heads, width = q.shape
    keys, value_width = v.shape[1], v.shape[3]
    if 0 in (batch, queries, heads, keys):
        lse = jnp.full((batch, queries, heads), -jnp.inf, jnp.float32)
        return jnp.zeros((batch, queries, heads, value_width), q.dtype), lse
    problem = _Problem(heads, queries, keys, width, value_width, scale, interpret)
    q = key_tiles.pad_rows(q, ROWS)
    k, v = (key_tiles.pad_rows(x, problem.tile) for x in (k, v))
    rows, tiles = key_tiles.plan(ranges, keys=keys, block=BLOCK, tile=problem.tile)
    chunks = max(width, value_width) // CHUNK
    kernel = plgpu.kernel(
        functools.partial(_body, problem),
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:3], value_width), q.dtype),
            # Whole blocks: a TMA store of a row starts at a multiple of 16 bytes.
            jax.ShapeDtypeStruct((batch, heads, problem.blocks * BLOCK), jnp.float32),
        ),
        scratch_types=_Scratch(
            q=plgpu.SMEM((CONSUMERS, chunks, ROWS, CHUNK), q.dtype, transforms=SWIZZLED),
            k=plgpu.SMEM((STAGES, problem.tile, width), q.dtype, transforms=SWIZZLED),
            v=plgpu.SMEM((STAGES, problem.tile, value_width), q.dtype, transforms=SWIZZLED),
            lse=plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=width // CHUNK, num_barriers=CONSUMERS),
            k_full=plgpu.Barrier(num_barriers=STAGES),
            v_full=plgpu.Barrier(num_barriers=STAGES),
            k_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
            v_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
            turn=plgpu.Barrier(num_arrivals=CONSUMERS),
        )._asdict(),
        grid=(batch * heads * problem.blocks,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="dsa_dense_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    out, lse = kernel(q, k, v, *rows, *tiles)
    return out[:, :queries], jnp.swapaxes(lse[..., :queries], 1, 2)


class _Scratch(NamedTuple):
    """Shared memory and barriers."""

    q: Any  # [consumers, chunks, 64, 64]: queries, then the output
    k: Any  # [stages, tile, P+R]
    v: Any  # [stages, tile, V]
    lse: Any  # [consumers, 64]
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any


def _body(problem: _Problem, *refs, **scratch):
    (q, k, v, start, end), tiles, (out, lse) = refs[:5], key_tiles.Tiles(*refs[5:-2]), refs[-2:]
    smem = _Scratch(**scratch)
    head_of_batch = lax.div(lax.axis_index("cta"), problem.blocks)
    block = problem.blocks - 1 - lax.rem(lax.axis_index("cta"), problem.blocks)
    batch, head = lax.div(head_of_batch, problem.heads), lax.rem(head_of_batch, problem.heads)
    work = tiles.at(batch, block)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        _produce(problem, k.at[batch, :, head], v.at[batch, :, head], work, smem)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        first = block * BLOCK + warpgroup * ROWS
        rows = pl.ds(first, ROWS)
        for i in range(problem.width // CHUNK):
            plgpu.copy_gmem_to_smem(
                q.at[batch, rows, head, pl.ds(i * CHUNK, CHUNK)],
                smem.q.at[warpgroup, i],
                smem.q_full.at[warpgroup],
            )
        bounds = [
            plgpu.load(x.at[batch, rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            for x in (start, end)
        ]
        plgpu.barrier_wait(smem.q_full.at[warpgroup])
        values, log_sum = _consume(problem, warpgroup, bounds, work, smem)
        for i in range(problem.value_width // CHUNK):
            smem.q.at[warpgroup, i][...] = values[:, i * CHUNK : (i + 1) * CHUNK].astype(q.dtype)
        smem.lse.at[warpgroup][...] = log_sum
        plgpu.commit_smem()
        for i in range(problem.value_width // CHUNK):
            plgpu.copy_smem_to_gmem(
                smem.q.at[warpgroup, i], out.at[batch, rows, head, pl.ds(i * CHUNK, CHUNK)]
            )
        plgpu.copy_smem_to_gmem(smem.lse.at[warpgroup], lse.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)


def _produce(problem: _Problem, k, v, work: key_tiles.Work, smem: _Scratch):
    """Streams the tiles of keys and values."""

    def load(step, _):
        slot = lax.rem(step, STAGES)
        keys = pl.ds((work.first + step) * problem.tile, problem.tile)
        for source, target, full, free in (
            (k, smem.k, smem.k_full, smem.k_free),
            (v, smem.v, smem.v_full, smem.v_free),
        ):
            pl.when(step >= STAGES)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(source.at[keys], target.at[slot], full.at[slot])

    lax.fori_loop(0, work.count, load, None)
    for slot in range(STAGES):

        @pl.when(slot < work.count)
        def _(slot=slot):
            plgpu.barrier_wait(smem.k_free.at[slot])
            plgpu.barrier_wait(smem.v_free.at[slot])


def _consume(problem: _Problem, warpgroup, bounds, work: key_tiles.Work, smem: _Scratch):
    """`(out f32 [64, V], lse [64])` of a consumer's queries."""
    interpret = problem.interpret is not None
    score_shape = (ROWS, problem.tile)
    to_log2 = problem.scale * LOG2E

    def hand_over():
        plgpu.barrier_arrive(smem.turn)
        plgpu.barrier_wait(smem.turn)

    def zeros(columns):
        return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)

    def row(value):
        return plgpu.layout_cast(
            jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
        )

    def wide(x, shape):
        return lax.broadcast_in_dim(x, shape, [0])

    def step(j, carry):
        total, top, norm = carry
        slot = lax.rem(j, STAGES)

        products = [
            (smem.q.at[warpgroup, i], smem.k.at[slot, :, pl.ds(i * CHUNK, CHUNK)].T)
            for i in range(problem.width // CHUNK)
        ]
        scores = multiply(score_shape, [*products, hand_over], interpret)
        plgpu.barrier_arrive(smem.k_free.at[slot])
        key = (work.first + j) * problem.tile
        scores = lax.cond(
            work.whole(j), lambda x: x, lambda x: key_tiles.mask(x, key, *bounds), scores
        )
        above = jnp.maximum(top, scores.max(axis=1) * to_log2)
        shrink = jnp.exp2(top - above)
        weights = jnp.exp2(scores * to_log2 - wide(above, score_shape))
        total *= wide(shrink, total.shape)
        norm = norm * shrink + weights.sum(axis=1)
        packed = weights.astype(jnp.bfloat16)
        total, norm, above, packed = lax.optimization_barrier((total, norm, above, packed))
        plgpu.barrier_arrive(smem.turn)
        plgpu.barrier_wait(smem.v_full.at[slot])
        plgpu.barrier_wait(smem.turn)

        def expect_keys():  # while the tensor core works
            following = lax.rem(j + 1, STAGES)
            pl.when(j + 1 < work.count)(lambda: plgpu.barrier_wait(smem.k_full.at[following]))

        steps = [Product(0, packed, smem.v.at[slot]), expect_keys]
        [total] = multiply_add([total], steps, interpret)
        plgpu.barrier_arrive(smem.v_free.at[slot])
        return total, above, norm

    pl.when(work.count > 0)(lambda: plgpu.barrier_wait(smem.k_full.at[0]))
    pl.when(warpgroup == 1)(hand_over)
    nothing = zeros(problem.value_width), row(_NEVER), row(0.0)
    total, top, norm = lax.fori_loop(0, work.count, step, nothing)
    pl.when(warpgroup == 0)(hand_over)
    seen = norm > 0
    log_sum = jnp.where(seen, top / LOG2E + jnp.log(jnp.where(seen, norm, 1.0)), -jnp.inf)
    inverse = jnp.where(seen, 1.0 / jnp.where(seen, norm, 1.0), 0.0)
    return total * wide(inverse, total.shape), log_sum
