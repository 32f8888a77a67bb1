"""How far a selection may be from the top of scores that were rounded otherwise."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import Selection

# Of the root mean square of a row's scores. The tensor cores keep some 14 bits of a sum of e4m3
# products: an error of 1.2e-4 of the scores in the 2-norm, of which this is eight. bf16 products
# are summed in fp32, only in another order.
MARGIN = {"float8_e4m3fn": 1e-3, "bfloat16": 1e-5}


class Differences(NamedTuple):
    """Counts over all rows.

    Attributes:
        beyond: keys that are wrong by more than the margin: selected though their score lies that
            far below the K-th best, or not selected though that far above it, or not visible.
        changed: selected keys that are not among the K best.
    """

    beyond: int
    changed: int


def differences(found: jax.Array, scores: jax.Array, topk: int, margin: float) -> Differences:
    """Compares `[B, T, K]` selected keys with `[B, T, S]` scores, -inf where one is not visible."""
    topk = min(topk, scores.shape[-1])
    return Differences(*(int(x) for x in _count(found, scores, topk, margin)))


@functools.partial(jax.jit, static_argnums=2)
def _count(found, scores, topk, margin):
    chosen = Selection(found).mask(scores.shape[-1])
    visible = scores > -jnp.inf
    last = jax.lax.top_k(scores, topk)[0][..., -1:]
    square = jnp.where(visible, scores, 0.0) ** 2
    rows = jnp.maximum(visible.sum(-1, keepdims=True), 1)
    margin = margin * jnp.sqrt(square.sum(-1, keepdims=True) / rows)
    missed = visible & ~chosen & (scores > last + margin)
    extra = chosen & ((scores < last - margin) | ~visible)
    few = chosen.sum(-1) != jnp.minimum(visible.sum(-1), topk)
    return missed.sum() + extra.sum() + few.sum(), (chosen & (scores < last)).sum()
