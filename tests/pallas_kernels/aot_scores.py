"""Cases for `tests.aot.report`: the scores kernel as its callers meet it."""

import jax
import jax.numpy as jnp

from pallas_kernels import KeyRange
from pallas_kernels.lightning_indexer import scores_sm90


def case(heads: int = 64, width: int = 128, dtype=jnp.float8_e4m3fn, scaled: bool = True):
    def sds(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def scores(q, k, w, start, end, scale):
        return scores_sm90.indexer_scores(q, k, w, KeyRange(start, end), scale if scaled else None)

    queries, keys = 1000, 5002
    bound = sds(1, queries, dtype=jnp.int32)
    return scores, (
        sds(1, queries, heads, width, dtype=dtype),
        sds(1, keys, width, dtype=dtype),
        sds(1, queries, heads),
        bound,
        bound,
        sds(1, keys),
    )


def e4m3():
    return case()


def e4m3_32_heads():
    return case(heads=32)


def e4m3_16_heads():
    return case(heads=16)


def e4m3_width_64():
    return case(width=64, scaled=False)


def bf16():
    return case(dtype=jnp.bfloat16)
