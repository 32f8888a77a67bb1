"""Reads a compiled program's text: its instructions, and how often a step runs each of them.

XLA prints the program it compiled for one device. A scan is a `while` whose body stands once and
whose trip count stands beside it, so what a step moves and multiplies is the sum over instructions
of their size times the trip counts of the loops around them. Collectives are read in
`train.plan.collectives`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+(?:e\d\w*)?)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\s*$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

# Instructions that only name what is there already.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "opt-barrier", "async",
}  # fmt: skip
COLLECTIVES = (
    "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "all-reduce",
    "collective-permute",
)  # fmt: skip
# `to_apply` of these is the program; of a reduction it is a scalar function.
_CALLERS = {"call", "async-start", "conditional"}
_FUSIONS = ("fusion", "fusion-start")
# Reads or writes a part of its first operand, which stays where it is.
_PARTIAL = ("dynamic-slice", "gather", "dynamic-update-slice", "scatter")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
        name: unique in its computation.
        shape: of the result, as printed; a tuple of several is in parentheses.
        op: such as `fusion` or `all-gather-start`.
        operands: names.
        attributes: the rest of the line.
        root: whether it is its computation's result.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        computations: instructions by name, of each computation by name.
        times: how often a step runs each computation; those inside fusions are left out.
        unknown_loops: loops without a known trip count, counted as one pass.
    """

    computations: dict[str, dict[str, Instruction]]
    times: dict[str, int]
    unknown_loops: int

    def instructions(self) -> Iterator[tuple[Instruction, Mapping[str, Instruction], int]]:
        """Every instruction that is launched, with its computation and its number of runs."""
        for name, runs in self.times.items():
            within = self.computations[name]
            for instruction in within.values():
                yield instruction, within, runs


def parse(text: str) -> Program:
    """Reads what `compiled.as_text()` returns."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            if header := _HEADER.match(line):
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    times: dict[str, int] = {}
    unknown = _count(computations, entry, 1, times)
    return Program(computations, times, unknown)


def _instruction(line: str) -> Instruction | None:
    named = _NAMED.match(line)
    if named is None:
        return None
    start = named.end()
    end = _close(line, start) if line[start] == "(" else line.index(" ", start)
    shape, rest = line[start:end], line[end:].lstrip()
    opened = rest.index("(")
    closed = _close(rest, opened)
    operands = re.findall(r"%([\w.\-]+)", rest[opened:closed])
    return Instruction(
        named.group(2), shape, rest[:opened], tuple(operands), rest[closed:], bool(named.group(1))
    )


def _close(text: str, start: int) -> int:
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _count(
    computations: Mapping[str, Mapping[str, Instruction]],
    name: str,
    runs: int,
    times: dict[str, int],
) -> int:
    """Adds the runs of a computation and of all it calls; returns loops of unknown length."""
    times[name] = times.get(name, 0) + runs
    unknown = 0
    for instruction in computations[name].values():
        if instruction.op == "while":
            trips = _TRIPS.search(instruction.attributes)
            unknown += trips is None
            inner = runs * (int(trips.group(1)) if trips else 1)
            body = _BODY.search(instruction.attributes)
            assert body is not None, instruction
            unknown += _count(computations, body.group(1), inner, times)
        elif instruction.op in _CALLERS:
            for called in _called(instruction):
                unknown += _count(computations, called, runs, times)
    return unknown


def _called(instruction: Instruction) -> list[str]:
    found = _CALLED.findall(instruction.attributes)
    if branches := _BRANCHES.search(instruction.attributes):
        found += re.findall(r"%?([\w.\-]+)", branches.group(1))
    return found


# --- sizes ----------------------------------------------------------------------------------------


def shapes(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and dimensions of the arrays in a printed shape."""
    return [
        (kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(shape)
    ]


def size(shape: str) -> int:
    """Bytes of a printed shape."""
    return sum(math.prod(dims) * _bits(kind) for kind, dims in shapes(shape)) // 8


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    found = re.match(r"[a-z]+(\d+)", kind)
    assert found is not None
    return int(found.group(1))


def operand_bytes(instruction: Instruction, within: Mapping[str, Instruction]) -> int:
    """Bytes of an instruction's operands."""
    return sum(size(within[name].shape) for name in instruction.operands if name in within)


# --- work -----------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What one device does in a step, as far as the program's text shows it.

    Attributes:
        dot_flop: operations of XLA's own matrix products.
        kernels: calls of each custom kernel that XLA cannot see into, by target.
        matmul_bytes: operands and results of matrix products and kernels, each once.
        other_bytes: the same of everything else on the device: elementwise work, copies, slices,
            the optimizer.
    """

    dot_flop: float
    kernels: dict[str, int]
    matmul_bytes: float
    other_bytes: float


def work(program: Program) -> Work:
    """Adds up matrix products and memory traffic over a step."""
    flop, matmul_bytes, other_bytes = 0.0, 0.0, 0.0
    kernels: dict[str, int] = {}
    for instruction, within, runs in program.instructions():
        op = instruction.op.removesuffix("-start")
        if op in _FREE or op.endswith("-done") or op in COLLECTIVES:
            continue
        dots = _dot_flop(instruction, within, program)
        target = _kernel(instruction, program)
        moved = runs * _moved(instruction, within, program)
        if target is not None and not dots:
            kernels[target] = kernels.get(target, 0) + runs
        if dots or target is not None:
            flop += runs * dots
            matmul_bytes += moved
        else:
            other_bytes += moved
    return Work(flop, kernels, matmul_bytes, other_bytes)


def _kernel(instruction: Instruction, program: Program) -> str | None:
    """The target of a custom call, also of one that a fusion hands slices to."""
    if instruction.op not in _FUSIONS:
        return _target(instruction)
    inner = program.computations[_called(instruction)[0]]
    return next((name for i in inner.values() if (name := _target(i)) is not None), None)


def _target(instruction: Instruction) -> str | None:
    if instruction.op != "custom-call":
        return None
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found.group(1) if found else "unnamed"


def _dot_flop(
    instruction: Instruction, within: Mapping[str, Instruction], program: Program
) -> float:
    """Operations of the matrix products inside one launched instruction."""
    if instruction.op in _FUSIONS:
        total = 0.0
        for called in _called(instruction):
            inner = program.computations[called]
            total += sum(_dot_flop(i, inner, program) for i in inner.values())
        return total
    if instruction.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    elif (_target(instruction) or "").startswith("__cublas$"):
        contracted = re.search(
            r'"lhs_contracting_dimensions":\[([\d",]*)\]', instruction.attributes
        )
    else:
        return 0.0
    left = within.get(instruction.operands[0])
    if contracted is None or left is None:
        return 0.0
    dims = shapes(left.shape)[0][1]
    depth = math.prod(dims[int(n)] for n in re.findall(r"\d+", contracted.group(1)))
    return 2.0 * depth * math.prod(shapes(instruction.shape)[0][1])


def _moved(instruction: Instruction, within: Mapping[str, Instruction], program: Program) -> int:
    """Bytes that an instruction reads and writes; a part of an array counts as the part."""
    if instruction.op not in _FUSIONS:
        if instruction.op in _PARTIAL:
            return 2 * _written(instruction, within)
        return size(instruction.shape) + operand_bytes(instruction, within)
    inner = program.computations[_called(instruction)[0]]
    total = 0
    for parameter in (i for i in inner.values() if i.op == "parameter"):
        users = _users(parameter, inner)
        if users and all(_touches_part(user, inner, parameter.name) for user in users):
            total += sum(_written(user, inner) for user in users)
        else:
            total += size(parameter.shape)
    root = next(i for i in inner.values() if i.root)
    results = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
    return total + sum(_written(_source(result, inner), inner) for result in results)


def _written(instruction: Instruction, within: Mapping[str, Instruction]) -> int:
    """Bytes of a result, or of the part of it that is new."""
    part = _UPDATES.get(instruction.op)
    shape = instruction.shape if part is None else within[instruction.operands[part]].shape
    return size(shape)


def _users(instruction: Instruction, within: Mapping[str, Instruction]) -> list[Instruction]:
    """Who reads a value, under this name or another."""
    found = []
    for user in (i for i in within.values() if instruction.name in i.operands):
        found += _users(user, within) if user.op == "bitcast" else [user]
    return found


def _source(instruction: Instruction, within: Mapping[str, Instruction]) -> Instruction:
    """The instruction that made a value."""
    while instruction.op == "bitcast":
        instruction = within[instruction.operands[0]]
    return instruction


def _touches_part(user: Instruction, within: Mapping[str, Instruction], name: str) -> bool:
    """Whether an instruction touches only a part of the array `name`."""
    if user.op not in _PARTIAL:
        return False
    first, *rest = (_source(within[operand], within).name for operand in user.operands)
    return first == name and name not in rest
