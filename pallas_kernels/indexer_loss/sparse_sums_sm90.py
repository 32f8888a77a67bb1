# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""The rows of `sparse_gradient_sm90` added up by key on Hopper: dik.

The warpgroups are those of the attention's backward (`sum_rows_sm90`), in CTAs of their own: the
time is the memory's, and there is nothing else to compute meanwhile.

SMEM at H = 128: 3 x 16,384 of ring, 2,304 of pairs and of their keys.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import Landing
from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.sparse_attention import sum_rows_sm90
from pallas_kernels.sparse_attention.backward_lists import BLOCK, PAIRS
from pallas_kernels.sparse_attention.sum_rows_sm90 import LEFT, LOADER, RIGHT

TILES = 3  # in the ring
_REGISTERS = {LEFT: 216, RIGHT: 216, LOADER: 40}


def _kernel(first, first_tile, tile_count, rows, pairs, keys, sums, *, plan, **shared):
    words = shared.pop("landed", shared["picked"])
    landing = Landing(words, 4 * 2 * plan.index_slots * PAIRS, plan.slots, plan.interpret)
    s = sum_rows_sm90.Shared(**shared, landing=landing)
    role = lax.axis_index("role")
    for number in (LEFT, RIGHT, LOADER):

        @pl.when(role == number)
        def _(number=number):
            action = "decrease" if number == LOADER else "increase"
            plgpu.set_max_registers(_REGISTERS[number], action=action)
            if number == LOADER:
                sum_rows_sm90.load(plan, first_tile, tile_count, rows, pairs, keys, s)
            else:
                sum_rows_sm90.add(plan, number, first_tile, tile_count, first[0] == 0, sums, s)


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
    landed = {"landed": plgpu.Barrier(num_barriers=plan.slots)} if plan.interpret else {}

    def indexer_loss_sum_rows(*refs, **scratch):  # its name is the kernel's
        _kernel(*refs, plan=make_plan(lax.axis_index("cta")), **scratch)

    plgpu.kernel(
        indexer_loss_sum_rows,
        scratch_types={
            **landed,
            "ring": plgpu.SMEM((plan.slots, PAIRS, plan.part), rows.dtype, transforms=SWIZZLED),
            "picked": plgpu.SMEM((2 * plan.index_slots + 1, PAIRS), jnp.int32),
            "listed": plgpu.Barrier(num_arrivals=2, num_barriers=plan.index_slots),
            "freed": plgpu.Barrier(num_arrivals=2, num_barriers=plan.slots),
            "started": plgpu.Barrier(),
        },
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(first, first_tile, tile_count, rows, pairs, keys, sums)
