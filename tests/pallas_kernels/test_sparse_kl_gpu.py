"""The sparse loss's kernels on a Hopper GPU (ring 3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sparse_forward_gpu import SCALE, SHAPES, arguments

from pallas_kernels import Selection, indexer_kl_sparse, sparse_attention
from pallas_kernels.dispatch import hopper_is_default
from pallas_kernels.indexer_loss import sparse_sm90

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper_is_default(), reason="needs a Hopper GPU"),
]

# d, the masked products, the rows and the results are rounded to bf16 (2**-9 of each value); errors
# of independent terms.
RELATIVE = 2**-7


def indexer_of(rng, q, kv):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    iq, ik = normal(*q.shape[:2], 64, 128), normal(*kv.shape[:2], 128)
    return iq.astype(q.dtype), ik.astype(q.dtype), normal(*q.shape[:2], 64) / 8


def loss(iq, ik, iw, q, kv, indices, latent, g, implementation):
    """`(kl, gradients)`; a query's weight is of either sign."""
    selection = Selection(indices)
    _, lse = sparse_attention(
        q, kv, selection, value_width=latent, scale=SCALE, implementation=implementation
    )

    def kl(iq, ik, iw):
        return indexer_kl_sparse(
            iq, ik, iw, q, kv, lse, selection, scale=SCALE, implementation=implementation
        )

    value, pull = jax.vjp(kl, iq, ik, iw)
    return value, *pull(g)


@pytest.mark.parametrize("name", [name for name in SHAPES if "2**31" not in name])
def test_value_and_gradient(name):
    """Against fp32, into memory that held NaN; equal bits 20 times."""
    q, kv, indices, latent = arguments(name)
    rng = np.random.default_rng()
    indexer = indexer_of(rng, q, kv)
    g = jnp.asarray(rng.standard_normal(q.shape[:2]), jnp.float32)
    jnp.full((2**28,), jnp.nan, jnp.float32).block_until_ready().delete()
    run = jax.jit(functools.partial(loss, latent=latent, implementation="mosaic"))
    found = run(*indexer, q, kv, indices, g=g)
    wide = [x.astype(jnp.float32) for x in (*indexer, q, kv)]
    reference = functools.partial(loss, latent=latent, implementation="xla")
    # Without Triton's candidates, whose compilation takes longer than the test.
    reference = jax.jit(reference, compiler_options={"xla_gpu_enable_triton_gemm": False})
    expected = reference(*wide, indices=indices, g=g)
    # fp32 sums of terms as large as a few nats, from an lse that is off by a few 2**-24 of itself.
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5, atol=2e-5)
    for one, other in zip(found[1:], expected[1:], strict=True):
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < RELATIVE
    for _ in range(20):
        assert all(map(np.array_equal, run(*indexer, q, kv, indices, g=g), found))


def test_windows():
    """A query's gradients are alike in whatever window; keys are added up in the same order."""
    q, kv, indices, latent = arguments("batch, 64 heads, K off the tile")
    rng = np.random.default_rng()
    indexer = indexer_of(rng, q, kv)
    _, lse = sparse_attention(q, kv, Selection(indices), value_width=latent, scale=SCALE)
    inputs = (*indexer, q, kv, lse, indices)
    _, residuals = sparse_sm90.forward_for_backward(*inputs, scale=SCALE)
    g = jnp.ones(q.shape[:2])

    def run(window):
        return jax.jit(functools.partial(sparse_sm90.gradients, window=window))(residuals, g)

    (diq, dik, diw), again = run(1000), run(32)
    np.testing.assert_array_equal(diq, again[0])
    np.testing.assert_array_equal(diw, again[2])
    # Sums of fp32 that start anew, or not, with each window; then rounded to bf16.
    np.testing.assert_allclose(
        dik.astype(jnp.float32), again[1].astype(jnp.float32), rtol=2**-8, atol=1e-5
    )


def test_unselected_rows_may_hold_anything():
    q, kv, indices, latent = arguments("batch, 64 heads, K off the tile")
    iq, ik, iw = indexer_of(np.random.default_rng(), q, kv)
    indices = jnp.where(indices == 0, -1, indices)
    kv, ik = kv.at[:, 0].set(jnp.nan), ik.at[:, 0].set(jnp.nan)
    found = loss(iq, ik, iw, q, kv, indices, latent, jnp.ones(q.shape[:2]), "mosaic")
    assert not any(jnp.isnan(x).any() for x in found)
    assert (found[2][:, 0] == 0).all()
