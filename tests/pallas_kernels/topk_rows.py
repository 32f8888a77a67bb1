"""Rows that are hard for a top-k, and what is right for them."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import KeyRange


def best(scores, starts, ends, topk: int) -> np.ndarray:
    """The columns of the `topk` best of each row, ascending, -1 padded: a stable sort."""
    out = np.full((len(scores), topk), -1, np.int32)
    for selected, row, start, end in zip(out, scores, starts, ends, strict=True):
        visible = row[max(start, 0) : max(end, 0)]
        nan = np.isnan(visible)
        order = np.lexsort((-np.where(nan, 0, visible), nan))[:topk]  # -0.0 and 0.0 compare equal
        selected[: len(order)] = np.sort(order) + max(start, 0)
    return out


def by_lax(scores: jax.Array, ranges: KeyRange, topk: int) -> jax.Array:
    """The same by `lax.top_k`, which prefers the lower index too; of scores without NaN or -inf."""
    width = scores.shape[-1]
    scores = jnp.where(scores == 0, 0.0, scores)  # it puts -0.0 below 0.0
    visible = ranges.mask(width)
    best = jax.lax.top_k(jnp.where(visible, scores, -jnp.inf), topk)[1]
    hidden = ~jnp.take_along_axis(visible, best, axis=-1)
    best = jnp.sort(jnp.where(hidden, width, best), axis=-1)
    return jnp.where(best == width, -1, best)


def hard_rows(width: int, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Name and scores of rows from distributions on which selectors are known to fail."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(width).astype(np.float32)

    def mostly(value, share):
        return np.where(rng.random(width) < share, np.float32(value), normal)

    def from_bits(bits):
        return bits.astype(np.uint32).view(np.float32)

    yield "normal", normal
    yield "all equal", np.full(width, 1.5, np.float32)
    yield "zeros of both signs", np.where(rng.random(width) < 0.5, 0.0, -0.0).astype(np.float32)
    yield "relu plateau", np.maximum(normal, 0)
    yield "mostly relu plateau", np.maximum(normal - 2, 0)
    yield "two values", np.where(rng.random(width) < 0.03, 1, -1).astype(np.float32)
    yield "all -inf", np.full(width, -np.inf, np.float32)
    yield "mostly -inf", mostly(-np.inf, 0.99)
    yield "some inf", mostly(np.inf, 0.3)
    yield "denormals", from_bits(rng.integers(0, 50, width) | rng.integers(0, 2, width) << 31)
    yield "all NaN", np.full(width, np.nan, np.float32)
    yield "mostly NaN", mostly(np.nan, 0.995)
    yield "NaN of both signs", mostly(np.nan, 0.5) * np.float32(-1)
    yield "NaN and -inf", np.where(rng.random(width) < 0.5, np.nan, -np.inf).astype(np.float32)
    yield "ascending", np.sort(normal)
    yield "descending", np.sort(normal)[::-1].copy()
    yield "ascending steps", np.sort(np.round(normal * 4) / 4)
    yield "one radix bin", from_bits(0x3F800000 + rng.integers(0, 1024, width))
    yield "two radix bins", from_bits(0x3FA00000 + rng.integers(-40, 40, width))
    late = np.where(rng.random(width) < 0.02, 2, 0)  # just above the many equal ones before them
    yield "one ulp above", from_bits(0x3F800000 + np.where(np.arange(width) < width // 2, 1, late))
    yield "any bits", from_bits(rng.integers(0, 2**32, width))
    yield "winners last", np.concatenate([normal[: width // 2], np.abs(normal[width // 2 :]) + 9])


def hard_ranges(rows: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of ranges: ragged, some empty, some outside the row."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(-3, width // 2, rows)
    ends = rng.integers(width // 3, width + 5, rows)
    return starts.astype(np.int32), ends.astype(np.int32)
