"""The backward kernels of sparse attention on a Hopper GPU (ring 3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sparse_forward_gpu import SCALE, SHAPES, arguments

from pallas_kernels import Selection, sparse_attention
from pallas_kernels.dispatch import hopper_is_default
from pallas_kernels.sparse_attention import backward_sm90

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


@pytest.mark.parametrize("window", [None, 2**24])
@pytest.mark.parametrize("name", SHAPES)
def test_backward(name, window, monkeypatch):
    """Against fp32, in one window and in several; equal bits 20 times."""
    if window is not None:
        monkeypatch.setattr(backward_sm90, "WORKSPACE_BYTES", window)
        backward_sm90.backward.clear_cache()
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
        assert all(map(np.array_equal, again, found))
    backward_sm90.backward.clear_cache()


def test_unselected_rows_may_hold_anything():
    q, kv, indices, latent = arguments("batch, 64 heads, K off the tile")
    kv, indices = kv.at[:, 0].set(jnp.nan), jnp.where(indices == 0, -1, indices)
    dout = jnp.ones((*q.shape[:3], latent))
    dq, dkv = gradients(q, kv, indices, latent, dout, "mosaic")
    assert not jnp.isnan(dq).any() and not jnp.isnan(dkv).any()
    assert (dkv[:, 0] == 0).all()
