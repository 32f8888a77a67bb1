"""Inputs for the op tests: small, of odd sizes, with every kind of row."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import KeyRange, Selection

B, T, I, H, N, C, R, P, V, K = 2, 13, 3, 6, 4, 5, 3, 6, 7, 4
SCALE = 0.7

BUDGET = 512 * 2**20

# A kind of range, and how the work is cut (the fixture workspace_bytes).
LAYOUTS = [("packed", "whole"), ("packed", "all"), ("prefix", "queries"), ("ragged", "all")]


def key_range(kind: str) -> tuple[KeyRange, int]:
    """Ranges of `[B, T]` queries, and S."""
    if kind == "packed":  # documents, one of a single token, and padding; rows differ
        rows = [[1] * 5 + [2] * 1 + [3] * 5 + [0] * 2, [1] * 2 + [2] * 11]
        return KeyRange.packed(jnp.array(rows)), T
    if kind == "prefix":  # more keys than queries, as with a cache; one row sees fewer than K
        return KeyRange.causal(B, T, offset=jnp.array([7, 0])), T + 7
    # Sliding windows, empty ranges, and ranges that reach outside the keys.
    t = np.arange(T)
    start = np.stack([t - 6, np.where(t % 4 == 0, 9, t // 2)]).astype(np.int32)
    end = np.stack([t + 1, np.where(t % 4 == 0, 9, t + 6)]).astype(np.int32)
    return KeyRange(jnp.asarray(start), jnp.asarray(end)), T


class Case(NamedTuple):
    """Arguments of all ops on the same queries and keys."""

    ranges: KeyRange
    selection: Selection
    iq: jax.Array
    ik: jax.Array
    iw: jax.Array
    q: jax.Array  # absorbed
    kv: jax.Array
    qd: jax.Array  # un-absorbed
    k: jax.Array
    v: jax.Array


def case(kind: str, dtype=jnp.float32, seed: int = 0) -> Case:
    """A case whose selection is random, so that it does not follow any score."""
    rng = np.random.default_rng(seed)
    ranges, keys = key_range(kind)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)

    return Case(
        ranges=ranges,
        selection=random_selection(ranges, keys, rng),
        iq=normal(B, T, I, H),
        ik=normal(B, keys, H),
        iw=normal(B, T, I, dtype=jnp.float32),  # of both signs
        q=normal(B, T, N, C + R),
        kv=normal(B, keys, C + R),
        qd=normal(B, T, N, P + R),
        k=normal(B, keys, N, P + R),
        v=normal(B, keys, N, V),
    )


def random_selection(ranges: KeyRange, keys: int, rng, selected: int = K) -> Selection:
    """Up to `selected` random visible keys of each query."""
    start, end = np.asarray(ranges.start), np.asarray(ranges.end)
    indices = np.full((*start.shape, selected), -1, np.int32)
    for b, t in np.ndindex(*start.shape):
        seen = np.arange(max(start[b, t], 0), min(end[b, t], keys))
        some = np.sort(rng.permutation(seen)[:selected])
        indices[b, t, : some.size] = some
    return Selection(jnp.asarray(indices))
