"""Floats, vectors of stores and maxima for the lanes of `hopper.simt`, and how such programs run.

A float travels as its bits, as there. What is not listed here is an operation on bits: `x &
0x7FFFFFFF` is the absolute value, and floats of one sign rise as their bits do, NaN above all.
"""

# ruff: noqa: D102  (of `ModelFloats`: what an operation means is said at `SimtFloats`)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.simt import (
    U32,
    WARP,
    Condition,
    GlobalRow,
    SimtBlock,
    Words,
    _asm,
    _asm_void,
)
from pallas_kernels.hopper.simt_model import ModelBlock


class SimtFloats(SimtBlock):
    """Emits them, as `SimtBlock` does the others."""

    def subtract(self, x: U32, y: U32) -> U32:
        """The difference of floats."""
        return _asm("sub.rn.f32 $0, $1, $2;", "=r,r,r", x, y)

    def multiply(self, x: U32, y: U32) -> U32:
        """Their product."""
        return _asm("mul.rn.f32 $0, $1, $2;", "=r,r,r", x, y)

    def divide(self, x: U32, y: U32) -> U32:
        """Their quotient, up to 2 units in the last place."""
        return _asm("div.full.f32 $0, $1, $2;", "=r,r,r", x, y)

    def higher(self, x: U32, y: U32) -> U32:
        """The larger float; the other where one is NaN."""
        return _asm("max.f32 $0, $1, $2;", "=r,r,r", x, y)

    def exp2(self, x: U32) -> U32:
        """2**x, up to 2**-22 of itself."""
        return _asm("ex2.approx.ftz.f32 $0, $1;", "=r,r", x)

    def log2(self, x: U32) -> U32:
        """The logarithm of a float, up to 2**-22, of itself where it is not near 0."""
        return _asm("lg2.approx.f32 $0, $1;", "=r,r", x)

    def raise_word(self, array: Words, i: Any, value: U32, where: Condition) -> None:
        """Makes a word of shared memory at least so large, atomically; unsigned."""
        self._write("red.shared.max.u32", array, i, [value], where)

    def own_row(self, array: Any, row: U32, width: int) -> GlobalRow:
        """As `global_row`, of rows that differ between lanes; to load from."""
        return self.global_row(array, row, width)

    def store4_global(self, row: GlobalRow, i: U32, values: list, where: Condition) -> None:
        """Writes the i-th four words from the boundary, in the lanes where the condition holds."""
        code = "@$5 st.global.v4.u32 [$0], {$1, $2, $3, $4};"
        _asm_void(code, "l,r,r,r,r,b", self._wide_address(row, i << 2), *values, where)


class ModelFloats(ModelBlock):
    """Runs them, as `ModelBlock` does the others."""

    def subtract(self, x, y):
        return _bits(np.subtract, x, y)

    def multiply(self, x, y):
        return _bits(np.multiply, x, y)

    def divide(self, x, y):
        return _bits(np.divide, x, y)

    def higher(self, x, y):
        return _bits(np.fmax, x, y)

    def exp2(self, x):
        return _bits(np.exp2, x)

    def log2(self, x):
        return _bits(np.log2, x)

    def raise_word(self, array, i, value, where):
        at, lanes = self._locate(array, i + self.constant(0), where)
        self._check(at, lanes, self._writer, self._reader)
        self._mark(self._adder, at, lanes)  # as additions, these may meet each other
        np.maximum.at(self.memory, at, value[lanes])

    def own_row(self, array, row, width):
        start = row.astype(np.int64) * width
        return GlobalRow((array, start - start % 4), (start % 4).astype(np.uint32))

    def store4_global(self, row, i, values, where):
        array, base = row.base
        lanes = self._active & where
        for n, value in enumerate(values):
            at = base + 4 * i[lanes].astype(np.int64) + n
            assert (at < array.size).all(), "beyond the array"
            array.view(np.uint32)[at] = value[lanes]


def _bits(function: Callable, *operands):
    with np.errstate(all="ignore"):
        return function(*(x.view(np.float32) for x in operands)).astype(np.float32).view(np.uint32)


def positive(x: Any) -> Any:
    """Where a float is larger than 0."""
    return (x - 1) < 0x7F800000


def number(block: Any, value: float) -> Any:
    """A float in all lanes."""
    return block.constant(int(np.float32(value).view(np.uint32)))


def word(block: Any, array: Any, i: Any) -> Any:
    """The i-th of the words of an array in the memory; each lane its own."""
    return block.load_global(block.global_row(array, block.constant(0), 1), block.constant(0) + i)


def fold(block: Any, words: Words, x: Any, combine: Callable, nothing: float) -> Any:
    """A float of all lanes of the CTA combined, in all of them; in an order that never changes.

    There is one barrier inside. The words, one for each of 32 warps, may be written again when all
    lanes have passed another.
    """

    def over_warp(x):
        for distance in (16, 8, 4, 2, 1):
            x = combine(x, block.shuffle(x, block.lane ^ distance))
        return x

    block.store(words, block.warp, over_warp(x), where=block.lane == 0)
    block.barrier()
    theirs = block.load(words, block.lane)  # those past the last warp hold garbage
    return over_warp(block.select(block.lane < block.warps, theirs, number(block, nothing)))


def launch(
    name: str, program: Callable, results: Sequence[jax.ShapeDtypeStruct], *arrays: jax.Array,
    tasks: int, threads: int, words: int = 4,
) -> Sequence[jax.Array]:  # fmt: skip
    """Runs `program(block, task, *arrays, *results)` on the GPU, a CTA a task.

    Args:
        name: the kernel's, as a profiler shows it.
        program: for the lanes of a CTA.
        results: of 32-bit words; the program writes them.
        *arrays: of 32-bit words.
        tasks: how many CTAs.
        threads: of a CTA, a multiple of 128.
        words: of its shared memory.
    """
    references = [plgpu.RefType()] * (len(arrays) + len(results) + 1)

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(*references, plgpu.Layout.WG_SPLAT))
        def lanes(_, *refs_and_task):
            *refs, scratch, task = refs_and_task
            program(SimtFloats(threads, scratch), U32(task.registers.item()), *refs)

        lanes(*refs, lax.axis_index("task"))

    return plgpu.kernel(
        body,
        out_type=list(results),
        scratch_types=[plgpu.SMEM((words,), jnp.int32)],
        grid=(tasks,),
        grid_names=("task",),
        num_threads=threads // (4 * WARP),
        thread_name="warpgroup",
        kernel_name=name,
        # The program speaks of single lanes; nothing here needs layout inference.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(*arrays)


def simulate(
    name: str, program: Callable, results: Sequence[jax.ShapeDtypeStruct], *arrays: Any,
    tasks: int, threads: int, words: int = 4,
) -> Sequence[np.ndarray]:  # fmt: skip
    """Runs it on the CPU, with race detection; results are poisoned first."""
    del name
    found = [np.full(np.prod(x.shape), -9, x.dtype) for x in results]
    flat = [np.ascontiguousarray(array).ravel() for array in arrays]
    for task in range(tasks):
        block = ModelFloats(threads, words)
        program(block, block.constant(task), *flat, *found)
    return [x.reshape(like.shape) for x, like in zip(found, results, strict=True)]
