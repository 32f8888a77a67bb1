"""FP8 with known answers, and the Hadamard rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.quantization import (
    act_dequant,
    act_quant,
    hadamard,
    hadamard_matrix,
    power_of_two_above,
    round_trip,
    weight_dequant,
    weight_quant,
)


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (0.0, 2.0**-22),  # the floor of 1e-4 is on the maximum
        (1e-4, 2.0**-22),
        (0.5, 2.0**-9),
        (1.0, 2.0**-8),
        (3.5, 2.0**-7),  # 3.5 / 448 is a power of two already
        (7.0, 2.0**-6),
        (448.0, 1.0),
        (449.0, 2.0),
    ],
)
def test_known_scales(amax, scale):
    x = jnp.zeros(128).at[17].set(-amax)
    assert act_quant(x)[1][0] == scale


def test_known_vector():
    x = jnp.array([1, -0.3, 0.07, 2.5, 1e-3, -5, 0, 3.3], jnp.bfloat16)
    q, scale = act_quant(jnp.pad(x, (0, 120)))
    assert scale[0] == 2.0**-6
    np.testing.assert_array_equal(
        np.asarray(q[:8], np.float32), [64, -20, 4.5, 160, 0.0625, -320, 0, 208]
    )


def test_float_scale_reaches_the_maximum():
    x = jnp.linspace(-3, 1, 128)
    q, scale = act_quant(x, 128, "float")
    assert scale[0] == np.float32(3.0) * np.float32(1 / 448)
    assert np.float32(q[0]) == -448


@pytest.mark.parametrize("scale_format", ["ue8m0", "float"])
def test_nothing_overflows(scale_format):
    """Just above a power of two the quotient may round past 448; e4m3 would make that NaN."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((512, 128)) * 2.0 ** rng.integers(-20, 20, (512, 1)))
    q, scale = act_quant(x.astype(jnp.float32), 128, scale_format)
    assert np.isfinite(np.asarray(q, np.float32)).all()
    back = act_dequant(q, scale, jnp.float32)
    # Half a step of three mantissa bits, or half the smallest step of the block's scale.
    step = np.maximum(np.abs(x) * 2.0**-4, np.asarray(scale) * 2.0**-10)
    assert (np.abs(back - x) <= step * 1.001).all()


def test_blocks_have_their_own_scales():
    x = jnp.concatenate([jnp.full(128, 448.0), jnp.full(128, 1.0)])
    q, scale = act_quant(x)
    np.testing.assert_array_equal(scale, [1.0, 2.0**-8])
    np.testing.assert_array_equal(act_dequant(q, scale, jnp.float32), x)
    with pytest.raises(ValueError, match="width 100 is not a multiple of block=128"):
        act_quant(jnp.zeros(100))


def test_power_of_two_above_is_exact():
    exact = 2.0 ** np.arange(-30, 30, dtype=np.float32)
    np.testing.assert_array_equal(power_of_two_above(jnp.asarray(exact)), exact)
    above = np.nextafter(exact, np.float32(np.inf), dtype=np.float32)
    np.testing.assert_array_equal(power_of_two_above(jnp.asarray(above)), 2 * exact)


def test_round_trip_passes_the_gradient():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 256)), jnp.float32)
    out = round_trip(x)
    assert 0 < np.abs(out - x).max() < 0.2
    np.testing.assert_array_equal(round_trip(out), out)  # what is representable stays
    weights = jnp.arange(256.0)
    gradient = jax.grad(lambda x: (round_trip(x) * weights).sum())(x)
    np.testing.assert_array_equal(gradient, np.broadcast_to(weights, (3, 256)))


def test_weights_have_ragged_tiles():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((2, 130, 200)), jnp.float32)  # experts of [in, out]
    w = w.at[0, 129, 199].set(1000.0)  # alone in the last tile's corner
    q, scale = weight_quant(w, (128, 64), "ue8m0")
    assert scale.shape == (2, 2, 4)
    assert scale[0, 1, 3] == 4.0
    assert scale[1, 1, 3] < 0.02
    back = weight_dequant(q, scale, (128, 64), jnp.float32)
    assert (np.abs(back - w)[:, :128] <= np.abs(w[:, :128]) * 2**-4 + 1e-4).all()
    assert back[0, 129, 199] == 1024.0  # of 960 and 1024 the nearer: 1000/4 = 250 -> 256
    again = weight_dequant(*weight_quant(back, (128, 64), "ue8m0"), (128, 64), jnp.float32)
    np.testing.assert_array_equal(again, back)  # a second time loses nothing


def test_zero_weights_stay_zero():
    q, scale = weight_quant(jnp.zeros((128, 128)))
    assert np.isfinite(scale).all()
    assert not np.asarray(q, np.float32).any()


def test_hadamard_by_hand():
    np.testing.assert_allclose(hadamard_matrix(2) * 2**0.5, [[1, 1], [1, -1]], rtol=1e-6)
    third = hadamard_matrix(4)[2] * 2  # natural order: sign is the parity of i & j
    np.testing.assert_allclose(third, [1, 1, -1, -1])
    x = jnp.zeros(128).at[5].set(1.0)
    signs = [(-1) ** bin(5 & j).count("1") for j in range(128)]
    np.testing.assert_allclose(hadamard(x), np.array(signs) / 128**0.5, rtol=1e-6)


def test_hadamard_keeps_scores_and_is_its_own_inverse():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal(64), jnp.float32) for _ in range(2))
    assert float(hadamard(q) @ hadamard(k)) == pytest.approx(float(q @ k), abs=1e-5)
    np.testing.assert_allclose(hadamard(hadamard(q)), q, atol=1e-6)
    low = hadamard(q.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    exact = np.asarray(q.astype(jnp.bfloat16), np.float64) @ hadamard_matrix(64).astype(np.float64)
    np.testing.assert_allclose(np.asarray(low, np.float64), exact, rtol=2**-8)  # one rounding
    with pytest.raises(ValueError, match="width 48 is not a power of two"):
        hadamard(jnp.zeros(48))
