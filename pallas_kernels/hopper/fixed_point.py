# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Sums of rows by key whose bits do not depend on the order in which rows are added.

    sums[s] = sum of rows[p] over the pairs p whose key is s

Sums of integers have no order, so atomics may add them up. Every key has a unit, a power of two
that is so small that its terms are integers of some 18 bits, and so large that no sum of them can
overflow. Two columns share a word of 64 bits, hi 2^32 + lo, both signed; so do their sums, and one
atomic adds both. Where all sums fit the L2, they are added up there, and no row goes to the memory.

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

_MAX_BITS = 21  # of a term: what adding 1.5 x 2^23 rounds to an integer
_ROUND = 0x4B400000  # the bits of 1.5 x 2^23
_MIN_EXPONENT = -80  # smaller terms than 2^-80 are 0: the inverse of a unit has to be a float


def units(largest, terms: int):
    """How many of its units make 1, a power of two, and how large one is; for each key.

    Args:
        largest: f32 `[keys]`, a bound on the absolute values of a key's terms.
        terms: how many a key has, at most; up to 2^24.

    Returns:
        `(per_one, one)`, f32 `[keys]`: terms are multiplied by the first, sums by the second. Where
        the bound is not finite they are 0 and NaN, and so is the sum.
    """
    bits = min(_MAX_BITS, 30 - (terms - 1).bit_length())
    _, exponent = jnp.frexp(largest)  # largest < 2**exponent
    exponent = jnp.clip(exponent, min=_MIN_EXPONENT)
    finite = jnp.isfinite(largest)
    per_one = jnp.where(finite, _power(bits - exponent), 0.0)
    return per_one, jnp.where(finite, _power(exponent - bits), jnp.nan)


def _power(exponent):
    """2**exponent, exactly; at least 2**-126."""
    bits = jnp.clip(exponent + 127, 1, 254).astype(jnp.int32) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)


def to_floats(sums, one):
    """What `add_rows` has added up, f32 `[keys, columns]`, given each key's unit."""
    return (sums + _borrowed(sums)).astype(jnp.float32) * one[:, None]


def _borrowed(words):
    """The high word of hi 2^32 + lo is hi - 1 where lo < 0: by how much it is short."""
    odd = jnp.arange(words.shape[-1]) % 2 == 1
    return (odd & (jnp.roll(words, 1, axis=-1) < 0)).astype(jnp.int32)


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


def add_rows(sums, rows, keys, per_one, first_key, stage, *, limit: int, interpret: bool) -> None:
    """`sums[first_key + keys[r]] += rows[r] per_one[r]`, rounded to integers, for 64 rows.

    Each warp turns its own 16 rows in shared memory, and adds 256 bytes of one at a time: the L2 is
    faster with whole lines than with the 32 bytes that four lanes of a product hold together.

    Args:
        sums: GMEM i32 `[keys, 128]`.
        rows: f32 `[64, 128]`, in layout `WGMMA`.
        keys: i32 `[64]`, by its rows; one outside `0 .. limit - 1` has no sum.
        per_one: f32 `[64]`, likewise, of each row's key.
        first_key: added to every key.
        stage: SMEM i32 `[64, 128]`, of this warpgroup alone.
        limit: see `keys`.
        interpret: whether to run the twin, which is of one CTA.
    """
    if interpret:
        _add_rows_twin(sums, rows, keys, per_one, first_key, limit)
        return
    row = plgpu.Layout.WGMMA.reduce(1)

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
        _run("bar.warp.sync 0xffffffff;", "")
        # [16 times 8 columns, 2 halves of a warp's 16 rows, 2 columns]
        singles = singles.reshape(16, 2, 2)
        for half in range(2):
            values = [scalar(x) for x in singles[:, half].flat]
            kinds = ",".join(["f"] * 32 + ["f", "r", "r"])
            _run(_put(half), kinds, *values, per_one[half], lane, place)
        _run("bar.warp.sync 0xffffffff;", "")
        first = first_key.registers.item()
        _run(_add(limit), "r,r,r,r,r,l", *keys, first, lane, place, _address(sums))

    emit(sums, rows, keys, per_one, first_key, stage)


# A row of the stage is 64 words of 64 bits. Word 4 i + j is at 4 (i ^ r % 4) + j in row r: neither
# the four words of each of eight rows nor all words of a row meet in a bank more than they must.


def _put(half: int) -> str:
    """Words to where a lane's row is staged; operands: 32 values, per_one, lane, stage."""
    factor, lane, stage = "$32", "$33", "$34"
    lines = [
        ".reg .b32 at, row, part, lo, hi, at0, at1, at2, at3; .reg .b64 both;",
        f"shr.u32 at, {lane}, 5; shl.b32 at, at, 4; bfe.u32 row, {lane}, 2, 3;",
        f"add.u32 at, at, row; mad.lo.u32 at, at, 512, {stage};",
        f"and.b32 part, {lane}, 3; mad.lo.u32 at, part, 8, at; and.b32 row, row, 3;",
    ]
    for i in range(4):
        lines.append(f"xor.b32 part, row, {i}; mad.lo.u32 at{i}, part, 32, at;")
    for i in range(16):
        lines += [
            f"fma.rn.f32 lo, ${2 * i}, {factor}, 0f{_ROUND:08X};",
            f"fma.rn.f32 hi, ${2 * i + 1}, {factor}, 0f{_ROUND:08X};",
            # hi 2^32 + lo, of which each is its bits less those of 1.5 x 2^23
            f"mov.b64 both, {{lo, hi}}; sub.s64 both, both, {_ROUND << 32 | _ROUND};",
            f"st.shared.b64 [at{i % 4} + {4096 * half + 128 * (i // 4)}], both;",
        ]
    return "{ " + "\n".join(lines) + " }"


def _add(limit: int) -> str:
    """A warp's rows, one after the other.

    Operands: the keys of rows r and r + 8 that lane 4 r holds, first key, lane, stage, sums.
    """
    lines = [
        ".reg .pred in; .reg .b32 lane, at, key, at0, at1, at2, at3; .reg .b64 to, start, both;",
        "and.b32 lane, $3, 31; shr.u32 at, $3, 5; mad.lo.u32 at, at, 8192, $4;",
        "mad.wide.u32 start, lane, 8, $5;",
    ]
    for i in range(4):
        lines.append(f"xor.b32 key, lane, {4 * i}; mad.lo.u32 at{i}, key, 8, at;")
    for row in range(16):
        lines += [
            f"shfl.sync.idx.b32 key, ${row // 8}, {row % 8 * 4}, 31, 0xffffffff;",
            f"setp.lt.u32 in, key, {limit}; add.u32 key, key, $2;",
            "mad.wide.u32 to, key, 512, start;",
        ]
        for part in range(2):
            lines += [
                f"ld.shared.b64 both, [at{row % 4} + {512 * row + 256 * part}];",
                f"@in red.relaxed.gpu.global.add.u64 [to + {256 * part}], both;",
            ]
    return "{ " + "\n".join(lines) + " }"


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
            before = sums[of, :]
            total = before + _borrowed(before) + terms[r]
            sums[of, :] = total - _borrowed(total)

    lax.fori_loop(0, rows.shape[0], add, None)


def _address(ref) -> Any:
    space = llvm.PointerType.get(address_space=1)
    pointer = llvm.addrspacecast(space, utils.memref_ptr(ref))
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), pointer)
