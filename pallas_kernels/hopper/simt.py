"""A CTA's lanes as a small language, for what Mosaic GPU has no op for.

Ballots, scans, histograms and appends need each lane's own address. Programs for them are written
once, against a `block`: an object that holds the lane's coordinates and the operations a lane has.
There are two:

- `SimtBlock`, here, emits MLIR and PTX into a Mosaic GPU kernel (inside `plgpu.inline_mgpu`);
- `simt_model.ModelBlock` runs the same program in NumPy, all lanes at once, and finds races.

A value is 32 bits wide and unsigned: a `U32` here, a NumPy array with one entry a lane there. Both
take Python's operators (comparisons and shifts are unsigned) and Python ints as constants. Floats
travel as their bits. A condition takes `&`, `|`, `~`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

WARP = 32


class Words(NamedTuple):
    """An array of 32-bit words in shared memory; `start` counts in words, a multiple of 4."""

    start: int
    size: int


class Condition:
    """One bit a lane."""

    def __init__(self, value: ir.Value):
        self.value = value

    def __and__(self, other: Condition) -> Condition:
        return Condition(arith.andi(self.value, other.value))

    def __or__(self, other: Condition) -> Condition:
        return Condition(arith.ori(self.value, other.value))

    def __invert__(self) -> Condition:
        return Condition(arith.xori(self.value, _constant(1, 1)))


class U32:
    """A 32-bit value of each lane."""

    def __init__(self, value: ir.Value):
        self.value = value

    def __add__(self, other):
        return U32(arith.addi(self.value, _word(other)))

    def __sub__(self, other):
        return U32(arith.subi(self.value, _word(other)))

    def __rsub__(self, other):
        return U32(arith.subi(_word(other), self.value))

    def __mul__(self, other):
        return U32(arith.muli(self.value, _word(other)))

    def __floordiv__(self, other):
        return U32(arith.divui(self.value, _word(other)))

    def __mod__(self, other):
        return U32(arith.remui(self.value, _word(other)))

    def __and__(self, other):
        return U32(arith.andi(self.value, _word(other)))

    def __or__(self, other):
        return U32(arith.ori(self.value, _word(other)))

    def __xor__(self, other):
        return U32(arith.xori(self.value, _word(other)))

    def __lshift__(self, other):
        return U32(arith.shli(self.value, _word(other)))

    def __rshift__(self, other):
        return U32(arith.shrui(self.value, _word(other)))

    __radd__, __rmul__, __rand__, __ror__, __rxor__ = __add__, __mul__, __and__, __or__, __xor__

    def __lt__(self, other):
        return self._compare(arith.CmpIPredicate.ult, other)

    def __le__(self, other):
        return self._compare(arith.CmpIPredicate.ule, other)

    def __gt__(self, other):
        return self._compare(arith.CmpIPredicate.ugt, other)

    def __ge__(self, other):
        return self._compare(arith.CmpIPredicate.uge, other)

    def __eq__(self, other):  # type: ignore[override]
        return self._compare(arith.CmpIPredicate.eq, other)

    def __ne__(self, other):  # type: ignore[override]
        return self._compare(arith.CmpIPredicate.ne, other)

    __hash__ = None  # type: ignore[assignment]

    def _compare(self, predicate, other) -> Condition:
        return Condition(arith.cmpi(predicate, self.value, _word(other)))


class GlobalRow(NamedTuple):
    """A row in device memory, from the 16-byte boundary at or before it.

    Attributes:
        base: the address of that boundary.
        skew: how many words lie between it and the row's first.
    """

    base: Any
    skew: Any


class Place(NamedTuple):
    """Where a lane's words lie in the rows of a row-major array of 32-bit words.

    Attributes:
        start: the address of those in row 0.
        width: of a row.
    """

    start: Any
    width: int


class SimtBlock:
    """Emits the operations of a CTA's lanes at MLIR's insertion point.

    Attributes:
        threads, warps: of the CTA.
        thread, warp: of the lane.
        lane: within the warp.

    Args:
        threads: of the CTA.
        scratch: its shared memory, a 1-D memref of 32-bit words.
    """

    def __init__(self, threads: int, scratch: ir.Value):
        self._set_lanes(threads, U32(utils.thread_idx()))
        self._shared = llvm.ptrtoint(_int(32), utils.memref_ptr(scratch))

    def _set_lanes(self, threads: int, thread: U32):
        self.threads, self.warps = threads, threads // WARP
        self.thread = thread
        self.lane = self.thread & (WARP - 1)
        # Every lane of a warp has the same; the shuffle lets ptxas know, and branch by warp.
        self.warp = self.shuffle(self.thread >> 5, 0)

    # Lanes.

    def constant(self, value: int) -> U32:
        """The same value in each lane."""
        return U32(_word(value))

    def select(self, condition: Condition, yes: Any, no: Any) -> U32:
        """`yes` where the condition holds, else `no`."""
        return U32(arith.select(condition.value, _word(yes), _word(no)))

    def add_where(self, condition: Condition, x: U32, amount: int) -> U32:
        """`x + amount` where the condition holds, else x: one instruction; a select takes two."""
        code = "{ mov.b32 $0, $1; @$3 add.u32 $0, $0, $2; }"
        operands = [x.value, _word(amount), condition.value]
        return U32(llvm.inline_asm(_int(32), operands, code, "=&r,r,n,b"))

    def sign(self, x: U32) -> U32:
        """All ones where the highest bit is set, else 0."""
        return U32(arith.shrsi(x.value, _word(31)))

    def minimum(self, a: U32, b: Any) -> U32:
        """The smaller, unsigned."""
        return U32(arith.minui(a.value, _word(b)))

    def maximum(self, a: U32, b: Any) -> U32:
        """The larger, unsigned."""
        return U32(arith.maxui(a.value, _word(b)))

    def at_least(self, x: U32, limit: U32) -> Condition:
        """`x >= limit` of floats; false where either is NaN."""
        return Condition(arith.cmpf(arith.CmpFPredicate.OGE, _float(x), _float(limit)))

    def without_negative_zero(self, x: U32) -> U32:
        """The float plus 0.0: its own bits, but for -0.0 those of 0.0."""
        zero = arith.constant(ir.F32Type.get(), 0.0)
        return U32(arith.bitcast(_int(32), arith.addf(_float(x), zero)))

    def low_bf16(self, x: U32) -> U32:
        """The bf16 in the lower half of a word, as fp32."""
        return x << 16

    def high_bf16(self, x: U32) -> U32:
        """That in the upper half."""
        return x & 0xFFFF0000

    def add_floats(self, x: U32, y: U32) -> U32:
        """Their sum in fp32."""
        return U32(arith.bitcast(_int(32), arith.addf(_float(x), _float(y))))

    # Warps. All 32 lanes take part.

    def shuffle(self, x: U32, lane: Any) -> U32:
        """A lane's value, in all lanes of its warp."""
        return _asm("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", x, lane)

    def scan(self, x: U32) -> U32:
        """Inclusive sums over the lanes of a warp."""
        for distance in (1, 2, 4, 8, 16):
            x = _asm(
                "{ .reg .pred p; .reg .b32 t; shfl.sync.up.b32 t|p, $1, $2, 0, -1;"
                " mov.b32 $0, $1; @p add.u32 $0, $1, t; }",
                "=&r,r,n",
                x,
                distance,
            )
        return x

    def total(self, x: U32) -> U32:
        """The sum over the lanes of a warp."""
        return _asm("redux.sync.add.u32 $0, $1, -1;", "=r,r", x)

    def any(self, condition: Condition) -> Condition:
        """Whether it holds in some lane of the warp."""
        code = "vote.sync.any.pred $0, $1, -1;"
        values = [condition.value]
        return Condition(llvm.inline_asm(_int(1), values, code, "=b,b", has_side_effects=True))

    def ballot(self, condition: Condition) -> U32:
        """The warp's conditions, a bit a lane."""
        code = "vote.sync.ballot.b32 $0, $1, -1;"
        return _asm(code, "=r,b", condition)

    # Shared memory. The words of a vector access start at a multiple of 4.

    def load(self, array: Words, i: Any) -> U32:
        """A word of shared memory."""
        return _asm(f"ld.shared.u32 $0, [$1 + {4 * array.start}];", "=r,r", self._address(i))

    def load4(self, array: Words, i: Any) -> list[U32]:
        """Four words that follow each other."""
        code = f"ld.shared.v4.u32 {{$0, $1, $2, $3}}, [$4 + {4 * array.start}];"
        return _asm_words(4, code, "=r,=r,=r,=r,r", self._address(i))

    def store(self, array: Words, i: Any, value: Any, where: Condition | None = None) -> None:
        """Writes a word, in the lanes where the condition holds."""
        self._write("st.shared.u32", array, i, [value], where)

    def store4(self, array: Words, i: Any, values: list) -> None:
        """Writes four words that follow each other."""
        self._write("st.shared.v4.u32", array, i, values, None)

    def increment(self, array: Words, i: Any, where: Condition | None = None) -> None:
        """Adds 1 to a word, atomically."""
        self._write("red.shared.add.u32", array, i, [1], where)

    def _write(self, instruction, array, i, values, where):
        names = [f"${1 + n}" for n in range(len(values))]
        listed = names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"
        guard = "" if where is None else f"@${1 + len(names)} "
        operands = [self._address(i), *values, *([] if where is None else [where])]
        kinds = ["r" if isinstance(v, U32) else "n" for v in values]
        constraints = ",".join(["r", *kinds, *([] if where is None else ["b"])])
        _asm_void(
            f"{guard}{instruction} [$0 + {4 * array.start}], {listed};", constraints, *operands
        )

    def _address(self, i: Any) -> U32:
        return U32(arith.addi(self._shared, arith.shli(_word(i), _word(2))))

    # Device memory.

    def global_row(self, array: ir.Value, row: U32, width: int) -> GlobalRow:
        """A row of a row-major array of 32-bit words; offsets may pass 2^31."""
        start = arith.muli(_wide(row.value), _constant(width, 64))
        skew = arith.andi(start, _constant(3, 64))
        byte = arith.shli(arith.subi(start, skew), _constant(2, 64))
        address = arith.addi(llvm.ptrtoint(_int(64), utils.memref_ptr(array)), byte)
        return GlobalRow(address, U32(arith.trunci(_int(32), skew)))

    def load4_global(self, row: GlobalRow, i: U32) -> list[U32]:
        """The i-th four words from the boundary; read once, so kept out of L1."""
        code = "ld.global.nc.L1::no_allocate.v4.u32 {$0, $1, $2, $3}, [$4];"
        return _asm_words(4, code, "=r,=r,=r,=r,l", self._wide_address(row, i << 2))

    def prefetch(self, row: GlobalRow, i: U32, count: U32) -> None:
        """Starts to fetch `count` times four words from the i-th on into the L2; one lane does."""
        where = (self.thread == 0) & (count > 0)
        code = "@$2 cp.async.bulk.prefetch.L2.global [$0], $1;"
        _asm_void(code, "l,r,b", self._wide_address(row, i << 2), count << 4, where)

    def load_global(self, row: GlobalRow, i: U32) -> U32:
        """A word of a row."""
        return _asm("ld.global.nc.u32 $0, [$1];", "=r,l", self._wide_address(row, i + row.skew))

    def store_global(
        self, row: GlobalRow, i: U32, value: U32, where: Condition | None = None
    ) -> None:
        """Writes a word of a row, in the lanes where the condition holds."""
        address = self._wide_address(row, i + row.skew)
        if where is None:
            _asm_void("st.global.u32 [$0], $1;", "l,r", address, value)
        else:
            _asm_void("@$2 st.global.u32 [$0], $1;", "l,r,b", address, value, where)

    def place(self, array: ir.Value, width: int, offset: Any) -> Place:
        """Each lane's words in the rows of an array, from a word on that may differ by lane."""
        byte = arith.shli(_wide(_word(offset)), _constant(2, 64))
        return Place(arith.addi(llvm.ptrtoint(_int(64), utils.memref_ptr(array)), byte), width)

    def load_at(
        self, place: Place, row: U32, count: int = 1, apart: int = 1, passing: bool = False
    ) -> list[U32]:
        """So many words of a row; those that pass are not kept in L1, and leave the L2 first."""
        hint, policy, operand = "", "", ""
        if passing:
            hint, operand = ".L1::no_allocate.L2::cache_hint", ", hint"
            policy = ".reg .b64 hint; createpolicy.fractional.L2::evict_first.b64 hint, 1.0;"
        loads = " ".join(
            f"ld.global.nc{hint}.u32 ${n}, [at + {4 * n * apart}]{operand};" for n in range(count)
        )
        code = f"{{ {policy} {self._address_at(place, count)} {loads} }}"
        constraints = ",".join(["=&r"] * count + ["r", "l"])
        return _asm_words(count, code, constraints, row, U32(place.start))

    def add_at(self, place: Place, row: U32, pairs: list[tuple[U32, U32]], apart: int = 1) -> None:
        """Adds pairs of floats to pairs of a row, so far apart, each where the place is even."""
        values = [x for pair in pairs for x in pair]
        adds = " ".join(
            f"red.relaxed.gpu.global.add.v2.f32 [at + {4 * n * apart}], {{${2 * n}, ${2 * n + 1}}};"
            for n in range(len(pairs))
        )
        code = f"{{ {self._address_at(place, len(values))} {adds} }}"
        constraints = ",".join(["r"] * len(values) + ["r", "l"])
        _asm_void(code, constraints, *values, row, U32(place.start))

    def _address_at(self, place: Place, first: int) -> str:
        row, start = f"${first}", f"${first + 1}"
        return f".reg .b64 at; mad.wide.u32 at, {row}, {4 * place.width}, {start};"

    def _wide_address(self, row: GlobalRow, i: U32) -> U32:
        return U32(arith.addi(row.base, _wide(arith.shli(i.value, _word(2)))))

    # Control. Conditions and bounds are the same in all lanes of the CTA, unless said otherwise.

    def barrier(self) -> None:
        """Waits for all lanes of the CTA, and lets them see each other's shared memory."""
        _asm_void("bar.sync 0;", "~{memory}")

    def loop(self, start: Any, end: Any, step: int, carry: Any, body: Callable) -> Any:
        """`carry = body(i, carry)` for i from start below end; below 2^31."""
        leaves, tree = jax.tree.flatten(carry)
        op = scf.ForOp(_word(start), _word(end), _word(step), [_word(x) for x in leaves])
        with ir.InsertionPoint(op.body):
            inner = tree.unflatten(U32(x) for x in op.inner_iter_args)
            scf.yield_([_word(x) for x in jax.tree.leaves(body(U32(op.induction_variable), inner))])
        return tree.unflatten(U32(x) for x in op.results)

    def repeat(self, carry: Any, body: Callable) -> Any:
        """`again, carry = body(carry)`, at least once, while again holds."""
        leaves, tree = jax.tree.flatten(carry)
        types = [_int(32)] * len(leaves)
        op = scf.WhileOp(types, [_word(x) for x in leaves])
        before = op.before.blocks.append(*types)
        with ir.InsertionPoint(before):
            again, after = body(tree.unflatten(U32(x) for x in before.arguments))
            scf.condition(again.value, [_word(x) for x in jax.tree.leaves(after)])
        block = op.after.blocks.append(*types)
        with ir.InsertionPoint(block):
            scf.yield_(list(block.arguments))
        return tree.unflatten(U32(x) for x in op.results)

    def when(self, condition: Condition, body: Callable, carry: Any = ()) -> Any:
        """`carry = body(carry)` where the condition holds.

        The condition may differ between warps, not within one, if there is no barrier inside.
        """
        leaves, tree = jax.tree.flatten(carry)
        op = scf.IfOp(condition.value, [_int(32)] * len(leaves), has_else=bool(leaves))
        with ir.InsertionPoint(op.then_block):
            scf.yield_([_word(x) for x in jax.tree.leaves(body(carry))])
        if op.else_block is not None:
            with ir.InsertionPoint(op.else_block):
                scf.yield_([_word(x) for x in leaves])
        return tree.unflatten(U32(x) for x in op.results)


class SimtWarpgroup(SimtBlock):
    """The lanes of one warpgroup of a CTA; without shared memory, and without a barrier."""

    def __init__(self):
        self._set_lanes(4 * WARP, U32(utils.thread_idx()) & (4 * WARP - 1))


def _int(bits: int) -> ir.Type:
    return ir.IntegerType.get_signless(bits)


def _constant(value: int, bits: int) -> ir.Value:
    value &= (1 << bits) - 1
    if value >> (bits - 1) and bits > 1:
        value -= 1 << bits  # MLIR's attribute is signed
    return arith.constant(_int(bits), value)


def _word(x: Any) -> ir.Value:
    return x.value if isinstance(x, U32) else _constant(int(x), 32)


def _wide(x: ir.Value) -> ir.Value:
    return arith.extui(_int(64), x)


def _float(x: U32) -> ir.Value:
    return arith.bitcast(ir.F32Type.get(), x.value)


def _operand(x: Any) -> ir.Value:
    return x.value if isinstance(x, Condition) else _word(x)


def _asm(code: str, constraints: str, *operands: Any) -> U32:
    values = [_operand(x) for x in operands]
    return U32(llvm.inline_asm(_int(32), values, code, constraints, has_side_effects=True))


def _asm_words(count: int, code: str, constraints: str, *operands: Any) -> list[U32]:
    if count == 1:
        return [_asm(code, constraints, *operands)]
    words = llvm.StructType.get_literal([_int(32)] * count)
    values = [_operand(x) for x in operands]
    result = llvm.inline_asm(words, values, code, constraints, has_side_effects=True)
    return [U32(llvm.extractvalue(_int(32), result, [n])) for n in range(count)]


def _asm_void(code: str, constraints: str, *operands: Any) -> None:
    values = [_operand(x) for x in operands]
    llvm.inline_asm(None, values, code, constraints, has_side_effects=True)
