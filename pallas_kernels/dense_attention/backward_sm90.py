"""Dense attention on Hopper, backward: one kernel for dq, one for dk and dv.

Each rebuilds the softmax from lse: two products of five more than one kernel would need, and in
return no sum crosses CTAs, so that gradients are the same in every run.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dense_attention import (
    backward_keys_sm90,
    backward_queries_sm90,
    key_tiles,
    reference,
)
from pallas_kernels.hopper.tiles import LOG2E
from pallas_kernels.types import KeyRange


def serves(width: int, value_width: int) -> bool:
    """Whether registers and shared memory hold heads so wide."""
    return width <= 192 and value_width <= 128


def backward(q, k, v, ranges, out, lse, dout, dlse, *, scale: float, workspace_bytes: int):
    """`(dq, dk, dv)`, by the signature of the reference, which serves wider heads."""
    arguments = (q, k, v, ranges, out, lse, dout, dlse)
    if serves(q.shape[3], v.shape[3]):
        return gradients(*arguments, scale=scale)
    return reference.backward(*arguments, scale=scale, workspace_bytes=workspace_bytes)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def gradients(
    q, k, v, ranges: KeyRange, out, lse, dout, dlse, *, scale: float, interpret: Any = None
):
    """`(dq, dk, dv)` in the dtypes of q, k and v.

    Args:
        q, k, v, ranges: as in `dense_attention`.
        out, lse: what it returned.
        dout, dlse: their gradients.
        scale: factor of the dot products.
        interpret: parameters of the GPU interpreter, or None.
    """
    queries, keys = q.shape[1], k.shape[1]
    if 0 in (*q.shape[:3], keys):
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1) - dlse
    # A query that sees nothing has weights exp2(. - inf) = 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    missing = ((0, 0), (0, 0), (0, -queries % backward_queries_sm90.BLOCK))
    lse = jnp.pad(jnp.swapaxes(lse, 1, 2), missing, constant_values=jnp.inf)
    delta = jnp.pad(jnp.swapaxes(delta, 1, 2), missing)
    q, k, v, dout = (key_tiles.pad_rows(x, 64) for x in (q, k, v, dout.astype(q.dtype)))
    arguments = (q, k, v, ranges, lse, delta, dout)
    options = dict(scale=scale, interpret=interpret)
    dq = backward_queries_sm90.gradient(*arguments, **options)
    dk, dv = backward_keys_sm90.gradient(*arguments, **options)
    return dq[:, :queries], dk[:, :keys], dv[:, :keys]
