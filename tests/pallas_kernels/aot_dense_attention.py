"""Cases for `tests.aot.report`: the dense attention kernels as their callers meet them."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import KeyRange
from pallas_kernels.dense_attention import backward_sm90, forward_sm90


def shapes(width: int, value_width: int):
    def sds(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    batch, queries, keys, heads = 1, 1000, 5002, 3
    bound = sds(batch, queries, dtype=jnp.int32)
    return (
        sds(batch, queries, heads, width),
        sds(batch, keys, heads, width),
        sds(batch, keys, heads, value_width),
        bound,
        bound,
    )


def forward(width: int = 192, value_width: int = 128):
    def attend(q, k, v, start, end):
        return forward_sm90.attend(q, k, v, KeyRange(start, end), scale=width**-0.5)

    return attend, shapes(width, value_width)


def backward(width: int = 192, value_width: int = 128):
    def gradients(q, k, v, start, end, out, lse, dout, dlse):
        arguments = (q, k, v, KeyRange(start, end), out, lse, dout, dlse)
        return backward_sm90.gradients(*arguments, scale=width**-0.5)

    *arrays, start, end = shapes(width, value_width)
    out = jax.ShapeDtypeStruct((*arrays[0].shape[:3], value_width), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct(arrays[0].shape[:3], jnp.float32)
    return gradients, (*arrays, start, end, out, lse, out, lse)


backward_128 = functools.partial(backward, 128, 128)
forward_256 = functools.partial(forward, 256, 256)
forward_128 = functools.partial(forward, 128, 128)
