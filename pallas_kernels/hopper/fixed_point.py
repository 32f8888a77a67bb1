# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Sums of rows by key whose bits do not depend on the order in which rows are added.

    sums[s] = sum of rows[p] over the pairs p whose key is s

Sums of integers have no order, so atomics may add them up. Every key has a unit, a power of two
that is so small that its terms are integers of some 18 bits, and so large that no sum of them can
overflow. Where all sums fit the L2, they are added up there, and no row goes to the memory.

    units         from how large a key's terms can be
    add_rows      a tile of 64 rows, from the registers of a warpgroup
    to_floats     the sums
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.gather import LANES
from pallas_kernels.hopper.signs import scalar

_ROWS = 64
_APART = 8  # words between staged rows
_MAX_BITS = 21  # of a term: what adding 1.5 x 2^23 rounds to an integer
_ROUND = 0x4B400000  # the bits of 1.5 x 2^23
_MIN_EXPONENT = -80  # smaller terms than 2^-80 are 0: the inverse of a unit has to be a float


def units(largest, terms: int):
    """Of each key how many units make 1, a power of two; 0 where no term can be told from 0.

    Args:
        largest: f32 `[keys]`, a bound on the absolute values of a key's terms.
        terms: how many a key has, at most; up to 2^24.

    Returns:
        `(per_one, one)`, f32 `[keys]`: terms are multiplied by the first, sums by the second, which
        is NaN where the bound is not finite.
    """
    bits = min(_MAX_BITS, 30 - (terms - 1).bit_length())
    _, exponent = jnp.frexp(largest)  # largest < 2**exponent
    exponent = jnp.maximum(exponent, _MIN_EXPONENT)
    finite = jnp.isfinite(largest)
    per_one = jnp.where(finite, _power(bits - exponent), 0.0)
    return per_one, jnp.where(finite, _power(exponent - bits), jnp.nan)


def _power(exponent):
    """2**exponent, exactly; at least 2**-126."""
    bits = jnp.clip(exponent + 127, 1, 254).astype(jnp.int32) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)


def to_floats(sums, one):
    """What `add_rows` has added up, f32 `[keys, columns]`, given each key's unit."""
    return sums.astype(jnp.float32) * one[:, None]


def look_up(table, keys, interpret: bool):
    """`table[keys]`: a load of each lane, of which nothing waits until it is used.

    Args:
        table: GMEM f32 `[n]`.
        keys: i32 `[64]`, by rows of `WGMMA`; those outside give 0.
        interpret: whether to run the twin.
    """
    size = table.shape[0]
    if interpret:
        return jnp.where((keys >= 0) & (keys < size), table[...][jnp.clip(keys, 0, size - 1)], 0.0)
    row = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), row),
        return_type=plgpu.ShapeDtypeStruct(keys.shape, jnp.float32, layout=row),
    )
    def emit(_, table, keys):
        code = (
            f"{{ .reg .pred in; .reg .b64 at; setp.lt.u32 in, $1, {size};"
            " mad.wide.u32 at, $1, 4, $2; mov.f32 $0, 0f00000000; @in ld.global.nc.f32 $0, [at]; }"
        )
        f32 = ir.F32Type.get()

        def load(key):
            args = scalar(key), _address(table)
            return llvm.inline_asm(f32, args, code, "=&f,r,l", has_side_effects=True, asm_dialect=0)

        registers = keys.registers.copy()
        kind = registers.flat[0].type
        for i, key in enumerate(keys.registers.flat):
            found = load(key)
            if isinstance(kind, ir.VectorType):
                found = llvm.bitcast(ir.VectorType.get((1,), f32), found)
            registers.flat[i] = found
        return fa.FragmentedArray(_registers=registers, _layout=keys.layout, _is_signed=None)

    return emit(table, keys)


def staging(stages: int, columns: int):
    """SMEM for `add_rows`. Rows are that far apart that eight lie in different banks."""
    return plgpu.SMEM((stages, _ROWS, columns + _APART), jnp.int32)


def add_rows(
    sums, rows, keys, per_one, first_key, stage, *, stages: int, limit: int, interpret: bool
) -> None:
    """`sums[first_key + keys[r]] += rows[r] per_one[r]`, rounded to integers, for 64 rows.

    The additions are under way when this returns, until `finish`. Each warp adds its own 16 rows.

    Args:
        sums: GMEM i32 `[keys, columns]`.
        rows: f32 `[64, columns]`, in layout `WGMMA`.
        keys: i32 `[64]`, by its rows; one outside `0 .. limit - 1` has no sum.
        per_one: f32 `[64]`, likewise, of each row's key.
        first_key: added to every key.
        stage: one of those of `staging`, of this warpgroup alone: each in its turn.
        stages: how many there are. Rows of all but one may be on their way while others follow.
        limit: see `keys`.
        interpret: whether to run the twin, which is of one CTA.
    """
    if interpret:
        _add_rows_twin(sums, rows, keys, per_one, first_key, limit)
        return
    row = plgpu.Layout.WGMMA.reduce(1)
    columns = rows.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(),
            plgpu.Layout.WGMMA,
            row,
            row,
            plgpu.Layout.WG_SPLAT,
            plgpu.RefType(),
        )
    )
    def emit(_, sums, rows, keys, per_one, first_key, stage):
        singles = rows.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers
        keys, per_one = ([scalar(x) for x in array.registers.flat] for array in (keys, per_one))
        i32 = ir.IntegerType.get_signless(32)
        lane = arith.remui(utils.thread_idx(), arith.constant(i32, LANES))
        place = llvm.ptrtoint(i32, utils.memref_ptr(stage))
        _run(f"cp.async.bulk.wait_group.read {stages - 1}; bar.warp.sync 0xffffffff;", "")
        # [columns / 8, 2 halves of a warp's 16 rows, 2 columns]
        singles = singles.reshape(columns // 8, 2, 2)
        for half in range(2):
            values = [scalar(x) for x in singles[:, half].flat]
            kinds = ",".join(["f"] * len(values) + ["f", "r", "r"])
            _run(_put(half, columns), kinds, *values, per_one[half], lane, place)
        first = first_key.registers.item()
        _run(_send(columns, limit), "r,r,r,r,r,l", *keys, first, lane, place, _address(sums))

    emit(sums, rows, keys, per_one, first_key, stage)


def _put(half: int, columns: int) -> str:
    """Integers to where a lane's row is staged; operands: values, per_one, lane, stage."""
    factor, lane, stage = (f"${columns // 4 + i}" for i in range(3))
    row_bytes = 4 * (columns + _APART)
    lines = [
        ".reg .b32 at, part, even, odd;",
        f"shr.u32 part, {lane}, 5; shl.b32 part, part, 4;",  # 16 rows a warp
        f"bfe.u32 at, {lane}, 2, 3; add.u32 at, at, part;",
        f"mad.lo.u32 at, at, {row_bytes}, {stage};",
        f"and.b32 part, {lane}, 3; mad.lo.u32 at, part, 8, at;",
    ]
    for i in range(columns // 8):
        for name, n in (("even", 2 * i), ("odd", 2 * i + 1)):
            lines.append(f"fma.rn.f32 {name}, ${n}, {factor}, 0f{_ROUND:08X};")
            lines.append(f"sub.s32 {name}, {name}, {_ROUND};")
        lines.append(f"st.shared.v2.b32 [at + {8 * half * row_bytes + 32 * i}], {{even, odd}};")
    return "{ " + "\n".join(lines) + " }"


def _send(columns: int, limit: int) -> str:
    """Additions under way; operands: keys of both halves, first key, lane, stage, sums.

    Two of the four lanes that hold a row's and its fellow's values send a row each.
    """
    row_bytes = 4 * (columns + _APART)
    return f"""{{
        .reg .pred sends, second; .reg .b32 key, row, part; .reg .b64 to;
        fence.proxy.async.shared::cta;
        bar.warp.sync 0xffffffff;
        and.b32 part, $3, 3;
        setp.eq.u32 second, part, 1;
        selp.b32 key, $1, $0, second;
        setp.lt.u32 sends, part, 2;
        setp.lt.and.u32 sends, key, {limit}, sends;
        add.u32 key, key, $2;
        mad.wide.u32 to, key, {4 * columns}, $5;
        shr.u32 row, $3, 5;
        shl.b32 row, row, 4;
        mad.lo.u32 row, part, 8, row;
        bfe.u32 part, $3, 2, 3;
        add.u32 row, row, part;
        mad.lo.u32 row, row, {row_bytes}, $4;
        @sends cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32
            [to], [row], {4 * columns};
        cp.async.bulk.commit_group;
    }}"""


def finish(interpret: bool) -> None:
    """Waits for what `add_rows` has under way."""
    if not interpret:
        plgpu.inline_mgpu()(lambda _: _run("cp.async.bulk.wait_group 0;", ""))()


def _run(code: str, constraints: str, *operands) -> None:
    void = ir.Type.parse("!llvm.void")
    kinds = ",".join(filter(None, [constraints, "~{memory}"]))
    llvm.inline_asm(void, operands, code, kinds, has_side_effects=True, asm_dialect=0)


def _add_rows_twin(sums, rows, keys, per_one, first_key, limit) -> None:
    terms = jnp.round(rows * per_one[:, None]).astype(jnp.int32)

    def add(r, _):
        @pl.when((keys[r] >= 0) & (keys[r] < limit))
        def _():
            of = first_key + keys[r]
            sums[of, :] = sums[of, :] + terms[r]

    lax.fori_loop(0, rows.shape[0], add, None)


def _address(ref) -> Any:
    space = llvm.PointerType.get(address_space=1)
    pointer = llvm.addrspacecast(space, utils.memref_ptr(ref))
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), pointer)
