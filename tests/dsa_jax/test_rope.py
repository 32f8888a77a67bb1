"""Known values of YaRN, and the two pair layouts."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import presets
from dsa_jax.config import Yarn
from dsa_jax.rope import Rotation, frequencies, rotate, rotation

PUBLISHED = Yarn(40, 4096, 32, 1, 1.0, 1.0)
# Computed once in fp32 from the formula of the YaRN paper at the published settings.
KNOWN = {
    0: 1.0,
    1: 0.749894202,
    10: 0.0562341288,
    11: 0.0390069261,
    16: 0.00550000044,
    20: 0.000790569407,
    23: 3.33380376e-05,
    31: 3.33380376e-06,
}


def test_known_frequencies():
    f = frequencies(64, 10000.0, PUBLISHED)
    assert f.dtype == np.float32
    for i, value in KNOWN.items():
        assert f[i] == pytest.approx(value, rel=2e-7), i  # an ulp or two of fp32
    plain = frequencies(64, 10000.0, None)
    np.testing.assert_array_equal(f[:11], plain[:11])  # up to `low` = 10, inclusive
    np.testing.assert_allclose(f[23:], plain[23:] / 40, rtol=2e-7)  # from `high` = 23


def test_step_instead_of_ramp():
    """Where the ramp has no width, a tiny one replaces it: no division by zero."""
    f = frequencies(4, 1e8, Yarn(4, 64, 2, 1))
    assert np.isfinite(f).all()


def test_published_magnitude_is_one():
    config = presets.get("deepseek-v3.2-exp")
    turn = rotation(config, jnp.array([[0, 5]]))
    np.testing.assert_array_equal(turn.cos[0, 0], np.ones(32))
    np.testing.assert_array_equal(turn.sin[0, 0], np.zeros(32))
    np.testing.assert_allclose(turn.cos[0, 1] ** 2 + turn.sin[0, 1] ** 2, 1, rtol=1e-6)


def test_magnitude_without_mscale_all_dim():
    scaling = Yarn(40, 4096, mscale=1.0, mscale_all_dim=0.0)
    config = presets.get("deepseek-v3.2-exp").replace(rope_scaling=scaling)
    turn = rotation(config, jnp.array([[0]]))
    np.testing.assert_allclose(turn.cos, 1.3688879454, rtol=1e-6)
    assert config.softmax_scale == 192**-0.5


def quarter_turns(pairs):
    """Rotation of one token by +90 degrees in every pair."""
    return Rotation(jnp.zeros((1, 1, pairs)), jnp.ones((1, 1, pairs)))


def test_layouts_by_hand():
    x = jnp.arange(1.0, 7.0).reshape(1, 1, 6)
    together = rotate(x, quarter_turns(3), interleaved=True)
    np.testing.assert_array_equal(together[0, 0], [-2, 1, -4, 3, -6, 5])
    halves = rotate(x, quarter_turns(3), interleaved=False)
    np.testing.assert_array_equal(halves[0, 0], [-4, -5, -6, 1, 2, 3])


def test_layouts_are_a_permutation_apart():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 5, 8)), jnp.float32)
    turn = rotation(presets.get("tiny"), jnp.array([[0, 7, 300], [1, 2, 3]]))
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    halves = rotate(x[..., order], turn, interleaved=False)
    together = rotate(x, turn, interleaved=True)
    np.testing.assert_allclose(halves, together[..., order], atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_distance(interleaved):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 8)), jnp.float32) for _ in range(2))
    config = presets.get("tiny")

    def score(t, s):
        a = rotate(q, rotation(config, jnp.array([[t]])), interleaved=interleaved)
        b = rotate(k, rotation(config, jnp.array([[s]])), interleaved=interleaved)
        return float((a * b).sum())

    assert score(40, 33) == pytest.approx(score(107, 100), abs=1e-4)
    assert abs(score(40, 33) - score(40, 30)) > 1e-2


def test_bf16_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 8)), jnp.bfloat16)
    turn = rotation(presets.get("tiny"), jnp.array([[77]]))
    wide = rotate(x.astype(jnp.float32), turn, interleaved=True)
    np.testing.assert_array_equal(rotate(x, turn, interleaved=True), wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rounded_products(interleaved):
    """With cos and sin in bf16 every product is rounded too, as PyTorch does in bf16."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 8)), jnp.bfloat16)
    turn = rotation(presets.get("tiny"), jnp.array([[77]]))
    low = Rotation(*(part.astype(jnp.bfloat16) for part in turn))
    cos, sin = (part.astype(jnp.float32) for part in low)
    wide = x.astype(jnp.float32)
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, -1)

    def times(y, factor):
        return (y * factor).astype(jnp.bfloat16).astype(jnp.float32)

    pairs = times(a, cos) - times(b, sin), times(a, sin) + times(b, cos)
    together = jnp.stack(pairs, -1).reshape(1, 1, 8)
    expected = (together if interleaved else jnp.concatenate(pairs, -1)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rotate(x, low, interleaved=interleaved), expected)
    assert (np.asarray(expected) != np.asarray(rotate(x, turn, interleaved=interleaved))).any()
