"""Which mesh axes a compiled program communicates over, and how many bytes.

A collective names groups of devices. A device's place in the mesh is its number unravelled over the
axes, so the axes along which a group's members differ are the axes that it communicates over. Bytes
are those that one device sends in a step, by the ring algorithms, n being the group's size and x
the bytes of the operand:

    all-gather (n-1) x   reduce-scatter, all-to-all (n-1)/n x   all-reduce 2 (n-1)/n x   permute x
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from train.plan import hlo

_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=@?\w*mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def sent(op: str, n: int, operand: float) -> float:
    """Bytes that one of n devices sends, given those of its operand."""
    if op == "all-gather":
        return (n - 1) * operand
    if op == "collective-permute":
        return operand
    return (2 if op == "all-reduce" else 1) * (n - 1) / n * operand


class Traffic(NamedTuple):
    """Collectives of one kind over one set of axes, added up over a step.

    Attributes:
        op: such as `all-gather`.
        axes: mesh axes along which a group's members differ; empty for a group of one.
        whole: whether a group has every member along its axes.
        group: devices of a group.
        per_host: how many of them share a host.
        calls: times a step.
        bytes_sent: by one device in a step.
    """

    op: str
    axes: tuple[str, ...]
    whole: bool
    group: int
    per_host: int
    calls: int
    bytes_sent: float

    @property
    def name(self) -> str:
        """The axes in words."""
        return "+".join(self.axes) + ("" if self.whole else " (parts)") if self.axes else "none"


def collectives(
    program: hlo.Program, mesh: Mapping[str, int], devices_per_host: int = 8
) -> list[Traffic]:
    """The collectives of a program, most bytes first.

    Args:
        program: compiled for a mesh.
        mesh: its axes and sizes, in order.
        devices_per_host: neighbours in device order that share a fast link.
    """
    sums: dict[tuple, tuple[int, float]] = {}
    for instruction, within, runs in program.instructions():
        op = instruction.op.removesuffix("-start")
        if op not in hlo.COLLECTIVES:
            continue
        groups = replica_groups(instruction.attributes, math.prod(mesh.values()))
        axes, whole = axes_of(groups, mesh)
        per_host = max(Counter(groups[0] // devices_per_host).values())
        n = groups.shape[1]
        if n < 2:
            continue
        sizes = [hlo.size(within[name].shape) for name in instruction.operands]
        # A ragged one moves rows of its first operand into its second; one of the two has room for
        # more than there is.
        operand = min(sizes[:2]) if op == "ragged-all-to-all" else sum(sizes)
        key = (op, axes, whole, n, per_host)
        calls, total = sums.get(key, (0, 0.0))
        sums[key] = (calls + runs, total + runs * sent(op, n, operand))
    found = [Traffic._make((*key, *value)) for key, value in sums.items()]
    return sorted(found, key=lambda traffic: -traffic.bytes_sent)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """The groups of a collective, `[groups, members]`; for a permute, its pairs.

    Args:
        attributes: of the instruction, in any of XLA's four ways to write groups.
        devices: in the mesh; they are one group where none is written.
    """
    if iota := _IOTA.search(attributes):
        shape, dims = _numbers(iota.group(1)), _numbers(iota.group(2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota.group(3):
            ids = ids.transpose(_numbers(iota.group(3)))
        return ids.reshape(shape)
    if mesh := _MESH.search(attributes):
        return _mesh_groups(mesh.group(1), mesh.group(2))
    if pairs := _PAIRS.search(attributes):
        return np.array([_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))])
    if lists := _LISTS.search(attributes):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", lists.group(1))]
        if groups:
            return np.array(groups)
    return np.arange(devices)[None]


def _mesh_groups(mesh: str, axes: str) -> np.ndarray:
    """Groups written as axes of a mesh: `mesh['a'=2,'b'=32] {'b'}`. `'b':(4)8` is a part of axis b:
    its factor of 8 behind a factor of 4."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    dims: list[int] = []  # every axis in up to three factors: before, the part, behind
    place: dict[str, int] = {}
    for name, n in sizes.items():
        part = next((w for w in wanted if w[0] == name), (name, "", ""))
        before, middle = (int(part[1]), int(part[2])) if part[1] else (1, n)
        place[name] = len(dims) + 1
        dims += [before, middle, n // (before * middle)]
    inner = [place[name] for name, _, _ in wanted]
    outer = [axis for axis in range(len(dims)) if axis not in inner]
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(*outer, *inner)
    return ids.reshape(-1, math.prod(dims[axis] for axis in inner))


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    """The axes along which the members of a group differ, and whether the group fills them.

    Args:
        groups: `[groups, members]`, places in the mesh.
        mesh: axes and sizes, in order.
    """
    coordinates = np.unravel_index(groups, tuple(mesh.values()))
    axes = tuple(
        name for name, along in zip(mesh, coordinates, strict=True) if (along != along[:, :1]).any()
    )
    return axes, groups.shape[1] == math.prod(mesh[name] for name in axes)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
