"""The backward kernels of sparse attention on a Hopper GPU (ring 3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sparse_forward_gpu import SCALE, SHAPES, arguments

from pallas_kernels import Selection, sparse_attention
from pallas_kernels.dispatch import hopper_is_default
from pallas_kernels.sparse_attention import backward_sm90, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper_is_default(), reason="needs a Hopper GPU"),
]

# P, dS, out, the rows and the results are rounded to bf16 (2**-9 of each value); errors of
# independent terms.
RELATIVE = 2**-7


def gradients(q, kv, indices, latent, dout, implementation):
    def attend(q, kv):
        return sparse_attention(
            q, kv, Selection(indices),
            value_width=latent, scale=SCALE, implementation=implementation,
        )  # fmt: skip

    (out, lse), pull = jax.vjp(attend, q, kv)
    dlse = jnp.where(jnp.isfinite(lse), jnp.cos(jnp.arange(lse.size).reshape(lse.shape)), 0.0)
    return pull((dout.astype(out.dtype), dlse))


@pytest.mark.parametrize("name", SHAPES)
def test_backward(name):
    """Against fp32; equal bits 20 times."""
    q, kv, indices, latent = arguments(name)
    dout = jnp.asarray(np.random.default_rng().standard_normal((*q.shape[:3], latent)))
    found = gradients(q, kv, indices, latent, dout, "mosaic")
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    expected = gradients(*wide, indices, latent, dout, "xla")
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < RELATIVE
    for _ in range(20):
        again = gradients(q, kv, indices, latent, dout, "mosaic")
        assert all(map(jnp.array_equal, again, found))  # where they are: the largest have 4 GB


@pytest.mark.parametrize("cuts", [(0.3, 0.3), (0.0, 1.0), (0.2, 0.6)])
def test_windows(cuts):
    """A query is computed alike in whatever window; keys are added up in the same order.

    Wherever that is done: beside dQ, beside P and dS of the next window, or alone.
    """
    q, kv, indices, latent = arguments("batch, 64 heads, K off the tile")
    rng = np.random.default_rng()
    dout = jnp.asarray(rng.standard_normal((*q.shape[:3], latent)), q.dtype)
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    options = {"scale": SCALE, "workspace_bytes": 2**30}
    out, lse = reference.forward(*wide, indices, value_width=latent, **options)
    dlse = jnp.where(jnp.isfinite(lse), 1.0, 0.0)
    expected = reference.backward(*wide, indices, out, lse, dout.astype(out.dtype), dlse, **options)

    def run(window):
        fn = functools.partial(backward_sm90.gradients, scale=SCALE, window=window, cuts=cuts)
        return jax.jit(fn)(q, kv, indices, out.astype(q.dtype), lse, dout, dlse)

    (dq, dkv), (dq_again, dkv_again) = run(1000), run(32)
    np.testing.assert_array_equal(dq, dq_again)
    # Sums of fp32 that start anew, or not, with each window.
    np.testing.assert_allclose(dkv, dkv_again, rtol=1e-5, atol=1e-5)
    for one, other in zip((dq_again, dkv_again), expected, strict=True):
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < RELATIVE


def test_unselected_rows_may_hold_anything():
    q, kv, indices, latent = arguments("batch, 64 heads, K off the tile")
    kv, indices = kv.at[:, 0].set(jnp.nan), jnp.where(indices == 0, -1, indices)
    dout = jnp.ones((*q.shape[:3], latent))
    dq, dkv = gradients(q, kv, indices, latent, dout, "mosaic")
    assert not jnp.isnan(dq).any()
    assert not jnp.isnan(dkv).any()
    assert (dkv[:, 0] == 0).all()
