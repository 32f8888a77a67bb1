"""Cases for `tests.aot.report`: the forward kernel of sparse attention as its callers meet it."""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import forward_sm90


def case(heads: int = 128, latent: int = 512, rope: int = 64):
    def forward(q, kv, indices):
        return forward_sm90.forward(q, kv, indices, value_width=latent, scale=0.1)

    queries, keys, width = 4096, 131072, latent + rope
    return forward, (
        jax.ShapeDtypeStruct((1, queries, heads, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, keys, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, queries, 2048), jnp.int32),
    )


def deepseek():
    return case()


def heads_16():
    return case(heads=16)


def no_rope():
    return case(rope=0)


def narrow():
    return case(latent=256)
