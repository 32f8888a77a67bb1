# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false
"""Lists the pairs of a window's queries and selected keys by blocks of 64 keys, on Hopper.

What `backward_lists.pairs_by_block` does, in two kernels and sums of what is as large as queries
times blocks. A CTA takes a query:

    find_starts    the first slot of each block, by bisection
    in XLA         where each query's part of a block's list begins
    place_pairs    each pair to where it belongs, and -1 to where a list is filled up

The lanes are those of `hopper.simt`; a row of indices is read again and again out of the L1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.simt import U32, SimtBlock
from pallas_kernels.hopper.simt_model import ModelBlock
from pallas_kernels.sparse_attention import backward_lists
from pallas_kernels.sparse_attention.backward_lists import BLOCK, PAIRS, sums_before

THREADS = 128


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    window: int  # queries of it
    total: int  # queries
    queries: int  # T, of a batch row
    rows: int  # S, of a batch row
    selected: int  # K
    blocks: int

    def query(self, block: Any, task: Any, first: Any, counts: Any):
        """`(number among all, how many keys it has, what is added to their indices)`."""
        number = _word(block, first, 0) + task
        exists = number < self.total
        number = block.select(exists, number, 0)
        count = block.select(exists, _word(block, counts, number), 0)
        return number, count, number // self.queries * self.rows


def _word(block: Any, array: Any, i: Any):
    return block.load_global(block.global_row(array, block.constant(0), 1), block.constant(0) + i)


def find_starts(block, plan: _Plan, task, first, counts, indices, starts) -> None:
    """`starts[task, b]`: how many of the query's keys lie before block b, b up to `blocks`."""
    number, count, offset = plan.query(block, task, first, counts)
    row = block.global_row(indices, number, plan.selected)
    out = block.global_row(starts, task, plan.blocks + 1)
    highest = 1 << plan.selected.bit_length() - 1

    def bound(i, carry):
        b = i + block.thread
        end = b * BLOCK
        found, step = block.constant(0), highest
        while step:
            more = found + step
            key = block.load_global(row, block.minimum(more, plan.selected) - 1) + offset
            found = block.select((more <= count) & (key < end), more, found)
            step //= 2
        block.store_global(out, b, found, b <= plan.blocks)
        return carry

    block.loop(0, plan.blocks + 1, block.threads, (), bound)


def place_pairs(block, plan: _Plan, task, first, counts, indices, places, ends, pairs, keys):
    """Writes the query's pairs, and with them which keys of their blocks they are of.

    Args:
        block: the lanes.
        plan: the static numbers.
        task: the query, counted from the first of the window.
        first, counts, indices: as of `pairs_by_block`.
        places: `[window, blocks]`, where the query's slot 0 would be in each list.
        ends: `[blocks]`, where the last list's end is, before it is filled up.
        pairs, keys: the lists.
    """
    number, count, offset = plan.query(block, task, first, counts)
    row = block.global_row(indices, number, plan.selected)
    place = block.global_row(places, task, plan.blocks)
    lists = [block.global_row(x, block.constant(0), 1) for x in (pairs, keys)]

    def some(i, carry):
        slot = i + block.thread
        exists = slot < count
        key = block.load_global(row, block.minimum(slot, plan.selected - 1)) + offset
        of = block.select(exists, key // BLOCK, 0)
        position = block.load_global(place, of) + slot
        for array, value in zip(lists, (task * plan.selected + slot, key % BLOCK), strict=True):
            block.store_global(array, position, value, exists)
        return carry

    block.loop(0, plan.selected, block.threads, (), some)
    nothing = block.constant(0) - 1
    for turn in range(-(-plan.blocks // plan.window)):
        b = task + turn * plan.window
        end = _word(block, ends, block.minimum(b, plan.blocks - 1))
        left = (block.constant(0) - end) % PAIRS
        for array in lists:
            where = (block.thread < left) & (b < plan.blocks)
            block.store_global(array, end + block.thread, nothing, where)


def pairs_by_block(first, counts, indices, *, window, queries, rows, blocks, simulate=False):
    """The lists of a window, as of `backward_lists.pairs_by_block`.

    Args:
        first: i32 `[1]`, the first query of the window.
        counts: i32 `[all queries]`, how many keys each has.
        indices: i32 `[all queries, K]`, of which the first `counts` are its keys, in rising order.
        window: queries of the window; those past the last have no keys.
        queries: T of a batch row.
        rows: S of a batch row.
        blocks: of 64 keys, of all batch rows.
        simulate: runs the same programs on the CPU, with race detection.
    """
    total, selected = indices.shape
    plan = _Plan(window, total, queries, rows, selected, blocks)
    run: Callable[..., Any] = _simulate if simulate else _launch
    given = first, counts, indices
    [start] = run("indexer_loss_find_starts", find_starts, plan, [(window, blocks + 1)], *given)
    before, sums = sums_before(start[:, 1:] - start[:, :-1])
    tile_count = -(-sums // PAIRS)
    first_tile = jnp.cumsum(tile_count) - tile_count
    places = first_tile * PAIRS + before - start[:, :-1]
    length = (window * selected // PAIRS + blocks) * PAIRS
    ends = first_tile * PAIRS + sums
    name = "indexer_loss_place_pairs"
    return (
        first_tile,
        tile_count,
        *run(name, place_pairs, plan, [(length,)] * 2, *given, places, ends),
    )


def twin(first, counts, indices, *, window, queries, rows, blocks):
    """`pairs_by_block` without kernels: for interpret mode, and to compare with."""
    number = first + jnp.arange(window)
    exists = (number < len(counts))[:, None]
    number = jnp.where(number < len(counts), number, 0)
    exists &= jnp.arange(indices.shape[1]) < counts[number][:, None]
    keys = indices[number] + (number // queries * rows)[:, None]
    keys = jnp.where(exists, keys, blocks * BLOCK)
    return backward_lists.pairs_by_block(keys, blocks=blocks)


def _launch(name: str, program: Callable, plan: _Plan, shapes: Sequence, *arrays: jax.Array):
    """Runs a program on the GPU, a CTA a query; arrays of i32."""
    references = [plgpu.RefType()] * (len(arrays) + len(shapes) + 1)

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(*references, plgpu.Layout.WG_SPLAT))
        def lanes(_, *refs_and_task):
            *refs, scratch, task = refs_and_task
            program(SimtBlock(THREADS, scratch), plan, U32(task.registers.item()), *refs)

        lanes(*refs, lax.axis_index("task"))

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
        scratch_types=[plgpu.SMEM((4,), jnp.int32)],
        grid=(plan.window,),
        grid_names=("task",),
        num_threads=THREADS // 128,
        thread_name="warpgroup",
        kernel_name=name,
        # The program speaks of single lanes; nothing here needs layout inference.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(*arrays)


def _simulate(name: str, program: Callable, plan: _Plan, shapes: Sequence, *arrays):
    """Runs a program on the CPU; the results are poisoned first."""
    del name
    results = [np.full(np.prod(shape), -9, np.int32) for shape in shapes]
    flat = [np.ascontiguousarray(array).ravel() for array in arrays]
    for task in range(plan.window):
        block = ModelBlock(THREADS, 4)
        program(block, plan, block.constant(task), *flat, *results)
    return [x.reshape(shape) for x, shape in zip(results, shapes, strict=True)]
