"""Checks of arguments: each error names the op, the argument, its value, the rule, a way out."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.types import KeyRange, Selection

FLOATS = (jnp.bfloat16, jnp.float32)
FLOATS_AND_FP8 = (*FLOATS, jnp.float8_e4m3fn)


def shapes(op: str, arrays: Mapping[str, tuple[Any, str]]) -> dict[str, int]:
    """Checks that arrays agree on their lettered axes.

    Args:
        op: the op's name.
        arrays: argument name -> the array and its axes, such as `"B T N C+R"`.

    Returns:
        The length of each letter.
    """
    lengths: dict[str, int] = {}
    seen_in: dict[str, str] = {}
    for name, (array, axes) in arrays.items():
        shape = getattr(array, "shape", None)
        if shape is None:
            raise TypeError(f"{op}: {name} is {array!r}, not an array; pass an array [{axes}]")
        letters = axes.split()
        if len(shape) != len(letters):
            raise ValueError(
                f"{op}: {name} has shape {shape}, {len(shape)} axes; it must have the "
                f"{len(letters)} axes [{axes}]. Add or drop axes of {name}."
            )
        for letter, length in zip(letters, shape, strict=True):
            if length == 0:
                raise ValueError(
                    f"{op}: {name} has shape {shape}, so {letter} is 0 of [{axes}]; every axis "
                    "must have at least one entry. Skip the call for empty inputs."
                )
            if lengths.setdefault(letter, length) != length:
                raise ValueError(
                    f"{op}: {name} has shape {shape}, so {letter} = {length} of [{axes}], but "
                    f"{seen_in[letter]} has {letter} = {lengths[letter]}. Slice, pad or rebuild "
                    "one of the two so that they agree."
                )
            seen_in.setdefault(letter, name)
    return lengths


def dtype(op: str, allowed: tuple, **arrays: jax.Array) -> None:
    """Checks that arrays share one dtype, and that it is an allowed one."""
    names = [jnp.dtype(a).name for a in allowed]
    (first, reference), *_ = arrays.items()
    for name, array in arrays.items():
        if not hasattr(array, "dtype"):
            raise TypeError(f"{op}: {name} is {array!r}, not an array; pass an array")
        if array.dtype not in [jnp.dtype(a) for a in allowed]:
            raise TypeError(
                f"{op}: {name} is {array.dtype}; it must be {' or '.join(names)}. "
                f"Cast it: {name}.astype(jnp.{names[0]})."
            )
        if array.dtype != reference.dtype:
            raise TypeError(
                f"{op}: {name} is {array.dtype} but {first} is {reference.dtype}; they must be "
                f"equal. Cast one: {name}.astype({first}.dtype)."
            )


def keys_dtype(op: str, queries: tuple[str, jax.Array], keys: tuple[str, jax.Array]) -> None:
    """Checks that keys have the queries' dtype, or fp32 for the sake of their gradient."""
    (name, q), (other, k) = queries, keys
    if getattr(k, "dtype", None) == jnp.float32:
        dtype(op, FLOATS, **{name: q})
    else:
        dtype(op, FLOATS, **{name: q, other: k})


def ranges(op: str, value: KeyRange) -> None:
    """Checks the type and dtype of a key range (`shapes` checks its shape)."""
    if not isinstance(value, KeyRange):
        raise TypeError(
            f"{op}: ranges is {type(value).__name__}, not a KeyRange. Build one with "
            "KeyRange.causal, KeyRange.packed, or KeyRange(start, end)."
        )
    dtype(op, (jnp.int32,), **{"ranges.start": value.start, "ranges.end": value.end})


def selection(op: str, value: Selection) -> None:
    """Checks the type and dtype of a selection (`shapes` checks its shape)."""
    if not isinstance(value, Selection):
        raise TypeError(
            f"{op}: selection is {type(value).__name__}, not a Selection. Use lightning_indexer "
            "or select_topk, or Selection(indices) with indices ascending and -1 at the end."
        )
    dtype(op, (jnp.int32,), **{"selection.indices": value.indices})


def positive_int(op: str, name: str, value: Any, at_most: int | None = None) -> int:
    """Checks a static integer argument and returns it as an int."""
    try:
        if isinstance(value, bool):
            raise TypeError("a bool is not a number")
        number = operator.index(value)
    except Exception as error:  # a tracer raises an error of its own, others TypeError
        raise TypeError(
            f"{op}: {name}={value!r} must be a Python int known when the op is traced. If it comes "
            f"through jax.jit, name it in static_argnames."
        ) from error
    if number < 1 or (at_most is not None and number > at_most):
        upper = "" if at_most is None else f" and at most {at_most}"
        raise ValueError(f"{op}: {name}={number} must be at least 1{upper}. Pass such a {name}.")
    return number


def scale(op: str, value: Any) -> float:
    """Checks the softmax scale and returns it as a float."""
    if not isinstance(value, (int, float, np.floating)):
        raise TypeError(
            f"{op}: scale={value!r} must be a Python float known when the op is traced, such as "
            "width**-0.5; to learn or trace it, multiply it into q and pass scale=1.0."
        )
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"{op}: scale={value} must be positive and finite, such as width**-0.5 with the "
            "width of the un-absorbed query."
        )
    return float(value)


def range_shapes(value: KeyRange) -> dict[str, tuple[Any, str]]:
    """The entries of a key range for `shapes`."""
    return {"ranges.start": (value.start, "B T"), "ranges.end": (value.end, "B T")}
