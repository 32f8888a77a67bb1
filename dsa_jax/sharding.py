"""Where arrays live: the device mesh, and rules from letters to its axes.

Every dimension of every array has a letter. `Rules` says which mesh axes split a letter,
`PARAMETERS` which letters a parameter has, and from these two follows the sharding of everything.
`_` is a dimension that is never split. Beside the letters of the package, this file uses

    W vocabulary, Q query latent width, L layers stacked for a scan (always whole).

Weights and activations share one table of rules, so an array must not carry two letters that the
rules send to the same axis: a batch is `B T _` and not `B T D`, because fsdp splits B already. The
collision check names both letters. How computation follows is `dsa_jax.spread`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context", "tensor")

type Axes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh. At most one may be -1: whatever devices are left."""

    data: int = 1
    """Copies of the model; each sees its own part of the batch."""
    fsdp: int = 1
    """Parts that parameters and optimizer state are cut into; each also sees its own part of the
    batch."""
    expert: int = 1
    """Groups of experts, times `context`: routed experts are dealt out over expert x context
    devices, and tokens travel to them. Each also sees its own part of the batch, and all other
    parameters are cut over this axis too, as over fsdp."""
    context: int = 1
    """Parts that every sequence is cut into. Routed experts and parameters are cut over it too."""
    tensor: int = 1
    """Parts that attention heads, MLP widths and the vocabulary are cut into."""

    def __post_init__(self) -> None:
        sizes = self.sizes
        for axis, size in zip(AXES, sizes, strict=True):
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}={size} must be at least 1, or -1 for the rest")
        if sizes.count(-1) > 1:
            unknown = [f"mesh.{a}" for a, n in zip(AXES, sizes, strict=True) if n == -1]
            raise ValueError(f"{' and '.join(unknown)} are both -1; only one can be the rest")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in the order of `AXES`."""
        return dataclasses.astuple(self)


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The one place that builds a mesh. Its axes are of type Auto: the compiler propagates them.

    Args:
        config: None is one device.
        devices: None is all of `jax.devices()`; a mesh of fewer takes the first ones.

    Raises:
        ValueError: more devices asked for than there are, a -1 that does not divide them, or, with
            several processes, devices left over.
    """
    config = config or MeshConfig()
    given = list(jax.devices() if devices is None else devices)
    sizes = list(config.sizes)
    known = math.prod(n for n in sizes if n != -1)
    asked = " x ".join(f"{axis}={n}" for axis, n in zip(AXES, sizes, strict=True) if n != 1) or "1"
    if -1 in sizes:
        if len(given) % known:
            raise ValueError(
                f"mesh {asked}: {len(given)} devices are not a multiple of {known}; "
                "write the size of the axis that is -1 out"
            )
        sizes[sizes.index(-1)] = len(given) // known
    needed = math.prod(sizes)
    if needed > len(given):
        raise ValueError(f"mesh {asked} needs {needed} devices, but there are {len(given)}")
    if needed < len(given) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {asked} leaves {len(given) - needed} of {len(given)} devices idle; "
            "with several processes every device must be in the mesh"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, devices=given[:needed], axis_types=types)


# Over which axes parameters and optimizer state are cut beside `tensor`. All of them split tokens,
# so a gradient is summed over them anyway: summing and cutting are then one reduce-scatter.
_CUT = ("fsdp", "expert", "context")


@dataclass(frozen=True)
class Rules:
    """The mesh axes that split each letter; None leaves it whole.

    Change one with `dataclasses.replace(Rules(), D=None)`.

    What the defaults are made for: long sequences on hundreds of GPUs, where data x context is all
    there is to split tokens by, and no device can hold a whole layer of experts. So experts are
    dealt out over the axes that already split tokens (expert x context): with as many devices
    there as experts, each keeps its own and no weight of an expert is ever gathered. All other
    weights are cut over the same axes and gathered layer by layer.
    """

    B: Axes = ("data", "fsdp", "expert")
    """Batch."""
    T: Axes = "context"
    """Tokens of a sequence: queries, and keys until they are gathered."""
    N: Axes = "tensor"
    """Attention heads, also where they are merged with a head width."""
    E: Axes = ("expert", "context")
    """Experts. Axes that split tokens, in this order."""
    F: Axes = "tensor"
    """Width inside an MLP."""
    W: Axes = "tensor"
    """Vocabulary."""
    D: Axes = _CUT
    """Model width, of weights."""
    Q: Axes = _CUT
    """Query latent width, of weights."""
    C: Axes = _CUT
    """Key-value latent width, of weights."""
    X: Axes = "fsdp"
    """Model width, of the routed experts' weights, where E has taken the other axes."""

    def spec(self, letters: str, name: str = "array") -> PartitionSpec:
        """The partition of an array whose dimensions have these letters.

        Args:
            letters: one letter a dimension, `_` for one that stays whole; spaces are ignored.
            name: what the array is called in messages.

        Raises:
            ValueError: a letter without a rule, or two letters on one axis.
        """
        owner: dict[str, str] = {}
        entries: list[Axes] = []
        for letter in letters.replace(" ", ""):
            axes = () if letter == "_" else self._axes(letter, name)
            for axis in axes:
                if axis in owner:
                    raise ValueError(
                        f"{name} [{letters}]: letters {owner[axis]} and {letter} are both split "
                        f"over mesh axis {axis!r}; an axis splits one dimension. Set one of "
                        f"Rules.{owner[axis]} and Rules.{letter} to another axis or to None"
                    )
                owner[axis] = letter
            entries.append(axes or None)
        return PartitionSpec(*entries)

    def _axes(self, letter: str, name: str) -> tuple[str, ...]:
        if letter not in _LETTERS:
            raise ValueError(
                f"{name}: letter {letter!r} has no rule; the letters are {', '.join(_LETTERS)}, "
                "and _ for a dimension that stays whole"
            )
        axes = axes_tuple(getattr(self, letter))
        if unknown := [axis for axis in axes if axis not in AXES]:
            raise ValueError(f"Rules.{letter}={axes!r}: {unknown[0]!r} is not one of {AXES}")
        return axes


def axes_tuple(axes: Axes) -> tuple[str, ...]:
    """A rule's axes as a tuple, empty for None."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


_LETTERS = tuple(field.name for field in dataclasses.fields(Rules))

# The end of a parameter's path -> its letters, first match counts. One dimension more than letters
# is the stack of layers, in front. Where a weight joins two widths that fsdp could split, it splits
# the one named and the other is `_`. The indexer is whole along `tensor`: splitting its heads would
# mean a sum of scores over devices.
PARAMETERS: tuple[tuple[str, str], ...] = (
    ("embed_tokens/weight", "W D"),
    ("lm_head/weight", "D W"),
    ("shared_head/head/weight", "D W"),
    ("eh_proj/weight", "D _"),
    ("*norm/weight", "_"),
    ("indexer/k_norm/bias", "_"),
    ("indexer/wq_b/weight", "Q _"),
    ("indexer/wk/weight", "D _"),
    ("indexer/weights_proj/weight", "D _"),
    ("self_attn/q_a_proj/weight", "D _"),
    ("self_attn/q_b_proj/weight", "Q N"),
    ("self_attn/kv_a_proj_with_mqa/weight", "D _"),
    ("self_attn/kv_b_proj/weight", "C N"),
    ("self_attn/o_proj/weight", "N D"),
    ("mlp/gate/weight", "D _"),
    ("mlp/gate/e_score_correction_bias", "_"),
    ("experts/gate_proj", "E X F"),
    ("experts/up_proj", "E X F"),
    ("experts/down_proj", "E F X"),
    ("gate_proj/weight", "D F"),
    ("up_proj/weight", "D F"),
    ("down_proj/weight", "F D"),
    # Scales of FP8 weights: one number for 128 x 128, and their counts rarely divide.
    ("experts/*_scale", "E _ _"),
    ("scale", "_ _"),
)


def letters_of(path: str) -> str:
    """The letters of the parameter at `path` ("stacks/0/blocks/0/attention/wo/kernel").

    Raises:
        ValueError: no entry of `PARAMETERS` fits.
    """
    for pattern, letters in PARAMETERS:
        if fnmatch.fnmatchcase(f"/{path}", f"*/{pattern}"):
            return letters
    raise ValueError(
        f"parameter {path} has no letters; add a line for it to dsa_jax.sharding.PARAMETERS"
    )


def param_specs(params: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """The partition of every parameter: the same tree, of `PartitionSpec`.

    Args:
        params: parameters or their shapes. Optimizer moments do too: a path is read from its end,
            and numbers without dimensions are everywhere.
        mesh: decides which sizes divide.
        rules: None is `Rules()`.

    Raises:
        ValueError: a parameter without letters, two letters on one axis, or a dimension that its
            axes do not divide.
    """
    rules = rules or Rules()

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        if leaf.ndim == 0:
            return PartitionSpec()
        name = path_name(path)
        letters = letters_of(name).replace(" ", "")
        if leaf.ndim not in (len(letters), len(letters) + 1):
            raise ValueError(
                f"parameter {name} has shape {leaf.shape}, but letters {letters!r}; "
                "correct its line in dsa_jax.sharding.PARAMETERS"
            )
        letters = "_" * (leaf.ndim - len(letters)) + letters
        partition = rules.spec(letters, name)
        _check_divides(name, letters, leaf.shape, partition, mesh)
        return partition

    return jax.tree_util.tree_map_with_path(spec, params)


def batch_spec(rules: Rules | None = None) -> PartitionSpec:
    """The partition of tokens, positions and segment ids `[B, T]`."""
    return (rules or Rules()).spec("BT", "batch")


def shardings(specs: Any, mesh: Mesh) -> Any:
    """The same tree with each `PartitionSpec` bound to the mesh: what `jax.jit` and Orbax take."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as `a/0/b`; without the `value` inside an `nnx.Param`."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _check_divides(
    name: str, letters: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh
) -> None:
    for letter, size, axes in zip(letters, shape, spec, strict=True):
        axes = axes_tuple(axes)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            over = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"parameter {name}: dimension {letter}={size} does not divide by {over}; "
                f"choose a size that divides {size}, or leave it whole with Rules.{letter}=None"
            )
