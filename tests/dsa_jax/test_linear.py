import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from dsa_jax.config import Fp8Weights
from dsa_jax.linear import Linear, fp8_matmul, wide_product
from dsa_jax.quantization import weight_quant


def e4m3(x):
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def test_fp8_matmul_is_the_block_scaled_product():
    """Sum over blocks of (quantised x . quantised w) * scale of x * scale of w, in float64."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 256)).astype(np.float32)
    w = rng.standard_normal((256, 192)).astype(np.float32)
    fp8 = Fp8Weights((128, 128), "ue8m0")
    q, scale = weight_quant(jnp.asarray(w), fp8.tile, "ue8m0")
    expected = np.zeros((5, 192))
    for block in range(2):
        rows = slice(128 * block, 128 * (block + 1))
        amax = np.abs(x[:, rows]).max(1, keepdims=True)
        sx = 2.0 ** np.ceil(np.log2(amax / 448))
        part = e4m3(x[:, rows] / sx) @ np.asarray(q, np.float64)[rows]
        expected += part * sx * np.repeat(np.asarray(scale, np.float64)[block], 128)[:192]
    out = fp8_matmul(jnp.asarray(x), q, scale, fp8)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)  # fp32 sums of 256 terms
    assert np.abs(out - x @ w).max() > 0.1  # and it is not the plain product


def test_modules_of_either_kind():
    fp8 = Fp8Weights((128, 128), "ue8m0")
    options = {"std": 0.5, "dtype": jnp.bfloat16, "fp8": fp8}
    plain = Linear(256, 192, rngs=nnx.Rngs(0), param_dtype=jnp.float32, **options)
    quantised = Linear(256, 192, rngs=nnx.Rngs(0), param_dtype=jnp.float8_e4m3fn, **options)
    assert plain.weight.dtype == jnp.float32
    np.testing.assert_allclose(np.std(plain.weight[...]), 0.5, rtol=0.02)
    assert quantised.weight.dtype == jnp.float8_e4m3fn
    assert quantised.scale.shape == (2, 2)
    # Same draw: e4m3 keeps four bits.
    w = np.asarray(plain.weight[...])
    np.testing.assert_allclose(
        np.asarray(quantised.dequantized(), np.float32), w, rtol=2**-4, atol=1e-2
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 256)), jnp.bfloat16)
    assert plain(x).dtype == quantised(x).dtype == jnp.bfloat16
    difference = np.asarray(plain(x) - quantised(x), np.float32)
    assert 0.01 < difference.std() / np.asarray(plain(x), np.float32).std() < 0.1


def test_a_float_checkpoint_ignores_the_format():
    bf16 = Linear(8, 4, rngs=nnx.Rngs(0), std=1.0, dtype=jnp.float32, param_dtype=jnp.float8_e4m3fn)
    assert bf16.weight.dtype == jnp.bfloat16


def test_gradients_of_a_wide_product_are_products_of_narrow_values():
    """Of an fp32 gradient rounded to bf16, summed in fp32; the fp32 weight's is not rounded."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 5, 32), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (32, 24))
    g = jax.random.normal(keys[2], (3, 5, 24))
    y, pull = jax.vjp(wide_product, x, weight)
    dx, dweight = pull(g)
    assert (y.dtype, dx.dtype, dweight.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    x, w, g = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, weight, g))
    # Order of 32 and of 15 terms in fp32; dx is rounded to bf16's 8 bits.
    np.testing.assert_allclose(y, x @ w, rtol=0, atol=3e-5)
    np.testing.assert_allclose(dweight, np.einsum("bti,bto->io", x, g), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(dx, np.float64), g @ w.T, rtol=2**-8, atol=1e-5)
