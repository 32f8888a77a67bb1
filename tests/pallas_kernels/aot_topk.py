"""Cases for `tests.aot.report`: the top-k kernel as its callers meet it."""

import jax
import jax.numpy as jnp

from pallas_kernels.lightning_indexer import topk_sm90


def case(width: int, topk: int = 2048, rows: int = 4096, **sizes):
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    scores = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    return lambda *args: topk_sm90.select_rows(*args, topk=topk, **sizes), (scores, row, row)


def long_rows():
    return case(131072)


def short_rows():
    return case(8192)


def ragged_rows():
    return case(5003, 77)


def few_rows():
    return case(131072, rows=4)
