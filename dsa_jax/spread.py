"""How computation is spread over the mesh: each device works on its share, by the rules.

The mesh is the one of `jax.set_mesh`. Two means, and nothing else:

- `per_device` runs a function on every device's own parts, inside `jax.shard_map` over all axes.
  Kernels are opaque to the compiler's partitioner, so every kernel call goes through it, and so
  does everything with collectives of its own: keys, experts, embedding, head.
- `gathered` makes the weights of a layer whole along the axes that only store them (FSDP). What
  lies between the calls of `per_device` are products with such weights, and these the compiler
  partitions as their operands are.

**Order of tokens.** Under context parallelism a sequence is cut into 2 p chunks for p devices, and
device d holds chunks d and 2p - 1 - d (*zig-zag*): a causal query costs as much as it sees keys,
and so every device has equal work. The model reorders tokens at its entrance and undoes it at its
exit: positions, key ranges and labels are made from the natural order outside, nothing outside
knows of chunks, and it costs one exchange of the hidden states beside one of keys a layer. Keys
are in natural order wherever they are whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsa_jax.sharding import AXES, Rules, axes_tuple, letters_of, path_name

Axes = tuple[str, ...]
# Letters whose axes only store: a weight is made whole along them before it is used.
_STORED = ("D", "Q", "C", "X")


def mesh_sizes() -> Mapping[str, int]:
    """The axes along which the mesh of `jax.set_mesh` has more than one device.

    None inside `shard_map`: there everything is a device's own already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return {}
    return {axis: size for axis, size in mesh.shape.items() if axis in AXES and size > 1}


def axes_of(rules: Rules, letter: str) -> Axes:
    """The axes of more than one device that split a letter."""
    sizes = mesh_sizes()
    return tuple(axis for axis in axes_tuple(getattr(rules, letter)) if axis in sizes)


def parts(rules: Rules, letter: str) -> int:
    """Into how many parts a letter is split."""
    sizes = mesh_sizes()
    return math.prod(sizes[axis] for axis in axes_of(rules, letter))


def by_query(rules: Rules) -> Rules:
    """Rules of what the indexer does: queries are dealt out over the heads' axes too.

    Its scores sum over heads and its target sums over the attention's, so its heads are whole.
    """
    return dataclasses.replace(rules, T=axes_tuple(rules.T) + axes_tuple(rules.N), N=None)


def spec(rules: Rules, letters: str) -> PartitionSpec:
    """As `Rules.spec`, of the axes with more than one device."""
    sizes = mesh_sizes()
    return PartitionSpec(
        *(
            tuple(axis for axis in axes_tuple(entry) if axis in sizes) or None
            for entry in rules.spec(letters)
        )
    )


def per_device(fn: Callable, rules: Rules, arguments: Any, results: Any) -> Callable:
    """`fn` on every device's own parts; `fn` itself without a mesh.

    Args:
        fn: may use collectives over `axes_of`, taken before.
        rules: from letters to axes.
        arguments: a tuple, for each argument its letters, or a tree of letters; or specs, where
            other rules hold.
        results: letters of the results, likewise.
    """
    if not mesh_sizes():
        return fn

    def to_spec(letters: str | PartitionSpec) -> PartitionSpec:
        return letters if isinstance(letters, PartitionSpec) else spec(rules, letters)

    return jax.shard_map(
        fn, in_specs=jax.tree.map(to_spec, arguments), out_specs=jax.tree.map(to_spec, results)
    )


def check_batch(shape: tuple[int, ...], rules: Rules) -> None:
    """Refuses tokens `[B, T]` that the mesh cannot cut.

    Raises:
        ValueError: B or T does not divide.
    """
    sizes = mesh_sizes()
    for letter, length, chunks in (("B", shape[0], 1), ("T", shape[1], 2)):
        axes = axes_of(by_query(rules), letter)
        needed = chunks * parts(by_query(rules), letter)
        if axes and length % needed:
            over = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes)
            twice = " x 2 (a device holds two chunks of a sequence)" if chunks == 2 else ""
            raise ValueError(
                f"tokens have {letter}={length}, which does not divide by {over}{twice}; choose a "
                f"multiple of {needed}, or a smaller mesh"
            )


def pinned(x: Array, rules: Rules, letters: str) -> Array:
    """x where its letters say, and its gradient too: what the partitioner may not reconsider."""
    return lax.with_sharding_constraint(x, spec(rules, letters)) if mesh_sizes() else x


# --- weights -------------------------------------------------------------------------------------


def gathered(module: Any, rules: Rules, dtype: DTypeLike, within: str = "") -> Any:
    """The module with its weights whole along the axes that only store them.

    Matrices are rounded to the compute dtype before they travel, so bf16 costs half of fp32; their
    gradients come back cut. Experts, a layer's indexer and the up-projection of its latents are
    left: each is gathered where it is used.

    Args:
        module: any part of the model.
        rules: from letters to axes.
        dtype: the compute dtype.
        within: the module's own name, where letters go by it.
    """
    if not mesh_sizes():
        return module

    def leaf(path: Any, w: Array) -> Array:
        name = path_name(path)
        if any(part in f"/{name}" for part in ("/indexer/", "/experts/", "/kv_b_proj/")):
            return w
        letters = letters_of(within + name)
        multiplies = len(letters.replace(" ", "")) == 2 and "weights_proj" not in name
        if multiplies and "gate/weight" not in name and w.dtype in (jnp.float32, jnp.bfloat16):
            w = w.astype(dtype)
        return whole(w, rules, letters)

    return jax.tree_util.tree_map_with_path(leaf, module)


def whole(w: Array, rules: Rules, letters: str) -> Array:
    """A weight, whole along the axes that only store it; its gradient comes back cut.

    To be called on what enters a product: where the partitioner meets anything but a cut behind
    the sum over devices, such as two gradients side by side, it sums them whole.
    """
    if not mesh_sizes():
        return w
    used = dataclasses.replace(rules, **dict.fromkeys(_STORED))
    return _whole(w, spec(used, letters), spec(rules, letters))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(w: Array, whole: PartitionSpec, cut: PartitionSpec) -> Array:
    return lax.with_sharding_constraint(w, whole)


def _whole_forward(w, whole, cut):
    return _whole(w, whole, cut), None


def _whole_backward(whole, cut, _, g):
    # Whole first: or the partitioner cuts the factors of the product that makes g, which are split
    # by tokens, anew. A sum over devices of which each keeps a part becomes a reduce-scatter.
    return (lax.with_sharding_constraint(lax.with_sharding_constraint(g, whole), cut),)


_whole.defvjp(_whole_forward, _whole_backward)


def lookup(
    table: Float[Array, "W D"], tokens: Int[Array, "B T"], rules: Rules, dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Rows of the embedding.

    A device holds some columns of every row. It looks them up for the tokens of all devices that
    hold the others, and columns are exchanged: no device ever holds the table, nor its gradient.
    """
    columns, words = axes_of(rules, "D"), axes_of(rules, "W")

    def local(table: Array, tokens: Array) -> Array:
        if columns:
            tokens = lax.all_gather(tokens, columns)
        rows = _rows(table, tokens, words).astype(dtype)
        if columns:
            rows = lax.all_to_all(rows, columns, split_axis=0, concat_axis=3, tiled=True)[0]
        return lax.psum(rows, words) if words else rows

    return per_device(local, rules, ("W D", "B T"), "B T _")(table, tokens)


def _rows(table: Array, tokens: Array, words: Axes) -> Array:
    """Rows of a table that holds some words only; zeros for the others."""
    if not words:
        return jnp.take(table, tokens, axis=0)
    tokens = tokens - lax.axis_index(words) * table.shape[0]
    held = (tokens >= 0) & (tokens < table.shape[0])
    rows = jnp.take(table, jnp.where(held, tokens, 0), axis=0)
    return jnp.where(held[..., None], rows, 0)


# --- tokens of a sequence ------------------------------------------------------------------------


def order_of(rules: Rules) -> int:
    """For how many devices tokens are in zig-zag order."""
    return parts(by_query(rules), "T")


def deal_queries(rules: Rules) -> Callable[[Array], Array]:
    """What turns `[B, T, N, ...]` of some heads into that of some queries, inside `per_device`."""
    heads = axes_of(rules, "N")
    if not heads:
        return lambda x: x
    return lambda x: lax.all_to_all(x, heads, split_axis=1, concat_axis=2, tiled=True)


def to_zigzag(x: Array, devices: int) -> Array:
    """`[B, T, ...]` from natural to zig-zag order for so many devices."""
    chunks = x.reshape(x.shape[0], 2, devices, -1, *x.shape[2:])
    return jnp.stack([chunks[:, 0], chunks[:, 1, ::-1]], axis=2).reshape(x.shape)


def from_zigzag(x: Array, devices: int) -> Array:
    """The inverse of `to_zigzag`."""
    chunks = x.reshape(x.shape[0], devices, 2, -1, *x.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x.shape)


def all_keys(x: Array, axes: Axes, devices: int, wide: bool = False) -> Array:
    """Keys of all devices, `[B, S, ...]` in natural order, from each device's own.

    To be called inside `per_device`. The gradient is summed over the devices in fp32, whatever
    type it has, and rounded once.

    Args:
        x: this device's two chunks.
        axes: over which keys are dealt out; empty: x has all.
        devices: for how many tokens are in zig-zag order: `order_of(rules)`.
        wide: keys in fp32, for an op that rounds them and leaves their gradient in fp32. They
            travel as they are, and two conversions are none.
    """
    if axes:
        x = _gather_keys(x, axes, jnp.dtype(jnp.float32) if wide else x.dtype, x.dtype)
    elif wide:
        x = x.astype(jnp.float32)
    return from_zigzag(x, devices) if devices > 1 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_keys(x: Array, axes: Axes, dtype: jnp.dtype, narrow: jnp.dtype) -> Any:
    return lax.all_gather(x, axes, axis=1, tiled=True).astype(dtype)


def _gather_keys_forward(x, axes, dtype, narrow):
    return _gather_keys(x, axes, dtype, narrow), None


def _gather_keys_backward(axes, dtype, narrow, _, g):
    g = g.astype(jnp.float32)
    return (lax.psum_scatter(g, axes, scatter_dimension=1, tiled=True).astype(narrow),)


_gather_keys.defvjp(_gather_keys_forward, _gather_keys_backward)


def in_zigzag[Tree](tree: Tree, rules: Rules) -> Tree:
    """Arrays `[B, T]` from natural order to that of the devices: the model's entrance."""
    devices = order_of(rules)
    if devices == 1:
        return tree
    return jax.tree.map(lambda x: to_zigzag(x, devices), tree)


def in_natural_order(x: Array, rules: Rules) -> Array:
    """`[B, T, ...]` back in natural order: the model's exit.

    Every device has one chunk of even and one of odd number, so that two permutations do it.
    """
    rules = by_query(rules)  # a device's chunks lie on the devices that share its queries
    axes, devices = axes_of(rules, "T"), parts(rules, "T")
    if devices == 1:
        return x
    low, high = list(range(devices)), [2 * devices - 1 - d for d in range(devices)]
    even = [(d, (high[d] if d % 2 else low[d]) // 2) for d in range(devices)]
    odd = [(d, (low[d] if d % 2 else high[d]) // 2) for d in range(devices)]

    def local(x: Array) -> Array:
        half = x.shape[1] // 2
        first, second = x[:, :half], x[:, half:]
        swap = lax.axis_index(axes) % 2 == 1
        chunks = jnp.where(swap, second, first), jnp.where(swap, first, second)
        moved = [lax.ppermute(c, axes, p) for c, p in zip(chunks, (even, odd), strict=True)]
        return jnp.concatenate(moved, axis=1)

    letters = "B T" + " _" * (x.ndim - 2)
    return per_device(local, rules, (letters,), letters)(x)
