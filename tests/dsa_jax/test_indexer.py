"""The indexer: where scales go, what is rotated, how a fresh one starts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import jit

from dsa_jax import presets
from dsa_jax.config import Numerics
from dsa_jax.indexer import Indexer, for_loss, for_selection
from dsa_jax.rope import rotation
from pallas_kernels import KeyRange, indexer_scores

CONFIG = presets.get("tiny-fp8")  # 6 heads of 128
LENGTH = 32


def inputs(config, seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(a, (1, LENGTH, config.hidden_size))
    q_latent = jax.random.normal(b, (1, LENGTH, config.q_lora_rank))
    return x, q_latent, rotation(config, jnp.arange(LENGTH)[None])


def fresh(config):
    return Indexer(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)


def scores(heads):
    ranges = KeyRange.causal(1, LENGTH)
    return indexer_scores(heads.q, heads.k, heads.w, ranges, k_scale=heads.k_scale)


@pytest.fixture(scope="module")
def heads():
    return jit(lambda: fresh(CONFIG)(*inputs(CONFIG)))()


def test_scale_of_the_head_weights(heads):
    x, _, _ = inputs(CONFIG)
    indexer = fresh(CONFIG)
    expected = np.asarray(x, np.float64) @ np.asarray(indexer.weights_proj.weight[...])
    np.testing.assert_allclose(heads.w, expected * 6**-0.5 * 128**-0.5, atol=1e-6)
    assert (heads.w > 0).any()
    assert (heads.w < 0).any()


def test_rotation_changes_no_score(heads):
    plain = Numerics()
    rotated = Numerics(indexer_hadamard=True)
    a, b = scores(for_selection(heads, plain)), scores(for_selection(heads, rotated))
    assert np.abs(for_selection(heads, rotated).q - heads.q).max() > 0.1
    np.testing.assert_allclose(a, b, atol=1e-6)  # fp32 sums of 128 products


@pytest.mark.parametrize("scale_format", ["ue8m0", "float"])
def test_scales_are_folded(heads, scale_format):
    """Scores from e4m3 values and folded scales = scores of the dequantised values."""
    numerics = Numerics(indexer_fp8=True, indexer_hadamard=True, scale_format=scale_format)
    quantised = for_selection(heads, numerics)
    assert quantised.q.dtype == quantised.k.dtype == jnp.float8_e4m3fn
    same = for_loss(heads, dataclasses.replace(numerics, indexer_loss_fp8=True))
    np.testing.assert_allclose(scores(quantised), scores(same), rtol=1e-4, atol=1e-7)
    smooth = scores(for_selection(heads, Numerics()))
    visible = np.asarray(KeyRange.causal(1, LENGTH).mask(LENGTH))
    x, y = np.asarray(scores(quantised))[visible], np.asarray(smooth)[visible]
    # 1 - cosine-like similarity; e4m3 on both sides leaves about 1e-3.
    assert 1e-5 < 1 - 2 * (x @ y) / (x @ x + y @ y) < 5e-3


def test_the_loss_sees_smooth_values_by_default(heads):
    assert for_loss(heads, Numerics.deepseek()) is heads


def test_quantised_loss_teaches_straight_through():
    numerics = dataclasses.replace(Numerics.deepseek(), indexer_loss_fp8=True)
    tokens = inputs(CONFIG)

    @jit
    def gradients(indexer):
        def total(indexer, numerics):
            heads = for_loss(indexer(*tokens), numerics)
            return sum(jnp.sum(jnp.sin(jnp.arange(x.size).reshape(x.shape)) * x) for x in heads[:3])

        smooth = jax.grad(total)(indexer, Numerics(indexer_hadamard=False))
        return smooth, jax.grad(total)(indexer, numerics)

    smooth, rounded = gradients(fresh(CONFIG))
    np.testing.assert_allclose(smooth.weights_proj.weight[...], rounded.weights_proj.weight[...])
    assert rounded.wq_b.weight[...].any()
    assert rounded.wk.weight[...].any()


@pytest.mark.parametrize("name", ["tiny", "tiny-fp8", "demo"])
def test_a_fresh_indexer_is_indifferent(name):
    """Entropy of softmax(I) over log t is near 1, and every projection has gradient."""
    config = presets.get(name)
    tokens = inputs(config)

    def entropy(indexer):
        logp = jax.nn.log_softmax(scores(for_selection(indexer(*tokens), Numerics()))[0])
        visible = KeyRange.causal(1, LENGTH).mask(LENGTH)[0]
        h = -jnp.where(visible, jnp.exp(logp) * logp, 0.0).sum(-1)
        return (h[1:] / jnp.log(jnp.arange(2, LENGTH + 1))).mean()

    value, gradient = jit(jax.value_and_grad(entropy))(fresh(config))
    assert 0.99 < value < 1.0
    assert all(np.asarray(g).any() for g in jax.tree.leaves(gradient))
    std = np.std(fresh(config).wq_b.weight[...])
    assert std == pytest.approx(0.5 * config.q_lora_rank**-0.5, rel=0.05)


def test_key_norm_has_a_bias_and_its_own_eps():
    indexer = fresh(CONFIG)
    assert indexer.k_norm.eps == 1e-6
    assert fresh(CONFIG.replace(rms_norm_eps=1e-5)).k_norm.eps == 1e-6
    indexer.k_norm.bias[...] = jnp.arange(128.0)
    x, q_latent, turn = inputs(CONFIG)
    k = indexer(x, q_latent, turn).k - fresh(CONFIG)(x, q_latent, turn).k
    # The bias is rotated with the key: unrotated columns show it as it is.
    np.testing.assert_allclose(
        k[0, :, 8:], np.broadcast_to(np.arange(8, 128), (LENGTH, 120)), atol=1e-4
    )
