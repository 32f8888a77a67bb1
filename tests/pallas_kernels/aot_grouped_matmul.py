"""Cases for `tests.aot.report`: the grouped matmul kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import rows_sm90, weights_sm90

ROWS, DEPTH, COLUMNS, GROUPS = 3001, 2048, 4096, 7


def _sds(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _rows(transpose):
    def multiply(x, w, sizes):
        return rows_sm90.multiply(x, w, sizes, transpose=transpose, ctas=132)

    matrix = (COLUMNS, DEPTH) if transpose else (DEPTH, COLUMNS)
    return multiply, (_sds(ROWS, DEPTH), _sds(GROUPS, *matrix), _sds(GROUPS, dtype=jnp.int32))


def rows():
    return _rows(False)


def rows_transposed():
    return _rows(True)


def weights():
    def multiply(x, g, sizes):
        return weights_sm90.multiply(x, g, sizes, ctas=132)

    return multiply, (_sds(ROWS, DEPTH), _sds(ROWS, COLUMNS), _sds(GROUPS, dtype=jnp.int32))
