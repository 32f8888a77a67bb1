"""The groups' product and its gradients on Hopper."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import rows_sm90, weights_sm90
from pallas_kernels.lightning_indexer.scores_operands import sm_count


def unsupported(x, w) -> str | None:
    """Why the kernels cannot serve such rows and matrices; None where they can."""
    if not x.dtype == w.dtype == jnp.bfloat16:
        return f"x and w are {x.dtype} and {w.dtype}, the kernel takes bfloat16"
    for name, length in (("K", w.shape[1]), ("N", w.shape[2])):
        if length % rows_sm90.DEPTH or not length:
            return f"w has {name} = {length}, the kernel takes multiples of {rows_sm90.DEPTH}"
    if not (x.shape[0] and w.shape[0]):
        return f"there are M = {x.shape[0]} rows and E = {w.shape[0]} groups"
    return None


def multiply(x, w, group_sizes) -> jax.Array:
    """`out[m] = x[m] @ w[e]`: arguments as in `dsa_jax.grouped_matmul`."""
    return _rows(x, w, group_sizes, transpose=False)


def gradients(x, w, group_sizes, g) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and w, given that of the product."""
    return _rows(g, w, group_sizes, transpose=True), _weights(x, g, group_sizes)


# Jitted, so that products of equal shapes (an expert's gate and up) are one kernel of the program:
# lowering a kernel takes a second.
@functools.partial(jax.jit, static_argnames="transpose")
def _rows(x, w, group_sizes, *, transpose: bool) -> jax.Array:
    return rows_sm90.multiply(x, w, group_sizes, transpose=transpose, ctas=sm_count())


@jax.jit
def _weights(x, g, group_sizes) -> jax.Array:
    return weights_sm90.multiply(x, g, group_sizes, ctas=sm_count())
