# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""The rows of `sparse_gradient_sm90` added up by key on Hopper: dik.

The warpgroups are those of the attention's backward (`sum_rows_sm90`), in CTAs of their own: the
time is the memory's, and there is nothing else to compute meanwhile.

SMEM at H = 128: 3 x 16,384 of ring, 2,304 of pairs and of their keys.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import roles
from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.sparse_attention import sum_rows_sm90
from pallas_kernels.sparse_attention.backward_lists import BLOCK, PAIRS

TILES = 3  # in the ring
_REGISTERS = 216, 216, 40  # of LEFT, RIGHT, LOADER


def sum_rows(first, rows, first_tile, tile_count, pairs, keys, sums, *, sms, interpret=None):
    """Adds the rows that belong to each key to its sum, or starts the sum with them.

    Args:
        first: i32 `[1]`, 0 where sums start, whatever `sums` holds.
        rows: bf16 `[pairs, H]`.
        first_tile, tile_count, pairs, keys: from `backward_lists.pairs_by_block`.
        sums: a `jax.Ref`, f32 `[parts, 64 blocks, H]`. A list is cut into parts, each with a sum of
            its own, so that few blocks keep all CTAs busy.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
    """
    count, width = rows.shape
    parts, blocks = sums.shape[0], sums.shape[1] // BLOCK
    ctas = min(sms, blocks * parts)

    def make_plan(cta):
        return sum_rows_sm90.Plan(
            width=width,
            rows=count,
            blocks=blocks,
            parts=parts,
            cta=cta,
            ctas=ctas,
            interpret=interpret is not None,
            tiles=TILES,
        )

    plan = make_plan(None)

    def assign(first, first_tile, tile_count, rows, pairs, keys, sums, **shared):
        plan, s = make_plan(lax.axis_index("cta")), sum_rows_sm90.Shared(**shared)

        def add(side):
            return sum_rows_sm90.add(plan, side, first_tile, tile_count, first[0] == 0, sums, s)

        return (
            functools.partial(add, sum_rows_sm90.LEFT),
            functools.partial(add, sum_rows_sm90.RIGHT),
            lambda: sum_rows_sm90.load(plan, first_tile, tile_count, rows, pairs, keys, s),
        )

    roles.kernel(
        "indexer_loss_sum_rows",
        assign,
        _REGISTERS,
        scratch_types={
            "ring": plgpu.SMEM((plan.slots, PAIRS, plan.part), rows.dtype, transforms=SWIZZLED),
            "picked": plgpu.SMEM((2 * plan.index_slots + 1, PAIRS), jnp.int32),
            "listed": plgpu.Barrier(num_arrivals=2, num_barriers=plan.index_slots),
            "freed": plgpu.Barrier(num_arrivals=2, num_barriers=plan.slots),
            "started": plgpu.Barrier(),
        },
        landing_slots=plan.slots,
        grid={"cta": ctas},
        interpret=interpret,
    )(first, first_tile, tile_count, rows, pairs, keys, sums)
