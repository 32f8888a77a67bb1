# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""The gradient of the groups' matrices on Hopper: `out[e] = x[rows of e].T @ g[rows of e]`.

One CTA per SM goes through tiles of 128 x 256 of all matrices, one matrix after the other, and
contracts over the rows of its group, 64 at a time. The first chunk starts at the group's first row
rounded down to the 8 rows that TMA aligns to; where a chunk holds rows of another group, each
consumer zeroes them in its own part of x. A group without rows has gradient 0.

Warpgroups, shared memory and registers are those of `rows_sm90`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.rows_sm90 import (
    ALIGNMENT,
    COLUMNS,
    CONSUMERS,
    DEPTH,
    PRODUCER_REGISTERS,
    ROWS,
    STAGES,
    TRANSFORMS,
    accumulate,
)

_CONSUMER_REGISTERS = 240
_HALF = COLUMNS // 2


class Groups(NamedTuple):
    """Rows `start <= m < end` of each group: i32 `[E]`."""

    start: Any
    end: Any


class _Scratch(NamedTuple):
    x: Any  # [stages, consumers, 64 rows, 64]
    g: Any  # [stages, 64 rows, 256]
    out: Any  # [consumers, 64, 128]
    full: Any
    free: Any


def multiply(x, g, group_sizes, *, ctas: int, interpret: Any = None):
    """`[E, K, N]`: `out[e]` sums `x[m].T g[m]` over the rows m of group e.

    Args:
        x: `[M, K]` bf16, sorted by group.
        g: `[M, N]` bf16.
        group_sizes: i32 `[E]`, summing to M.
        ctas: how many share the work.
        interpret: parameters of the GPU interpreter, or None.
    """
    end = jnp.cumsum(group_sizes.astype(jnp.int32))
    groups = Groups(end - group_sizes.astype(jnp.int32), end)
    missing = -x.shape[0] % ALIGNMENT
    if missing:
        x, g = (jnp.pad(a, ((0, missing), (0, 0))) for a in (x, g))
    scratch = _Scratch(
        x=plgpu.SMEM((STAGES, CONSUMERS, DEPTH, ROWS), x.dtype, transforms=TRANSFORMS),
        g=plgpu.SMEM((STAGES, DEPTH, COLUMNS), x.dtype, transforms=TRANSFORMS),
        out=plgpu.SMEM((CONSUMERS, ROWS, _HALF), x.dtype, transforms=TRANSFORMS),
        full=plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=STAGES),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
    )

    def body(x, g, *refs, **scratch):
        groups, out = Groups(*refs[:-1]), refs[-1]
        smem = _Scratch(**{k[1:]: v for k, v in scratch.items()})
        kernel = _Kernel(x, g, groups, out, smem, ctas, interpret is not None)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == CONSUMERS)(kernel.produce)
        pl.when(warpgroup < CONSUMERS)(kernel.consume)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((end.shape[0], x.shape[1], g.shape[1]), x.dtype),
        scratch_types={f"_{k}": v for k, v in scratch._asdict().items()},
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="grouped_matmul_weights",
        interpret=interpret,
    )(x, g, *groups)


class _Item(NamedTuple):
    """A tile of a matrix."""

    group: Any
    row: Any  # of the output
    column: Any
    start: Any  # the group's rows of x and g
    end: Any
    first: Any  # the first row loaded, a multiple of ALIGNMENT
    steps: Any


class _Kernel:
    """The program of a CTA."""

    def __init__(self, x, g, groups: Groups, out, smem: _Scratch, ctas: int, interpret: bool):
        self.x, self.g, self.groups, self.out, self.smem = x, g, groups, out, smem
        self.ctas, self.interpret = ctas, interpret
        self.row_blocks = pl.cdiv(out.shape[1], CONSUMERS * ROWS)
        self.column_blocks = pl.cdiv(out.shape[2], COLUMNS)
        self.total = out.shape[0] * self.row_blocks * self.column_blocks

    def item(self, i) -> _Item:
        tiles = self.row_blocks * self.column_blocks
        group, i = lax.div(i, tiles), lax.rem(i, tiles)
        start, end = self.groups.start[group], self.groups.end[group]
        first = lax.div(start, ALIGNMENT) * ALIGNMENT
        steps = jnp.where(start < end, lax.div(end - first + DEPTH - 1, DEPTH), 0)
        return _Item(
            group,
            lax.rem(i, self.row_blocks) * (CONSUMERS * ROWS),
            lax.div(i, self.row_blocks) * COLUMNS,
            start,
            end,
            first,
            steps,
        )

    def over_items(self, body, carry):
        """`carry = body(item, carry)` over this CTA's tiles."""
        cta = lax.axis_index("cta")
        items = lax.div(self.total - cta + self.ctas - 1, self.ctas)
        return lax.fori_loop(0, items, lambda i, c: body(self.item(cta + i * self.ctas), c), carry)

    def produce(self):
        """Streams x and g."""
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        smem = self.smem

        def load(item: _Item, before):
            def step(k, _):
                slot = lax.rem(before + k, STAGES)
                pl.when(before + k >= STAGES)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
                rows = pl.ds(pl.multiple_of(item.first + k * DEPTH, ALIGNMENT), DEPTH)
                for consumer in range(CONSUMERS):
                    plgpu.copy_gmem_to_smem(
                        self.x.at[rows, pl.ds(item.row + consumer * ROWS, ROWS)],
                        smem.x.at[slot, consumer],
                        smem.full.at[slot],
                    )
                plgpu.copy_gmem_to_smem(
                    self.g.at[rows, pl.ds(item.column, COLUMNS)],
                    smem.g.at[slot],
                    smem.full.at[slot],
                )

            lax.fori_loop(0, item.steps, step, None)
            return before + item.steps

        steps = self.over_items(load, jnp.int32(0))
        for slot in range(STAGES):
            pl.when(slot < steps)(lambda slot=slot: plgpu.barrier_wait(smem.free.at[slot]))

    def consume(self):
        """Multiplies and stores a consumer's half of each tile."""
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        warpgroup = lax.axis_index("warpgroup")

        def tile(item: _Item, before):
            def factors(slot, k):
                x = self.smem.x.at[slot, warpgroup]
                self.clear_others(x, item, item.first + k * DEPTH)
                return x.T, self.smem.g.at[slot]

            @pl.when(item.steps > 0)
            def _():
                sums = accumulate(
                    (ROWS, COLUMNS), item.steps, before, self.smem.full, self.smem.free, factors
                )
                self.store(item, warpgroup, sums)

            @pl.when(item.steps == 0)
            def _():
                zeros = jnp.zeros((ROWS, COLUMNS), jnp.float32)
                self.store(item, warpgroup, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

            return before + item.steps

        self.over_items(tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def clear_others(self, x, item: _Item, first):
        """Zeroes the rows of a chunk that are of another group."""

        @pl.when((first < item.start) | (first + DEPTH > item.end))
        def _():
            values = plgpu.load(x, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA) + first
            mine = (row >= item.start) & (row < item.end)
            x[...] = jnp.where(mine, values, 0.0).astype(x.dtype)
            plgpu.commit_smem()

    def store(self, item: _Item, warpgroup, sums):
        """Stores 64 rows, one half of the columns after the other."""
        staging = self.smem.out.at[warpgroup]
        for half in range(2):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staging[...] = sums[:, half * _HALF : (half + 1) * _HALF].astype(self.out.dtype)
            plgpu.commit_smem()
            rows = pl.ds(item.row + warpgroup * ROWS, ROWS)
            columns = pl.ds(item.column + half * _HALF, _HALF)
            plgpu.copy_smem_to_gmem(staging, self.out.at[item.group, rows, columns])
