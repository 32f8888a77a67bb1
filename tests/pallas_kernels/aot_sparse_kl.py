"""Cases for `tests.aot.report`: the loss of the sparse stage and its gradient."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import Selection, indexer_kl_sparse


def deepseek(
    gradient: bool = True, *, queries: int = 4096, keys: int = 32768, heads: int = 128,
    width: int = 576, selected: int = 2048,
):  # fmt: skip
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    def loss(iq, ik, iw, q, kv, lse, indices, g):
        def kl(iq, ik, iw):
            return indexer_kl_sparse(
                iq, ik, iw, q, kv, lse, Selection(indices), scale=0.1, implementation="mosaic"
            )

        if not gradient:
            return kl(iq, ik, iw)
        value, pull = jax.vjp(kl, iq, ik, iw)
        return value, pull(g)

    return loss, (
        array(queries, 64, 128),
        array(keys, 128),
        array(queries, 64, dtype=jnp.float32),
        array(queries, heads, width),
        array(keys, width),
        array(queries, heads, dtype=jnp.float32),
        array(queries, selected, dtype=jnp.int32),
        array(queries, dtype=jnp.float32),
    )


value = functools.partial(deepseek, False)
# Windows; heads and selected keys that are no whole tiles.
odd = functools.partial(deepseek, queries=9000, heads=16, width=512, selected=2000)
# So many keys that all rows are stored.
far = functools.partial(deepseek, keys=131072)
