"""The indexer's loss by kernels in a scan over layers: its gradient is taken in the forward pass.

The scan is parted into what the backward pass knows and what it does not; a kernel's result that is
summed up in place must not come to lie across the two. Tracing shows it; nothing runs here.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dsa_jax.indexer_loss import leaf_loss
from dsa_jax.transformer import REMAT_POLICIES
from pallas_kernels import Selection, dispatch, indexer_kl_sparse

T, S, N, I, K = 128, 256, 64, 64, 128
BF16, FP32 = jnp.bfloat16, jnp.float32
ARGUMENTS = [
    ((1, T, I, 128), BF16), ((1, S, 128), BF16), ((1, T, I), FP32), ((1, T, N, 576), BF16),
    ((1, S, 576), BF16), ((1, T, N), FP32), ((1, T, K), jnp.int32),
]  # fmt: skip


@pytest.mark.parametrize("remat", ["none", "full"])
def test_sparse_loss(remat):
    def loss(w, inputs):
        iq, ik, iw, q, kv, lse, indices = inputs
        iq = iq * w.astype(BF16)
        kl = indexer_kl_sparse(iq, ik, iw, q, kv, lse, Selection(indices), scale=0.1)
        return kl.sum()

    def model(weights, iq, *rest):
        def layer(h, w):
            h = jnp.tanh(h * w)
            return h, leaf_loss(loss, w, (iq * h.astype(BF16), *rest))

        if remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
        h, kl = lax.scan(layer, FP32(1), weights)
        return kl.sum() + h

    shapes = [jax.ShapeDtypeStruct((3,), FP32), *(jax.ShapeDtypeStruct(*a) for a in ARGUMENTS)]
    with dispatch.kernels(True), dispatch.recorded() as chosen:
        gradient = jax.eval_shape(jax.grad(model), *shapes)
    assert gradient.shape == (3,)
    assert chosen == {"indexer_kl_sparse": "mosaic"}
