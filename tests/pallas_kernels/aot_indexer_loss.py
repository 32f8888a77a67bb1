"""Cases for `tests.aot.report`: the warm-up loss and its gradient as their callers meet them."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import KeyRange
from pallas_kernels.indexer_loss import dense_sm90

WORKSPACE_BYTES = 2**23


def dense(
    width: int = 192, index_width: int = 128, gradient: bool = True, *,
    queries: int = 1000, keys: int = 5002, heads: int = 3, workspace_bytes: int = WORKSPACE_BYTES,
):  # fmt: skip
    def sds(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    batch = 1

    def loss(iq, ik, iw, q, k, lse, start, end, g):
        return dense_sm90.run(
            iq, ik, iw, q, k, lse, KeyRange(start, end), g if gradient else None,
            scale=width**-0.5, workspace_bytes=workspace_bytes,
        )  # fmt: skip

    bound = sds(batch, queries, dtype=jnp.int32)
    return loss, (
        sds(batch, queries, 64, index_width),
        sds(batch, keys, index_width),
        sds(batch, queries, 64, dtype=jnp.float32),
        sds(batch, queries, heads, width),
        sds(batch, keys, heads, width),
        sds(batch, queries, heads, dtype=jnp.float32),
        bound,
        bound,
        sds(batch, queries, dtype=jnp.float32),
    )


dense_value = functools.partial(dense, gradient=False)
# 128 heads at 128K tokens: what the warm-up runs on one GPU.
long = functools.partial(dense, queries=2**17, keys=2**17, heads=128, workspace_bytes=2**30)
dense_width_64 = functools.partial(dense, 64, 64)
