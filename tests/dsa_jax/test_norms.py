import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.norms import LayerNorm, RMSNorm, layer_norm, rms_norm


def test_rms_norm_by_hand():
    x = jnp.array([[3.0, 4.0]])  # mean square 12.5
    out = rms_norm(x, jnp.array([1.0, 2.0]), 0.0, jnp.float32)
    np.testing.assert_allclose(out, [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)
    small = rms_norm(jnp.array([[1e-3, -1e-3]]), jnp.ones(2), 1e-6, jnp.float32)
    np.testing.assert_allclose(small, [[0.5**0.5, -(0.5**0.5)]], rtol=1e-6)  # eps is inside


def test_layer_norm_by_hand():
    x = jnp.array([[1.0, 3.0]])  # mean 2, variance 1
    out = layer_norm(x, jnp.array([2.0, 1.0]), jnp.array([0.5, 0.0]), 3.0, jnp.float32)
    np.testing.assert_allclose(out, [[0.5 - 1.0, 0.5]], rtol=1e-6)


def test_rounded_once():
    """bf16 in and out: the weight multiplies before the cast, the statistics are fp32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 48)), jnp.bfloat16)
    weight = jnp.asarray(1 + 0.3 * rng.standard_normal(48), jnp.float32)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight)
    out = rms_norm(x, weight, 1e-6, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.asarray(exact, jnp.bfloat16))
    twice = jnp.asarray(rms_norm(x, jnp.ones(48), 1e-6, jnp.bfloat16) * weight, jnp.bfloat16)
    assert (np.asarray(twice) != np.asarray(out)).mean() > 0.05  # what transformers computes
    weight = weight.astype(jnp.bfloat16)  # as its weights are
    twice = rms_norm(x, jnp.ones(48), 1e-6, jnp.bfloat16).astype(jnp.float32) * weight
    switched = jax.jit(lambda x: rms_norm(x, weight, 1e-6, jnp.bfloat16, round_first=True))(x)
    np.testing.assert_array_equal(switched, twice.astype(jnp.bfloat16))


def test_modules_start_neutral():
    x = jnp.array([[1.0, -1.0, 1.0, -1.0]])
    for norm in (
        RMSNorm(4, eps=0.0, dtype=jnp.float32, param_dtype=jnp.bfloat16),
        LayerNorm(4, eps=0.0, dtype=jnp.float32),
    ):
        np.testing.assert_allclose(norm(x), x)
    assert LayerNorm(4, eps=0.0, dtype=jnp.bfloat16).weight.dtype == jnp.float32
