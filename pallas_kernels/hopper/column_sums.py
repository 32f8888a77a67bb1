# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Sums over the rows of tiles in registers, roughly and quickly: in packed bf16, a warp's apart.

    sums[w, c] = sum_r |x[r, c]| weight[r]         over the 16 rows r of warp w

Mosaic GPU's own sum over rows is in fp32 and goes through SMEM: six times the instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

WARPS = 4
ROUNDINGS = 2**-5
"""More than all roundings take off a sum, as a share of it."""


def store_column_sums(
    terms: Sequence[tuple[jax.Array, jax.Array]], target: Any, interpret: bool
) -> None:
    """Stores the column sums of a tile, added up over terms, of each 16 rows.

    Args:
        terms: tiles, bf16 `[64, 64]` in layout `WGMMA`, each with the weights of its rows, f32
            `[64]` in layout `WGMMA.reduce(1)`, not negative, bf16 in value.
        target: GMEM bf16 `[4, 64]`.
        interpret: whether this is the twin.
    """
    if interpret:
        total = jnp.zeros((64, 64), jnp.float32)
        for tile, weight in terms:
            total += jnp.abs(tile.astype(jnp.float32)) * lax.broadcast_in_dim(
                weight, (64, 64), (0,)
            )
        target[...] = total.reshape(WARPS, 16, 64).sum(axis=1).astype(jnp.bfloat16)
        return

    types = [plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)] * len(terms)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *types))
    def emit(_, target, *flat):
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))

        def ask(text, *operands):
            kinds = ",".join(["=r"] + ["r"] * len(operands))
            return llvm.inline_asm(i32, list(operands), text, kinds, has_side_effects=False)

        def word(value):
            return arith.constant(i32, value)

        def twice(weight):
            return ask("cvt.rn.bf16x2.f32 $0, $1, $1;", utils.bitcast(weight, i32))

        def size(pair):
            return arith.andi(utils.bitcast(pair, i32), word(0x7FFF7FFF))

        weights = [[twice(w) for w in weight.registers.flat] for weight in flat[1::2]]
        # A lane has two rows, and of each 8 columns two.
        sums = []
        for start in range(0, 64, 8):
            total = None
            for tile, both in zip(flat[::2], weights, strict=True):
                pairs = tile[:, start : start + 8].registers.flat
                for pair, weight in zip(pairs, both, strict=True):
                    if total is None:
                        total = ask("mul.rn.bf16x2 $0, $1, $2;", size(pair), weight)
                    else:
                        total = ask("fma.rn.bf16x2 $0, $1, $2, $3;", size(pair), weight, total)
            sums.append(total)
        # Eight lanes have the same columns: they halve between them what each adds up.
        lane = arith.remui(utils.thread_idx(), word(32))
        for distance in (16, 8, 4):
            half = len(sums) // 2
            upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, word(distance)), word(0))
            kept = []
            for low, high in zip(sums[:half], sums[half:], strict=True):
                given = utils.shfl_bfly(arith.select(upper, low, high), distance)
                kept.append(ask("add.rn.bf16x2 $0, $1, $2;", arith.select(upper, high, low), given))
            sums = kept
        [total] = sums
        # What a lane has are the columns 2 lane and 2 lane + 1.
        warp = arith.remui(arith.divui(utils.thread_idx(), word(32)), word(WARPS))
        pointer = llvm.addrspacecast(
            llvm.PointerType.get(address_space=1), utils.memref_ptr(target)
        )
        at = arith.addi(arith.muli(warp, word(128)), arith.muli(lane, word(4)))
        address = arith.addi(llvm.ptrtoint(i64, pointer), arith.extui(i64, at))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"), [address, total],
            "st.global.b32 [$0], $1;", "l,r", has_side_effects=True,
        )  # fmt: skip

    emit(target, *(x for term in terms for x in term))
