"""Cases for `tests.aot.report`: the backward of sparse attention as its callers meet it."""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import backward_sm90


def case(heads: int = 128, latent: int = 512, rope: int = 64, selected: int = 2048):
    def backward(*arguments):
        return backward_sm90.backward(*arguments, scale=0.1)

    queries, keys, width = 4096, 131072, latent + rope

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    return backward, (
        array(queries, heads, width),
        array(keys, width),
        array(queries, selected, dtype=jnp.int32),
        array(queries, heads, latent),
        array(queries, heads, dtype=jnp.float32),
        array(queries, heads, latent),
        array(queries, heads, dtype=jnp.float32),
    )


def deepseek():
    return case()


def heads_16():
    return case(heads=16)


def no_rope():
    return case(rope=0)


def narrow():
    return case(latent=256, selected=100)
