"""The forward kernel of sparse attention on a Hopper GPU (ring 3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Selection, sparse_attention
from pallas_kernels.dispatch import hopper_is_default

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper_is_default(), reason="needs a Hopper GPU"),
]

SHAPES = {  # B, T, S, N, C, R, K
    "deepseek": (1, 300, 8192, 128, 512, 64, 2048),
    "batch, 64 heads, K off the tile": (3, 70, 1000, 64, 512, 64, 300),
    "16 heads": (1, 200, 500, 16, 512, 64, 128),
    "32 heads, no rope": (2, 41, 3001, 32, 512, 0, 512),
    "256 heads, narrow": (1, 33, 700, 256, 256, 64, 192),
    "one query": (1, 1, 64, 128, 512, 64, 64),
    "fewer keys than a tile": (2, 9, 5, 128, 512, 64, 5),
    "more keys than the L2 holds, some forth and some back": (1, 300, 30000, 128, 512, 64, 448),
    "elements beyond 2**31": (1, 5, 3_800_000, 16, 512, 64, 128),
}
SCALE = 0.5


def arguments(name):
    """Rows with all, no, one and some keys, and indices of every kind outside the keys."""
    batch, queries, keys, heads, latent, rope, selected = SHAPES[name]
    rng = np.random.default_rng()
    q = rng.standard_normal((batch, queries, heads, latent + rope)) / 10
    # On the device: the largest has 2**31 elements.
    key = jax.random.key(int(rng.integers(2**31)))
    kv = jax.random.normal(key, (batch, keys, latent + rope), jnp.bfloat16) / 10
    indices = np.full((batch, queries, selected), -1, np.int32)
    for row, (b, t) in enumerate(np.ndindex(batch, queries)):
        count = [selected, 0, 1, min(selected, 64), rng.integers(selected + 1)][row % 5]
        indices[b, t, :count] = np.sort(rng.choice(keys, count, replace=False))
    outside = [keys, -2, 2**31 - 1, -(2**31), keys + 1]
    if keys > 100:
        indices[0, 0, 3::37] = np.resize(outside, indices[0, 0, 3::37].shape)
    return jnp.asarray(q, jnp.bfloat16), kv, jnp.asarray(indices), latent


def attend(q, kv, indices, latent, implementation):
    return sparse_attention(
        q, kv, Selection(indices), value_width=latent, scale=SCALE, implementation=implementation
    )


def check(out, lse, q, kv, indices, latent):
    """Against fp32, within the bounds of FlashMLA's own test."""
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    want, want_lse = attend(*wide, indices, latent, "xla")
    out = np.asarray(out, np.float32)
    np.testing.assert_allclose(out, want, rtol=3.01 / 128, atol=8e-4)
    want = np.asarray(want)
    assert 1 - 2 * (out * want).sum() / ((out**2).sum() + (want**2).sum()) < 7e-6
    np.testing.assert_allclose(lse, want_lse, rtol=2.01 / 65536, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_forward(name):
    """Within the bounds of FlashMLA's own test, into memory that held NaN; equal bits 20 times."""
    q, kv, indices, latent = arguments(name)
    jnp.full((*q.shape[:3], latent), jnp.nan).block_until_ready().delete()

    out, lse = attend(q, kv, indices, latent, "mosaic")
    check(out, lse, q, kv, indices, latent)
    for _ in range(20):
        again = attend(q, kv, indices, latent, "mosaic")
        assert all(map(np.array_equal, again, (out, lse)))


def test_unselected_rows_may_hold_anything():
    q, kv, indices, latent = arguments("batch, 64 heads, K off the tile")
    kv, indices = kv.at[:, 0].set(jnp.nan), jnp.where(indices == 0, -1, indices)
    out, lse = attend(q, kv, indices, latent, "mosaic")
    assert not jnp.isnan(out).any()
    assert not jnp.isnan(lse).any()


def test_scores_that_grow():
    """From the first keys to the last by more than the exponent of fp32 spans."""
    q, kv, indices, latent = arguments("deepseek")
    ramp = jnp.linspace(0, 256, kv.shape[1]).astype(kv.dtype)
    q, kv = q.at[..., 0].set(2), kv.at[..., 0].set(ramp)

    check(*attend(q, kv, indices, latent, "mosaic"), q, kv, indices, latent)


def test_gradient():
    """Both kernels, against fp32."""
    q, kv, indices, latent = arguments("one query")

    def loss(q, kv, implementation):
        out, lse = sparse_attention(
            q, kv, Selection(indices),
            value_width=latent, scale=SCALE, implementation=implementation,
        )  # fmt: skip
        return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

    found = jax.grad(loss, argnums=(0, 1))(q, kv, "mosaic")
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    expected = jax.grad(loss, argnums=(0, 1))(*wide, "xla")
    for one, other in zip(found, expected, strict=True):
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < 1e-2  # bf16 operands and results
