"""The oracle's own arithmetic, against known values and an independent library."""

import ml_dtypes
import numpy as np
import pytest

from tests.oracle import deepseek


def test_e4m3_is_the_format():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(4000) * 2.0 ** rng.integers(-12, 8, 4000), [0.0, -0.0]])
    x = np.clip(x, -448, 448)
    expected = x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(deepseek.e4m3(np.float64(np.float32(x))), expected)
    np.testing.assert_array_equal(deepseek.e4m3(np.array([464.0, 465.0, -1e9])), [448, 448, -448])


def test_bf16_is_the_format():
    rng = np.random.default_rng(0)
    x = np.float32(rng.standard_normal(4000) * 2.0 ** rng.integers(-100, 100, 4000))
    np.testing.assert_array_equal(deepseek.bf16(x), x.astype(ml_dtypes.bfloat16).astype(np.float64))


@pytest.mark.parametrize(
    ("amax", "scale"),
    [(0.0, 2.0**-22), (1e-4, 2.0**-22), (0.5, 2.0**-9), (3.5, 2.0**-7), (448, 1), (449, 2)],
)
def test_scales_are_powers_of_two(amax, scale):
    x = np.zeros(128)
    x[3] = -amax
    assert deepseek.act_quant(x)[1][0] == scale


def test_the_rotation_is_its_definition():
    signs = np.array([[(-1) ** bin(i & j).count("1") for j in range(8)] for i in range(8)])
    expected = deepseek.bf16(signs / 8**0.5)
    np.testing.assert_array_equal(deepseek.walsh(np.eye(8)), expected)


def test_absorbing_changes_nothing_in_exact_arithmetic():
    """MHA and MQA are one function: without roundings they agree to float64."""
    rng = np.random.default_rng(0)
    q, q_rope, latent, k_rope, up = (
        rng.standard_normal(s) for s in ((3, 2, 5), (3, 2, 4), (7, 6), (7, 4), (6, 2, 5))
    )
    rope = np.einsum("tnr,sr->nts", q_rope, k_rope)
    expanded = np.einsum("tnp,snp->nts", q, np.einsum("sc,cnp->snp", latent, up)) + rope
    absorbed = np.einsum("tnc,sc->nts", np.einsum("tnp,cnp->tnc", q, up), latent) + rope
    # Sums of a dozen terms near 1 in float64 (2e-16).
    np.testing.assert_allclose(absorbed, expanded, atol=1e-12)
