# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
"""Kernels whose warpgroups each have a role for life: how one is launched, and who does what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import Landing

LANES = 128
REGISTERS = 65536
"""Of an SM. A launch deals them out evenly, by eights."""


def kernel(
    name: str,
    assign: Callable[..., Sequence[Callable[[], None]]],
    registers: Sequence[int],
    *,
    scratch_types: Mapping[str, Any],
    landing_slots: int,
    grid: Mapping[str, int],
    interpret: Any,
    out_type: Any = (),
    cluster: Mapping[str, int] | None = None,
) -> Callable[..., Any]:
    """A kernel with a warpgroup for each role, which share a ring that `gather_rows` fills.

    Args:
        name: the kernel's, as a profiler shows it.
        assign: given all operands and results, and by name the scratch and `landing`, what each
            warpgroup does.
        registers: of a thread of each warpgroup, together no more than are dealt out: with three
            warpgroups 504, as 512 cannot be dealt evenly.
        scratch_types: SMEM and barriers. `picked`, i32 `[n, 64]`, holds indices of rows; its last
            row is for the words of the `Landing`.
        landing_slots: of the `Landing`.
        grid: names and sizes.
        interpret: parameters of interpret mode, or None.
        out_type: of the results; none for a kernel that writes `jax.Ref`s.
        cluster: names and sizes, of CTAs that run together.

    Raises:
        ValueError: if the warpgroups ask for more registers than there are.
    """
    dealt = REGISTERS // (LANES * len(registers)) // 8 * 8
    if sum(registers) > dealt * len(registers):
        raise ValueError(
            f"registers {registers} are {sum(registers)} in all, but a launch deals out {dealt} to "
            f"each of {len(registers)} warpgroups: one would wait forever; take fewer"
        )
    barriers = plgpu.Barrier(num_barriers=landing_slots)
    twin = {} if interpret is None else {"landed": barriers}

    def body(*refs, landed=None, **scratch):
        picked = scratch["picked"]
        start = 4 * (picked.shape[0] - 1) * picked.shape[1]
        words = picked if landed is None else landed
        landing = Landing(words, start, landing_slots, interpret is not None)
        mine = lax.axis_index("role")
        roles = assign(*refs, landing=landing, **scratch)
        for number, (role, count) in enumerate(zip(roles, registers, strict=True)):

            @pl.when(mine == number)
            def _(role=role, count=count):
                if count != dealt:
                    action = "decrease" if count < dealt else "increase"
                    plgpu.set_max_registers(count, action=action)
                role()

    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types={**twin, **scratch_types},
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple((cluster or {}).values()),
        cluster_names=tuple(cluster or {}),
        num_threads=len(registers),
        thread_name="role",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
