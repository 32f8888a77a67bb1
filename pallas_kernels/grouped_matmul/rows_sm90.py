# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Rows times the matrix of their group on Hopper: `out[m] = x[m] @ w[e]`, or `@ w[e].T`.

One CTA per SM goes through tiles of 128 rows and 256 columns. A tile belongs to one group: the
tiles of a group start at its first row, rounded down to the 8 rows that TMA aligns to, so that a
group wastes less than a tile. Rows of other groups are computed and not stored: what is stored is
a run of rows of any length, as TMA boxes of 64, 32, ... 1 rows.

A producer warpgroup streams both factors, also of the next tile while the two consumers (64 rows
each, 128 registers of sums a thread) store. Shared memory: four stages of 48 KiB, 32 KiB for half
of a tile on its way out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a consumer
CONSUMERS = 2
BLOCK = ROWS * CONSUMERS
COLUMNS = 256
DEPTH = 64  # contracted at once: columns of bf16 in a 128-byte swizzle
STAGES = 4
ALIGNMENT = 8  # rows that TMA starts at, as Mosaic tiles them
TRANSFORMS = (plgpu.TilingTransform((ALIGNMENT, DEPTH)), plgpu.SwizzleTransform(128))
_CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
_TOGETHER = 8  # tiles of rows that go through all columns side by side
_HALF = COLUMNS // 2


class Tiles(NamedTuple):
    """Tiles of rows: i32 `[tiles]`, the first `total` of them in use."""

    group: Any
    row: Any  # the first row, a multiple of ALIGNMENT
    low: Any  # the rows of the group: `low <= m < high`
    high: Any
    total: Any  # i32 [1]


def plan(group_sizes, rows: int) -> Tiles:
    """The tiles of all groups."""
    groups = group_sizes.shape[0]
    end = jnp.cumsum(group_sizes.astype(jnp.int32))
    start = end - group_sizes.astype(jnp.int32)
    base = start // ALIGNMENT * ALIGNMENT
    count = jnp.where(group_sizes > 0, -(-(end - base) // BLOCK), 0)
    after = jnp.cumsum(count)
    tile = jnp.arange(rows // BLOCK + 2 * groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(after, tile, side="right"), groups - 1).astype(jnp.int32)
    row = base[group] + (tile - (after - count)[group]) * BLOCK
    return Tiles(group, row, start[group], end[group], after[-1:])


class _Scratch(NamedTuple):
    x: Any  # [stages, consumers, 64, 64]
    w: Any  # [stages, 64, 256], or [stages, 256, 64] transposed
    out: Any  # [consumers, 64, 128]
    full: Any
    free: Any


def multiply(x, w, group_sizes, *, transpose: bool, ctas: int, interpret: Any = None):
    """`[M, N]`: `out[m] = x[m] @ w[e]`.

    Args:
        x: `[M, K]` bf16, sorted by group.
        w: `[E, K, N]` bf16, or `[E, N, K]` where transposed.
        group_sizes: i32 `[E]`, summing to M.
        transpose: whether to multiply by the transpose of each matrix.
        ctas: how many share the work.
        interpret: parameters of the GPU interpreter, or None.
    """
    rows, depth = x.shape
    columns = w.shape[1] if transpose else w.shape[2]
    tiles = plan(group_sizes, rows)
    missing = -rows % ALIGNMENT
    x = jnp.pad(x, ((0, missing), (0, 0))) if missing else x
    w_tile = (COLUMNS, DEPTH) if transpose else (DEPTH, COLUMNS)

    def body(x, w, *refs, **scratch):
        tiles, out = Tiles(*refs[:-1]), refs[-1]
        kernel = _Kernel(x, w, tiles, out, _Scratch(**{k[1:]: v for k, v in scratch.items()}))
        kernel.transpose, kernel.ctas = transpose, ctas
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == CONSUMERS)(kernel.produce)
        pl.when(warpgroup < CONSUMERS)(kernel.consume)

    scratch = _Scratch(
        x=plgpu.SMEM((STAGES, CONSUMERS, ROWS, DEPTH), x.dtype, transforms=TRANSFORMS),
        w=plgpu.SMEM((STAGES, *w_tile), x.dtype, transforms=TRANSFORMS),
        out=plgpu.SMEM((CONSUMERS, ROWS, _HALF), x.dtype),
        full=plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=STAGES),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
    )
    del depth
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        scratch_types={f"_{k}": v for k, v in scratch._asdict().items()},
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="grouped_matmul_transposed" if transpose else "grouped_matmul",
        interpret=interpret,
    )(x, w, *tiles)


class _Item(NamedTuple):
    """A tile of rows and columns."""

    group: Any
    row: Any
    low: Any
    high: Any
    column: Any


class _Kernel:
    """The program of a CTA."""

    transpose: bool
    ctas: int

    def __init__(self, x, w, tiles: Tiles, out, smem: _Scratch):
        self.x, self.w, self.tiles, self.out, self.smem = x, w, tiles, out, smem
        self.steps = pl.cdiv(x.shape[1], DEPTH)  # of a tile
        self.blocks = pl.cdiv(out.shape[1], COLUMNS)

    def items(self):
        """How many tiles are this CTA's."""
        total = self.tiles.total[0] * self.blocks
        return lax.div(total - lax.axis_index("cta") + self.ctas - 1, self.ctas)

    def item(self, i) -> _Item:
        """The i-th of this CTA's."""
        i = lax.axis_index("cta") + i * self.ctas
        some = lax.div(i, _TOGETHER * self.blocks)
        i -= some * (_TOGETHER * self.blocks)
        together = jnp.minimum(_TOGETHER, self.tiles.total[0] - some * _TOGETHER)
        tile = some * _TOGETHER + lax.rem(i, together)
        return _Item(
            self.tiles.group[tile],
            pl.multiple_of(self.tiles.row[tile], ALIGNMENT),
            self.tiles.low[tile],
            self.tiles.high[tile],
            lax.div(i, together) * COLUMNS,
        )

    def produce(self):
        """Streams x and w."""
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        smem = self.smem

        def load(i, _):
            item = self.item(i)

            def step(k, _):
                step = i * self.steps + k
                slot = lax.rem(step, STAGES)
                pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
                depth, columns = pl.ds(k * DEPTH, DEPTH), pl.ds(item.column, COLUMNS)
                for consumer in range(CONSUMERS):
                    plgpu.copy_gmem_to_smem(
                        self.x.at[pl.ds(item.row + consumer * ROWS, ROWS), depth],
                        smem.x.at[slot, consumer],
                        smem.full.at[slot],
                    )
                part = (columns, depth) if self.transpose else (depth, columns)
                plgpu.copy_gmem_to_smem(
                    self.w.at[(item.group, *part)], smem.w.at[slot], smem.full.at[slot]
                )

            lax.fori_loop(0, self.steps, step, None)

        items = self.items()
        lax.fori_loop(0, items, load, None)
        for slot in range(STAGES):
            pl.when(slot < items * self.steps)(
                lambda slot=slot: plgpu.barrier_wait(smem.free.at[slot])
            )

    def consume(self):
        """Multiplies and stores a consumer's rows of each tile."""
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        warpgroup = lax.axis_index("warpgroup")

        def tile(i, _):
            item = self.item(i)
            sums = accumulate(
                (ROWS, COLUMNS),
                self.steps,
                i * self.steps,
                self.smem.full,
                self.smem.free,
                lambda slot, _: (self.smem.x.at[slot, warpgroup], self._matrix(slot)),
            )
            self.store(item, warpgroup, sums)

        lax.fori_loop(0, self.items(), tile, None)
        plgpu.wait_smem_to_gmem(0)

    def _matrix(self, slot):
        matrix = self.smem.w.at[slot]
        return matrix.T if self.transpose else matrix

    def store(self, item: _Item, warpgroup, sums):
        """Stores the rows of the group, one half of the columns after the other."""
        first = item.row + warpgroup * ROWS
        low = jnp.clip(item.low - first, 0, ROWS)
        count = jnp.clip(item.high - first, 0, ROWS) - low
        staging = self.smem.out.at[warpgroup]
        for half in range(2):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            columns = slice(half * _HALF, (half + 1) * _HALF)
            staging[...] = sums[:, columns].astype(self.out.dtype)
            plgpu.commit_smem()
            start, run = low, ROWS
            while run:

                @pl.when((count & run) != 0)
                def _(start=start, run=run, half=half):
                    plgpu.copy_smem_to_gmem(
                        staging.at[pl.ds(start, run)],
                        self.out.at[
                            pl.ds(first + start, run), pl.ds(item.column + half * _HALF, _HALF)
                        ],
                    )

                start += count & run
                run //= 2


def accumulate(shape, steps, before, full, free, factors):
    """The sum of `steps` products, of which each needs a stage of the ring.

    Args:
        shape: of the result.
        steps: how many, at least 1.
        before: how many stages the warpgroup has used before.
        full, free: the ring's barriers.
        factors: of a slot and a step, both factors.
    """
    stages = full.shape[0]

    def run(sums):
        def step(k, _):
            slot = lax.rem(before + k, stages)
            plgpu.barrier_wait(full.at[slot])
            left, right = factors(slot, k)
            plgpu.wgmma(sums, left, right)
            plgpu.wgmma_wait(1)
            # The product before this one is done with its stage.
            previous = lax.rem(before + k + stages - 1, stages)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[previous]))

        lax.fori_loop(0, steps, step, None)
        return sums[...]

    result = pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
    plgpu.barrier_arrive(free.at[lax.rem(before + steps - 1, stages)])
    return result
