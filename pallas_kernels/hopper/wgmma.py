# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Products added to arrays in registers, on the tensor core, with a twin for interpret mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.tiles import SWIZZLED


class Product(NamedTuple):
    """`accumulators[number] += left @ right`, started.

    `left` is an SMEM ref, or an array in layout `WGMMA`; `right` is an SMEM ref.
    """

    number: int
    left: Any
    right: Any


class Until(NamedTuple):
    """Waits until at most so many of the products started are unfinished."""

    unfinished: int


def multiply_add(
    accumulators: Sequence[jax.Array],
    steps: Sequence[Product | Until | Callable[[], None]],
    interpret: bool,
) -> list[jax.Array]:
    """The accumulators after the products of the steps, all waited for.

    Args:
        accumulators: f32, in layout `WGMMA`.
        steps: products, waits, and what to do in between (it may not touch the accumulators).
        interpret: whether to run the twin: interpret mode has neither accumulators that start
            from a value nor left factors in registers.
    """
    if interpret:
        accumulators = list(accumulators)
        for step in steps:
            if isinstance(step, Product):
                left = step.left if isinstance(step.left, jax.Array) else step.left[...]
                product = jnp.dot(left, step.right[...], preferred_element_type=jnp.float32)
                accumulators[step.number] += product
            elif isinstance(step, Until):
                # wgmma reads through the async proxy, the twin has read as if before this fence.
                plgpu.commit_smem()
            else:
                step()
        plgpu.commit_smem()
        return accumulators

    def run(refs):
        for step in steps:
            if isinstance(step, Product):
                plgpu.wgmma(refs[step.number], step.left, step.right)
            elif isinstance(step, Until):
                plgpu.wgmma_wait(step.unfinished)
            else:
                step()

    return list(pl.run_state(run)([plgpu.ACC.init(acc) for acc in accumulators]))


def multiply(
    shape: tuple[int, int],
    steps: Sequence[tuple[Any, Any] | Callable[[], None]],
    interpret: bool,
) -> jax.Array:
    """The sum of products, waited for.

    Args:
        shape: of the result.
        steps: `(left, right)` factors as in `Product`, and what to do in between.
        interpret: whether to run the twin.
    """
    if interpret:
        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        added = [step if callable(step) else Product(0, *step) for step in steps]
        return multiply_add([zeros], added, interpret)[0]

    def run(accumulator):
        for step in steps:
            if callable(step):
                step()
            else:
                plgpu.wgmma(accumulator, *step)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def add_products(accumulator, lefts, tile, chunks, *, first: bool, interpret: bool):
    """`accumulator + sum_i lefts[i] @ tile[:, chunks[i]].T`, started but not waited for.

    For many narrow products in a row: one fence for all, and descriptors that cost one addition
    each. Nothing may touch the accumulator before `finish`.

    Args:
        accumulator: f32 `[64, n]`, in layout `WGMMA`.
        lefts: bf16 `[64, 64]` each, all arrays in layout `WGMMA` or all SMEM refs.
        tile: SMEM bf16 `[n, C]`, laid out as `tiles.SWIZZLED`.
        chunks: for each left factor the columns of the tile, in units of 64.
        first: whether accumulator and left factors may have been written since the last fence.
        interpret: whether to run the twin.
    """
    in_registers = isinstance(lefts[0], jax.Array)
    if interpret:
        for left, chunk in zip(lefts, chunks, strict=True):
            left = left if in_registers else left[...]
            right = tile[:, 64 * chunk : 64 * (chunk + 1)]
            accumulator += jnp.dot(left, right.T, preferred_element_type=jnp.float32)
        return accumulator
    keys, width = tile.shape
    right_high = 1 << 30 | width // 64 * 1024 >> 4
    left_high = 1 << 30 | 1024 >> 4
    left_type = plgpu.Layout.WGMMA if in_registers else plgpu.RefType(SWIZZLED)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(SWIZZLED), *[left_type] * len(lefts)),
        return_type=plgpu.ShapeDtypeStruct((64, keys), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def emit(_, accumulator, tile, *lefts):
        i32 = ir.IntegerType.get_signless(32)

        def low_word(ref):
            address = llvm.ptrtoint(i32, utils.memref_ptr(ref))
            return arith.shrui(address, arith.constant(i32, 4))

        start = accumulator.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT)
        count = start.registers.size
        operands = [low_word(tile)]
        lines = ["wgmma.fence.sync.aligned;"] if first else []
        for left, chunk in zip(lefts, chunks, strict=True):
            if not in_registers:
                operands.append(low_word(left))
            left_word = 2 * count + len(operands) - 1
            for step in range(4):
                if in_registers:
                    piece = left[:, 16 * step : 16 * (step + 1)].registers.flat
                    names = range(2 * count + len(operands), 2 * count + len(operands) + 4)
                    operands += [utils.bitcast(register, i32) for register in piece]
                    a, left_line = "{" + ", ".join(f"${n}" for n in names) + "}", ""
                else:
                    a = "a"
                    left_line = (
                        f"add.u32 low, ${left_word}, {2 * step}; mov.b64 a, {{low, {left_high}}};"
                    )
                lines.append(
                    f"{left_line} add.u32 low, ${2 * count}, {64 * chunk + 2 * step}; "
                    f"mov.b64 b, {{low, {right_high}}}; "
                    f"wgmma.mma_async.sync.aligned.m64n{keys}k16.f32.bf16.bf16 "
                    f"{{{', '.join(f'${i}' for i in range(count))}}}, {a}, b, 1, 1, 1"
                    + (", 0;" if in_registers else ", 0, 0;")
                )
        lines.append("wgmma.commit_group.sync.aligned;")
        registers = _asm(
            "{ .reg .b32 low; .reg .b64 a, b;\n" + "\n".join(lines) + " }", start, operands
        )
        result = fa.FragmentedArray(_registers=registers, _layout=start.layout, _is_signed=None)
        return result.to_layout(fa.WGMMA_LAYOUT)

    return emit(accumulator, tile, *lefts)


def finish(accumulator, interpret: bool):
    """The accumulator of `add_products`, waited for."""
    if interpret:
        plgpu.commit_smem()
        return accumulator

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(
            accumulator.shape, jnp.float32, layout=plgpu.Layout.WGMMA
        ),
    )
    def emit(_, accumulator):
        start = accumulator.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT)
        registers = _asm("wgmma.wait_group.sync.aligned 0;", start, [])
        result = fa.FragmentedArray(_registers=registers, _layout=start.layout, _is_signed=None)
        return result.to_layout(fa.WGMMA_LAYOUT)

    return emit(accumulator)


def _asm(text, accumulator, operands):
    """Registers of an accumulator after assembly that reads and writes them as `$0` and so on."""
    registers = list(accumulator.registers.flat)
    count = len(registers)
    kinds = ["=f"] * count + [str(i) for i in range(count)] + ["r"] * len(operands)
    one = ir.VectorType.get((1,), ir.F32Type.get())
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([one] * count),
        [*registers, *operands],
        text,
        ",".join(kinds),
        asm_dialect=0,
        has_side_effects=True,
    )
    values = [llvm.extractvalue(one, struct, [i]) for i in range(count)]
    return np.array(values, dtype=object).reshape(accumulator.registers.shape)
