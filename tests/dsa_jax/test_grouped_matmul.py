"""The experts' product, in every form, against a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import jit

from dsa_jax import grouped_matmul as module
from dsa_jax.grouped_matmul import grouped_matmul

SIZES = ([5, 0, 13, 2], [0, 0, 0, 20], [20, 0, 0, 0], [5, 5, 5, 5], [1, 17, 1, 1])


def loop(x, w, sizes):
    out, row = [], 0
    for e, n in enumerate(sizes):
        out.append(x[row : row + n] @ w[e])
        row += n
    return np.concatenate(out)


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    return rng.standard_normal((20, 6)).astype("f"), rng.standard_normal((4, 6, 7)).astype("f")


@pytest.mark.parametrize("form", ["tiled", "ragged_dot"])
def test_values_and_gradients(form, monkeypatch):
    if form == "ragged_dot":  # what other back ends run
        monkeypatch.setattr(module, "_TILED_WEIGHT_BYTES", 0)
    x, w = arrays()
    g = np.random.default_rng(1).standard_normal((20, 7)).astype("f")

    @jit
    def run(x, w, sizes, g):
        out, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return out, *pullback(g)

    for sizes in SIZES:
        out, dx, dw = run(x, w, jnp.array(sizes, jnp.int32), g)
        # fp32 sums of at most 20 products of order one.
        np.testing.assert_allclose(out, loop(x, w, sizes), atol=1e-5)
        np.testing.assert_allclose(dx, loop(g, w.swapaxes(1, 2), sizes), atol=1e-5)
        expert = np.repeat(np.arange(4), sizes)
        expected = [x[expert == e].T @ g[expert == e] for e in range(4)]
        np.testing.assert_allclose(dw, expected, atol=1e-5)


def test_more_tiles_than_one_a_group():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((600, 4)).astype("f"), rng.standard_normal((3, 4, 5)).astype("f")
    sizes = [400, 1, 199]
    out = jit(grouped_matmul)(x, w, jnp.array(sizes, jnp.int32))
    np.testing.assert_allclose(out, loop(x, w, sizes), atol=1e-5)


def test_bf16_sums_in_fp32():
    x, w = jnp.ones((8, 300), jnp.bfloat16), jnp.ones((1, 300, 2), jnp.bfloat16)
    out = jit(grouped_matmul)(x, w, jnp.array([8], jnp.int32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 300)  # a bf16 sum stalls at 256


def test_other_back_ends_get_ragged_dot():
    """Lowered for a GPU the program has no trace of the CPU's tiles."""
    x, w = arrays()
    traced = jax.jit(grouped_matmul).trace(x, w, jnp.array(SIZES[0], jnp.int32))
    assert "ragged_dot" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" not in traced.lower(lowering_platforms=("cpu",)).as_text()
