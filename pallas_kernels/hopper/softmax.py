# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""The running maximum of an online softmax, raised only where it must be.

The maximum is there so that exponentials do not overflow; any number near it does as well. So one
that lags behind by up to 2**SLACK costs nothing, and in most tiles nothing is to be rescaled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.hopper.operands import scalar

SLACK = 8.0  # in base 2
_COLUMNS = 8  # that four lanes hold of a row at a time


def raised(top: jax.Array, scores: jax.Array, scale: float, interpret: bool) -> jax.Array:
    """`max(top, row maxima of the scores)` for a warp with a row that needs it, else `top`.

    Args:
        top: f32 `[64]`, in layout `WGMMA.reduce(1)`.
        scores: f32 `[64, n]`, in layout `WGMMA`.
        scale: of the scores, in base 2, positive.
        interpret: whether to run the twin, which raises all rows or none.
    """
    slack = SLACK / scale
    if interpret:
        highest = scores.max(axis=1)
        return jnp.where(jnp.any(highest > top + slack), jnp.maximum(top, highest), top)
    highest = scores[:, :_COLUMNS]
    for i in range(_COLUMNS, scores.shape[1], _COLUMNS):
        highest = jnp.maximum(highest, scores[:, i : i + _COLUMNS])
    row = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(row, plgpu.Layout.WGMMA),
        return_type=plgpu.ShapeDtypeStruct(top.shape, jnp.float32, layout=row),
    )
    def emit(_, top, highest):
        f32 = ir.F32Type.get()
        tops = [scalar(register) for register in top.registers.flat]
        pairs = [
            arith.maximumf(scalar(register, 0), scalar(register, 1))
            for register in highest.registers.flat
        ]
        assert len(tops) == len(pairs) == 2, (top.registers.shape, highest.registers.shape)
        text = """{
            .reg .pred p, q; .reg .f32 a, b;
            add.f32 a, $2, $6; add.f32 b, $3, $6;
            setp.gt.f32 p, $4, a; setp.gt.or.f32 p, $5, b, p;
            vote.sync.any.pred q, p, 0xffffffff;
            mov.f32 $0, $2; mov.f32 $1, $3;
            @!q bra DONE;
            max.f32 $0, $0, $4; max.f32 $1, $1, $5;
            shfl.sync.bfly.b32 a, $0, 1, 0x1f, 0xffffffff; max.f32 $0, $0, a;
            shfl.sync.bfly.b32 b, $1, 1, 0x1f, 0xffffffff; max.f32 $1, $1, b;
            shfl.sync.bfly.b32 a, $0, 2, 0x1f, 0xffffffff; max.f32 $0, $0, a;
            shfl.sync.bfly.b32 b, $1, 2, 0x1f, 0xffffffff; max.f32 $1, $1, b;
            DONE: }"""
        struct = llvm.inline_asm(
            llvm.StructType.get_literal([f32, f32]),
            [*tops, *pairs, arith.constant(f32, slack)],
            text,
            "=&f,=&f,f,f,f,f,f",
            asm_dialect=0,
            has_side_effects=True,
        )
        values = [llvm.extractvalue(f32, struct, [i]) for i in range(2)]
        return _like(top, values)

    return emit(top, highest)


def rescaled(accumulators: list[jax.Array], factor: jax.Array, interpret: bool) -> list[jax.Array]:
    """The accumulators times the factor of their row; a warp all of whose factors are 1 is quick.

    Args:
        accumulators: f32 `[64, n]` each, in layout `WGMMA`.
        factor: f32 `[64]`, in layout `WGMMA.reduce(1)`.
        interpret: whether to run the twin.
    """
    if interpret:
        return [acc * lax.broadcast_in_dim(factor, acc.shape, (0,)) for acc in accumulators]

    def one(accumulator):
        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)),
            return_type=plgpu.ShapeDtypeStruct(
                accumulator.shape, jnp.float32, layout=plgpu.Layout.WGMMA
            ),
        )
        def emit(_, accumulator, factor):
            start = accumulator.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT)
            registers = list(start.registers.flat)
            count = len(registers)
            factors = [scalar(register) for register in factor.registers.flat]
            # Of four registers in a row, two are of one row and two of the row eight below.
            products = "\n".join(
                f"mul.f32 ${i}, ${i}, ${2 * count + i // 2 % 2};" for i in range(count)
            )
            text = f"""{{
                .reg .pred p, q;
                setp.neu.f32 p, ${2 * count}, 0f3F800000;
                setp.neu.or.f32 p, ${2 * count + 1}, 0f3F800000, p;
                vote.sync.any.pred q, p, 0xffffffff;
                @!q bra DONE;
                {products}
                DONE: }}"""
            one = registers[0].type
            struct = llvm.inline_asm(
                llvm.StructType.get_literal([one] * count),
                [*registers, *factors],
                text,
                ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f", "f"]),
                asm_dialect=0,
                has_side_effects=True,
            )
            values = [llvm.extractvalue(one, struct, [i]) for i in range(count)]
            return _like(start, values).to_layout(fa.WGMMA_LAYOUT)

        return emit(accumulator, factor)

    return [one(accumulator) for accumulator in accumulators]


def _like(array, values):
    """A `FragmentedArray` of the same layout with other registers."""

    kind = array.registers.flat[0].type
    if isinstance(kind, ir.VectorType) and not isinstance(values[0].type, ir.VectorType):
        values = [vector.broadcast(kind, value) for value in values]
    registers = np.array(values, dtype=object).reshape(array.registers.shape)
    return fa.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)
