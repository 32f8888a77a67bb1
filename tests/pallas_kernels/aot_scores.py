"""Cases for `tests.aot.report`: the scores kernel as its callers meet it."""

import jax
import jax.numpy as jnp

from pallas_kernels import KeyRange, lightning_indexer
from pallas_kernels.lightning_indexer import scores_sm90


def case(
    heads=64, width=128, dtype=jnp.float8_e4m3fn, scaled=True, batch=1, queries=1000, keys=5002
):
    def sds(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def scores(q, k, w, start, end, scale):
        return scores_sm90.indexer_scores(q, k, w, KeyRange(start, end), scale if scaled else None)

    bound = sds(batch, queries, dtype=jnp.int32)
    return scores, (
        sds(batch, queries, heads, width, dtype=dtype),
        sds(batch, keys, width, dtype=dtype),
        sds(batch, queries, heads),
        bound,
        bound,
        sds(batch, keys),
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


def e4m3_whole_tiles():
    return case(keys=5120)


def decode():
    return case(batch=64, queries=1, keys=131072)


def decode_bf16_16_heads():
    return case(heads=16, dtype=jnp.bfloat16, batch=64, queries=8)


def prefill(length: int = 131072):
    """A causal prefill in one call, the scores in windows of the default workspace."""

    def select(q, k, w, scale):
        ranges = KeyRange.causal(*q.shape[:2])
        options = dict(topk=2048, k_scale=scale, implementation="mosaic")
        return lightning_indexer(q, k, w, ranges, **options).indices

    e4m3 = jnp.float8_e4m3fn
    return select, (
        jax.ShapeDtypeStruct((1, length, 64, 128), e4m3),
        jax.ShapeDtypeStruct((1, length, 128), e4m3),
        jax.ShapeDtypeStruct((1, length, 64), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.float32),
    )
