# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""One tile of indexer scores on Hopper: 64 keys against one warpgroup's queries, in registers.

    out[t, s] = k_scale[s] * sum_i w[t, i] * relu(k[s] . q[t, i])

`multiply` issues the products of a `[64, H]` tile of keys and the `[n * I, H]` queries of n tokens
to the tensor cores; `store_scores` waits for them and reduces the heads without leaving the
registers. Keys are the M operand, (token, head) the N operand, so the sum over heads runs along
the columns that a thread already holds: `n * I / 4` of each of its two rows. What remains is a sum
over the four lanes of a quad, done as a reduce-scatter so that every lane ends with a score of its
own to mask, scale and store. It is inline PTX because the accumulator must start undefined (the
first wgmma overwrites it; clearing 64 registers would cost a quarter of the reduction), and
because a lane's own key and token are known only there.

In interpret mode each function does the same in Pallas operations.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.operands import global_pointer, scalar

KEYS = 64  # rows of one wgmma
COLUMNS = 128  # (token, head) pairs of one warpgroup: 64 accumulators and 32 weights a thread
_A_LANE = plgpu.Layout.WG_STRIDED((128,), vec_size=1)  # one value a lane
_FIRST_TURN = 8  # named barriers: Mosaic's own are numbered from 0, one a warpgroup
_PTX_TYPE = {"f8E4M3FN": "e4m3", "bf16": "bf16"}


def transforms(width: int, dtype) -> tuple:
    """Tiling and swizzle of a `[rows, width]` wgmma operand in shared memory."""
    row = min(width * jnp.dtype(dtype).itemsize, 128)
    return (
        plgpu.TilingTransform((8, row // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(row),
    )


def ranges_layout(tokens: int) -> Any:
    """The layout of a per-lane value for each of the `tokens / 2` tokens that a lane stores."""
    return plgpu.Layout.WG_STRIDED((64 * tokens,), vec_size=tokens // 2)


def load_ranges(start_ref, end_ref, batch, token, tokens: int, interpret: bool):
    """The key ranges of the tokens that each lane stores: start less the lane's row, and length.

    They are read from `[batch, token + ...]`; see `store_scores` for which token is whose.
    """
    if interpret:
        rows = pl.ds(token, tokens)
        start = start_ref[batch, rows]
        return start, jnp.maximum(end_ref[batch, rows] - start, 0)
    lanes = ranges_layout(tokens)
    bound = plgpu.ShapeDtypeStruct((64 * tokens,), jnp.int32, lanes)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()) + (plgpu.Layout.WG_SPLAT,) * 2,
        return_type=(bound, bound),
    )
    def load(_, start, end, batch, token):
        i32 = ir.IntegerType.get_signless(32)
        lane = _Lane(tokens)
        row = arith.muli(_splat(batch), _c(start.type.shape[1]))
        first_token = arith.addi(_splat(token), lane.token)
        starts, lengths = [], []
        for i in range(tokens // 2):
            at = arith.addi(row, arith.addi(first_token, _c(i)))
            first, last = (llvm.load(i32, _element(ref, at, i32)) for ref in (start, end))
            starts.append(arith.subi(first, lane.row))
            lengths.append(arith.maxsi(arith.subi(last, first), _c(0)))
        return _per_lane(starts, i32, lanes), _per_lane(lengths, i32, lanes)

    return load(start_ref, end_ref, batch, token)


def load_scales(scales_tile, part: int, interpret: bool):
    """Each lane's scale of its key, the `64 part + row`-th of a tile (see `store_scores`)."""
    if interpret:
        return scales_tile[pl.ds(part * KEYS, KEYS)]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((128,), jnp.float32, _A_LANE),
    )
    def load(_, scales):
        f32 = ir.F32Type.get()
        at = arith.addi(_Lane(2).row, _c(part * KEYS))
        place = utils.getelementptr(utils.memref_ptr(scales), [at], f32)
        return _per_lane([llvm.load(f32, place)], f32, _A_LANE)

    return load(scales_tile)


def multiply(k_tile, part: int, q_tile, warpgroup, *, consumers: int, interpret: bool):
    """Issues `k_tile[64 part : 64 part + 64] @ q_tile.T`, when it is this warpgroup's turn.

    Args:
        k_tile: `[64 n, H]` keys in shared memory.
        part: which 64 of them.
        q_tile: `[128, H]` queries in shared memory, token major.
        warpgroup: this one.
        consumers: warpgroups 0 .. consumers - 1 take turns (see `start_turns`).

    Returns:
        f32 `[64, 128]`, undefined until `store_scores` has waited for it.
    """
    if interpret:
        return pl.run_scoped(
            lambda acc: _multiply_interpretable(acc, k_tile.at[pl.ds(part * KEYS, KEYS)], q_tile),
            plgpu.ACC((KEYS, COLUMNS), jnp.float32),
        )
    tiles = plgpu.RefType(transforms(k_tile.shape[1], k_tile.dtype))

    @plgpu.inline_mgpu(
        arg_types=(tiles, tiles, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((KEYS, COLUMNS), jnp.float32, plgpu.Layout.WGMMA),
    )
    def issue(_, k, q, warpgroup):
        dots = _issue_wgmma(k, part, q, _turns(_splat(warpgroup), consumers))
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        registers = []
        for low, high in zip(dots[::2], dots[1::2], strict=True):
            register = llvm.insertelement(llvm.mlir_undef(pair), low, _c(0))
            registers.append(llvm.insertelement(register, high, _c(1)))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        shape = layout.registers_shape((KEYS, COLUMNS))
        # Eight columns after eight columns, in each the upper row, then the lower.
        return mgpu.FragmentedArray(
            _registers=_object_array(registers).reshape(shape), _layout=layout, _is_signed=None
        )

    return issue(k_tile, q_tile, warpgroup)


def _multiply_interpretable(acc, k, q):
    plgpu.wgmma(acc, k, q.T)
    return acc[...]


def store_scores(
    dots, weights, start, length, scales, out_ref, batch, token, key, *,
    heads: int, keys: int, queries: int, staging=None,
):  # fmt: skip
    """Scores of 64 keys for the n = 128 / heads tokens from `token` on, stored to `out_ref`.

    Lane l of warp v stores key `16 v + l / 4 + 8 (l & 1)` of the tokens
    `(l >> 1 & 1) n / 2 .. + n / 2`.

    Args:
        dots: from `multiply`; waited for here.
        weights: f32 `[128]` in the column layout of `dots`.
        start, length: key ranges from `load_ranges`; no length is negative.
        scales: from `load_scales`, or None.
        out_ref: `[B, T, S']` in global memory.
        batch, token, key: where the tile lies.
        heads: I.
        keys, queries: S and T: nothing is stored beyond them.
        staging: f32 `[n, 64]` in shared memory for interpret mode, which has no lanes; else None.
    """
    tokens = COLUMNS // heads
    if staging is not None:
        scores = _scores_interpretable(dots, weights, start, length, scales, key, heads)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = scores
        plgpu.commit_smem()
        box = out_ref.at[batch, pl.ds(token, tokens), pl.ds(key, KEYS)]
        plgpu.copy_smem_to_gmem(staging, box)
        return
    lanes = ranges_layout(tokens)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0), lanes, lanes)
        + (plgpu.Layout.WG_SPLAT,) * 3
        + (plgpu.RefType(),)
        + (_A_LANE,) * (scales is not None)
    )
    def store(_, dots, weights, start, length, batch, token, key, out, scale=None):
        lane = _Lane(tokens)
        batch, token, key = map(_splat, (batch, token, key))
        f32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(64)
        scores = lane.reduce_scatter(_weighted(_wait_wgmma(dots), weights, heads))
        _, rows, stride = out.type.shape
        hidden = arith.constant(f32, float("-inf"))
        token = arith.addi(token, lane.token)
        # What depends on the lane first: it is the same for all tiles of a block.
        row = arith.extui(i64, arith.addi(arith.muli(batch, _c(rows)), token))
        at = arith.muli(row, arith.constant(i64, stride))
        pointer = _element(out, arith.addi(at, arith.extui(i64, lane.row)), f32)
        pointer = _further(pointer, key, f32)
        for i, score in enumerate(scores):
            first, count = (_lane_value(bound, i) for bound in (start, length))
            if scale is not None:
                score = arith.mulf(score, _lane_value(scale, 0))
            # Unsigned, so that keys before the first are beyond the last.
            visible = arith.cmpi(arith.CmpIPredicate.ult, arith.subi(key, first), count)
            exists = arith.cmpi(arith.CmpIPredicate.slt, token, _c(queries - i))
            if keys % KEYS:
                in_keys = arith.cmpi(arith.CmpIPredicate.slt, arith.addi(key, lane.row), _c(keys))
                exists = arith.andi(exists, in_keys)
            place = utils.getelementptr(pointer, [i * stride], f32)
            _store(place, arith.select(visible, score, hidden), exists)

    arguments = (dots, weights, start, length, batch, token, key, out_ref)
    store(*arguments, *(() if scales is None else (scales,)))


def _scores_interpretable(dots, weights, start, length, scales, key, heads: int):
    weighted = jax.nn.relu(dots) * weights[None, :]
    scores = weighted.reshape(KEYS, COLUMNS // heads, heads).sum(axis=2).T
    if scales is not None:
        scores = scores * scales[None, :]
    at = key + jnp.arange(KEYS)[None, :] - start[:, None]
    return jnp.where((at >= 0) & (at < length[:, None]), scores, -jnp.inf)


class _Lane:
    """What a thread stores: its row of the tile, its tokens, and the sum over its quad."""

    def __init__(self, tokens: int):
        thread = arith.remui(utils.thread_idx(), _c(128))
        lane = arith.remui(thread, _c(32))
        self.tokens = tokens
        self._odd = arith.andi(lane, _c(1))
        self._upper = arith.andi(arith.shrui(lane, _c(1)), _c(1))
        # The first of the tokens that this lane stores, counted from the warpgroup's.
        self.token = arith.muli(self._upper, _c(tokens // 2))
        row = arith.addi(arith.muli(arith.divui(thread, _c(32)), _c(16)), arith.divui(lane, _c(4)))
        self.row = arith.addi(row, arith.muli(self._odd, _c(8)))

    def reduce_scatter(self, sums):
        """Sums `sums[token][row half]` over the quad; the lane's own `tokens / 2` scores."""
        totals = [self._exchange(self._odd, low, high, 1) for low, high in sums]
        half = self.tokens // 2
        return [self._exchange(self._upper, totals[i], totals[i + half], 2) for i in range(half)]

    @staticmethod
    def _exchange(bit, low, high, distance):
        """The lane whose bit is 0 keeps `low` of both, its partner `high` of both."""
        is_high = arith.cmpi(arith.CmpIPredicate.ne, bit, _c(0))
        mine = arith.select(is_high, high, low)
        theirs = utils.shfl_bfly(arith.select(is_high, low, high), distance)
        return arith.addf(mine, theirs)


def _issue_wgmma(k, part: int, q, turns):
    """The 64 accumulators of `k[part] @ q.T` that this thread holds; issued in turn."""
    element = ir.MemRefType(k.type).element_type
    bytewidth = utils.bytewidth(element)
    _, width = mma_utils.tiled_memref_shape(k)[0]
    swizzle = ir.MemRefType(k.type).shape[-1] * bytewidth
    group = swizzle // bytewidth
    (k_base, (_, k_step)), (k_rows, k_group), _ = mma_utils.create_descriptor(
        k,
        swizzle=swizzle,
        large_tile=(KEYS, group),
        group_size=(KEYS, group),
        logical_k_major=False,
    )
    (q_base, (_, q_step)), (_, q_group), _ = mma_utils.create_descriptor(
        utils.memref_transpose(q, (1, 0, 3, 2)),
        swizzle=swizzle,
        large_tile=(group, group),
        group_size=(group, COLUMNS),
        logical_k_major=True,
    )
    i64 = ir.IntegerType.get_signless(64)

    def shifted(base, offset):  # addresses stay below 2**18, so nothing carries out of the field
        at = arith.constant(i64, mma_utils.encode_addr(offset))
        return llvm.add(base, at, llvm.IntegerOverflowFlags.none)

    descriptors = []
    for outer in range(width // group):
        for inner in range(swizzle // 32):
            at = part * k_rows + outer * k_group + inner * k_step[-1]
            descriptors.append(shifted(k_base, at))
            descriptors.append(shifted(q_base, outer * q_group + inner * q_step[-1]))

    count = COLUMNS // 2
    registers = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    kind = _PTX_TYPE[str(element)]
    immediates = ", 1, 1" + (", 0, 0" if bytewidth == 2 else "")
    shape = f"m64n{COLUMNS}k{32 // bytewidth}"
    mine, following = (f"${count + len(descriptors) + i}" for i in range(2))
    lines = [f"bar.sync {mine}, 256;", "wgmma.fence.sync.aligned;"]
    for step in range(len(descriptors) // 2):
        a, b = count + 2 * step, count + 2 * step + 1
        accumulate = "overwrite" if step == 0 else "accumulate"
        lines.append(
            f"wgmma.mma_async.sync.aligned.{shape}.f32.{kind}.{kind} "
            f"{registers}, ${a}, ${b}, {accumulate}{immediates};"
        )
    lines += [
        "wgmma.commit_group.sync.aligned;",
        f"bar.arrive {following}, 256;",
    ]
    ptx = (
        "{ .reg .pred overwrite, accumulate; setp.ne.b32 overwrite, 0, 0; "
        "setp.eq.b32 accumulate, 0, 0;\n" + "\n".join(lines) + " }"
    )
    f32 = ir.F32Type.get()
    result = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * count),
        [*descriptors, *turns],
        ptx,
        ",".join(["=f"] * count + ["l"] * len(descriptors) + ["r"] * 2 + ["~{memory}"]),
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, result, [i]) for i in range(count)]


def _wait_wgmma(dots: mgpu.FragmentedArray):
    """The accumulators once they are there; tied to the wait, lest they be read before it."""
    f32 = ir.F32Type.get()
    registers = [scalar(pair, i) for pair in dots.registers.flat for i in range(2)]
    count = len(registers)
    result = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * count),
        registers,
        "wgmma.wait_group.sync.aligned 0;",
        ",".join(["=f"] * count + [str(i) for i in range(count)] + ["~{memory}"]),
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, result, [i]) for i in range(count)]


def start_turns(consumers: int):
    """Lets warpgroup 0 multiply first; the last consumer calls it once, before its first tile.

    The warpgroups issue their multiplications strictly in turn: each waits on a named barrier
    until its predecessor has issued, and arrives on its successor's. Left alone they drift into
    step, all multiply and then all reduce, and the tensor cores wait for the reductions. All
    consumers must multiply equally often. One arrival is left over at the end.
    """

    @plgpu.inline_mgpu()
    def start(_):
        _, following = _turns(_c(consumers - 1), consumers)
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [following], "bar.arrive $0, 256;", "r", has_side_effects=True)

    start()


def _turns(warpgroup, consumers: int):
    """A warpgroup's named barrier and its successor's."""
    following = arith.remui(arith.addi(warpgroup, _c(1)), _c(consumers))
    return [arith.addi(x, _c(_FIRST_TURN)) for x in (warpgroup, following)]


def _weighted(dots, weights, heads):
    """`sum_i w relu(dots)` of this thread's columns: `[token][row half]`."""
    f32 = ir.F32Type.get()
    zero = arith.constant(f32, 0.0)
    columns = list(weights.registers.flat)  # one pair of weights for each 8 columns
    assert len(columns) == COLUMNS // 8, len(columns)
    sums = []
    for token in range(COLUMNS // heads):
        total = [None, None]
        for group in range(token * heads // 8, (token + 1) * heads // 8):
            for half, column in itertools.product(range(2), range(2)):
                weight = scalar(columns[group], column)
                dot = arith.maximumf(dots[4 * group + 2 * half + column], zero)
                if total[half] is None:
                    total[half] = arith.mulf(dot, weight)
                else:
                    total[half] = llvm.intr_fma(dot, weight, total[half])
        sums.append(total)
    return sums


def _store(pointer, value, predicate):
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [arith.extui(ir.IntegerType.get_signless(32), predicate), pointer, value],
        "{ .reg .pred p; setp.ne.b32 p, $0, 0; @p st.global.f32 [$1], $2; }",
        "r,l,f",
        has_side_effects=True,
    )


def _element(ref, index, element_type):
    return utils.getelementptr(global_pointer(ref), [index], element_type)


def _per_lane(values, element_type, layout) -> mgpu.FragmentedArray:
    """An array of which each lane holds its own `values`."""
    register = llvm.mlir_undef(ir.VectorType.get((len(values),), element_type))
    for i, value in enumerate(values):
        register = llvm.insertelement(register, value, _c(i))
    return mgpu.FragmentedArray(
        _registers=_object_array([register]),
        _layout=layout.to_mgpu(),
        _is_signed=True if isinstance(element_type, ir.IntegerType) else None,
    )


def _lane_value(array: mgpu.FragmentedArray, i: int):
    return scalar(array.registers.flat[0], i)


def _further(pointer, count, element_type):
    """The pointer `count` elements on; count is not negative."""
    i64 = ir.IntegerType.get_signless(64)
    return utils.getelementptr(pointer, [arith.extui(i64, count)], element_type)


def _splat(array):
    return array.registers.item() if isinstance(array, mgpu.FragmentedArray) else array


def _c(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _object_array(values) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array
