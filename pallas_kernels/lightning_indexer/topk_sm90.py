"""Exact top-k of rows of scores on Hopper; `topk_row` has the program.

A CTA takes a row, from one read of its visible scores to the ascending columns. Two CTAs share an
SM, so that the serial phases of one row hide behind the streaming of another: of 256 lanes for long
rows, and of 512 for rows that fit shared memory whole.

Few rows do not fill the GPU: then the range of each is cut into segments, a CTA of 512 lanes
selects of each segment, and a second kernel selects of what they found.

Shared memory: `Plan.words`, 91 KB for long rows, 41 KB for rows of 8192, which need no list of
columns. Registers: at most 104 a lane, 48 where rows are held whole; no spills.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import histogram
from pallas_kernels.hopper.simt import U32, SimtBlock
from pallas_kernels.hopper.simt_model import ModelBlock
from pallas_kernels.lightning_indexer.topk_plan import Plan
from pallas_kernels.lightning_indexer.topk_row import merge_row, select_row
from pallas_kernels.types import KeyRange

MAX_TOPK = 4096

_SHORT = 16384  # the widest row that is held whole
_SMS = 132  # of an H100


def plan(topk: int, width: int, tasks: int, **sizes: int) -> Plan:
    """The plan for rows, or segments of rows, of `width` scores.

    Args:
        topk: K.
        width: S.
        tasks: how many rows or segments there are.
        **sizes: overrides what is chosen.
    """
    short = width <= _SHORT
    best = dict(threads=512, vectors=2, capacity=16384 if short else 12288, sample=4096)
    if tasks > _SMS and not short:  # or else a row is held whole, or has an SM for itself
        capacity = 10240 if topk <= 2048 else 12288
        best = dict(threads=256, vectors=4, capacity=capacity, sample=2048)
    best |= sizes
    whole_row = histogram.round_up(width + 3 if width % 4 else width, best["threads"])
    return Plan(topk, width, **best | {"capacity": min(best["capacity"], whole_row)})


def segments(rows: int, topk: int, width: int) -> int:
    """Into how many segments to cut each row, so that they fill the GPU."""
    if width < 65536:  # the second kernel would cost more than the first saves
        return 1
    lists = 12288 // topk  # that a merging CTA holds
    return max(1, min(_SMS // rows, lists, width // 16384))


def merge_plan(topk: int, width: int, segments: int) -> Plan:
    """The plan for merging a row's segments."""
    capacity = histogram.round_up(max(segments * topk, topk + 2048), 512)
    return Plan(topk, width, threads=512, vectors=1, capacity=capacity, sample=4096)


def unsupported(topk: int) -> str | None:
    """Why the kernel cannot select so many; None where it can."""
    if topk > MAX_TOPK:
        return f"topk={topk} is more than the {MAX_TOPK} that shared memory has room for"
    return None


def select_topk(scores, ranges: KeyRange, *, topk: int, workspace_bytes: int):
    """Selects from given scores; `[B, T, min(topk, S)]`. Its workspace is at most 25 MB."""
    del workspace_bytes
    batch, queries, keys = scores.shape
    topk = min(topk, keys)
    if scores.size == 0:
        return jnp.zeros((batch, queries, topk), jnp.int32)
    rows = scores.reshape(batch * queries, keys)
    selected = select_rows(rows, ranges.start.ravel(), ranges.end.ravel(), topk=topk)
    return selected.reshape(batch, queries, topk)


def select_rows(
    scores: Any,
    starts: Any,
    ends: Any,
    *,
    topk: int,
    parts: int | None = None,
    interpret: bool = False,
    **sizes: int,
) -> Any:
    """The K best columns of each row, ascending, -1 padded.

    Args:
        scores: f32 `[rows, S]`.
        starts: i32 `[rows]`, the first column that counts.
        ends: i32 `[rows]`, the column after the last that counts.
        topk: K, at most S.
        parts: segments of a row; by default what suits the number of rows.
        interpret: runs the same programs on the CPU, with race detection; NumPy arrays.
        **sizes: fields of `Plan` to try others than the chosen.

    Returns:
        i32 `[rows, K]`.
    """
    rows, width = scores.shape
    parts = segments(rows, topk, width) if parts is None else parts
    run: Callable[..., Any] = _simulate if interpret else _launch
    chosen = plan(topk, width, rows * parts, **sizes)

    def select(block, task, scores, starts, ends, out):
        select_row(block, chosen, scores, starts, ends, out, task // parts, task % parts, parts)

    found = run(select, chosen, rows * parts, scores, starts, ends)
    if parts == 1:
        return found

    def merge(block, task, scores, found, out):
        merge_row(block, merging, scores, found, out, task, parts)

    merging = merge_plan(topk, width, parts)
    return run(merge, merging, rows, scores, found)


def _launch(program: Callable, plan: Plan, tasks: int, *arrays: jax.Array) -> jax.Array:
    """Runs a program on the GPU, a CTA a task; i32 `[tasks, K]`."""
    references = [plgpu.RefType()] * (len(arrays) + 2)

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(*references, plgpu.Layout.WG_SPLAT))
        def lanes(_, *refs_and_task):
            *refs, scratch, task = refs_and_task
            program(SimtBlock(plan.threads, scratch), U32(task.registers.item()), *refs)

        lanes(*refs, lax.axis_index("task"))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tasks, plan.topk), jnp.int32),
        scratch_types=[plgpu.SMEM((plan.words,), jnp.int32)],
        grid=(tasks,),
        grid_names=("task",),
        num_threads=plan.threads // 128,
        thread_name="warpgroup",
        kernel_name="dsa_topk",
        # The program speaks of single lanes; nothing here needs layout inference.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(*arrays)


def _simulate(program: Callable, plan: Plan, tasks: int, *arrays: np.ndarray) -> np.ndarray:
    """Runs a program on the CPU; the result is poisoned first."""
    out = np.full(tasks * plan.topk, -7, np.int32)
    flat = [np.ascontiguousarray(array).ravel() for array in arrays]
    for task in range(tasks):
        block = ModelBlock(plan.threads, plan.words)
        program(block, block.constant(task), *flat, out)
    return out.reshape(tasks, plan.topk)
