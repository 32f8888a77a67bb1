# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Which elements of a product are positive, a bit each: what relu's gradient needs of it.

A lane holds 32 of the 64 x 64 elements. Its bits are one word, in whatever order: kernels that load
the words find the elements where those that stored them had them.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.gather import LANES
from pallas_kernels.hopper.operands import scalar

SIZE = 64  # rows and columns
_BITS = 32
WORDS = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
"""How the words of a tile lie in registers."""


def pack(products: Any, interpret: bool):
    """The signs, i32 `[128]`, of f32 `[64, 64]` in layout `WGMMA`."""
    if interpret:
        bits = (products > 0).reshape(LANES, _BITS).astype(jnp.uint32)
        words = (bits << jnp.arange(_BITS, dtype=jnp.uint32)).sum(axis=1, dtype=jnp.uint32)
        return lax.bitcast_convert_type(words, jnp.int32)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((LANES,), jnp.int32, layout=WORDS),
    )
    def emit(_, products):
        i32, word = _i32(), _word(0)
        zero = arith.constant(ir.F32Type.get(), 0.0)
        for i, value in enumerate(_singles(products).flat):
            positive = arith.cmpf(arith.CmpFPredicate.OGT, scalar(value), zero)
            word = arith.ori(word, arith.select(positive, _word(1 << i), _word(0)))
        words = np.array([llvm.bitcast(ir.VectorType.get((1,), i32), word)], dtype=object)
        layout = fa.WGStridedFragLayout((LANES,), 1)
        return fa.FragmentedArray(_registers=words, _layout=layout, _is_signed=True)

    return emit(products)


def where_positive(words: Any, values: Any, interpret: bool):
    """`values[r]` where the element was positive, else 0: f32 `[64, 64]` in layout `WGMMA`.

    Args:
        words: i32 `[128]` of `pack`, in layout `WORDS`.
        values: f32 `[64]`, by rows of `WGMMA`.
        interpret: whether to run the twin.
    """
    if interpret:
        unsigned = lax.bitcast_convert_type(words, jnp.uint32)[:, None]
        bits = (unsigned >> jnp.arange(_BITS, dtype=jnp.uint32)) & 1
        return jnp.where(bits.reshape(SIZE, SIZE) == 1, values[:, None], 0.0)
    shape = SIZE, SIZE

    @plgpu.inline_mgpu(
        arg_types=(WORDS, plgpu.Layout.WGMMA.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def emit(_, words, values):
        f32 = ir.F32Type.get()
        word = scalar(words.registers.item())
        halves = [scalar(x) for x in values.registers.flat]
        layout = fa.WGMMA_LAYOUT_ACC_32BIT
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        nothing = arith.constant(f32, 0.0)
        # Of each 8 columns two, of either half of a warp's 16 rows.
        for i in range(registers.size):
            bit = arith.andi(word, _word(1 << i))
            positive = arith.cmpi(arith.CmpIPredicate.ne, bit, _word(0))
            value = arith.select(positive, halves[i // 2 % 2], nothing)
            registers.flat[i] = llvm.bitcast(ir.VectorType.get((1,), f32), value)
        found = fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
        return found.to_layout(fa.WGMMA_LAYOUT)

    return emit(words, values)


def _singles(array: Any) -> Any:
    return array.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers


def _word(value: int) -> Any:
    return arith.constant(_i32(), value - (1 << 32) if value >> 31 else value)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)
