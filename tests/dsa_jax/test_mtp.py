"""Multi-token prediction against its formula in float64, and through a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from flax import nnx
from small_models import fill, filled, jit, tokens_of

import dsa_jax
from dsa_jax import presets
from dsa_jax.checkpoint import CheckpointError, load_mtp
from dsa_jax.layer_tree import flatten
from dsa_jax.mtp import MTP
from dsa_jax.sharding import MeshConfig, make_mesh

LENGTH = 40  # five times index_topk


@pytest.fixture(scope="module")
def config():
    return presets.get("tiny").replace(num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def mtp(config):
    make = lambda: MTP(config, rngs=nnx.Rngs(0), dtype=jnp.float32)  # noqa: E731
    return fill(nnx.eval_shape(make), seed=7)


def formula(config, mtp, h, next_tokens):
    """The logits of one document; the layer itself is the reference's."""
    p = {".".join(path): np.asarray(leaf, np.float64) for path, leaf in flatten(mtp).items()}
    block = {name.removeprefix("block."): p[name] for name in p if name.startswith("block.")}
    layer = numpy_reference.Layer(config, block)
    eps = config.rms_norm_eps
    logits = []
    for position, token in enumerate(next_tokens):
        embedded = numpy_reference.rms(p["embed_tokens.weight"][token], p["enorm.weight"], eps)
        before = numpy_reference.rms(h[position], p["hnorm.weight"], eps)
        x = np.concatenate([embedded, before]) @ p["eh_proj.weight"]
        normed = numpy_reference.rms(x, block["input_layernorm.weight"], eps)
        x = x + layer.attention(normed, position, None, False)[0]
        normed = numpy_reference.rms(x, block["post_attention_layernorm.weight"], eps)
        x = x + layer.mlp(normed)
        x = numpy_reference.rms(x, p["shared_head.norm.weight"], eps)
        logits.append(x @ p["shared_head.head.weight"])
    return np.array(logits)


def test_forward(config, mtp):
    model = filled(config)
    tokens = tokens_of(config, 1, LENGTH + 1)
    h = 0.5 * jax.random.normal(jax.random.key(3), (1, LENGTH, config.hidden_size))
    out = jit(lambda mtp, h, tokens: mtp(h, tokens[:, 1:], model.rows(tokens[:, :-1])))(
        mtp, h, tokens
    )
    wanted = formula(config, mtp, np.asarray(h[0], np.float64), np.asarray(tokens[0, 1:]))
    assert np.std(wanted) > 0.5
    # fp32 against float64; the model's own tolerance.
    np.testing.assert_allclose(out.logits[0], wanted, atol=1e-4)


def test_a_checkpoint_carries_it_and_the_model_does_without(config, mtp, tmp_path):
    model = filled(config)
    dsa_jax.save(model, tmp_path / "model", mtp=[mtp])
    loaded = flatten(load_mtp(tmp_path / "model", dtype=jnp.float32))
    for name, leaf in flatten(mtp).items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), np.asarray(leaf))
    again = flatten(dsa_jax.load(tmp_path / "model", dtype=jnp.float32))
    assert again.keys() == flatten(model).keys()
    spread = load_mtp(tmp_path / "model", make_mesh(MeshConfig(fsdp=4)), dtype=jnp.float32)
    weight = spread.eh_proj.weight[...]
    assert weight.addressable_shards[0].data.shape == (24, 48)
    np.testing.assert_array_equal(np.asarray(weight), np.asarray(mtp.eh_proj.weight[...]))


def test_a_checkpoint_without_one(config, tmp_path):
    dsa_jax.save(filled(config), tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds no multi-token-prediction layer 0"):
        load_mtp(tmp_path / "model")
    dsa_jax.load(tmp_path / "model")


def test_parameters_are_counted(config):
    shapes = nnx.eval_shape(lambda: MTP(config, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == dsa_jax.param_count(config).mtp
    dense = dataclasses.replace(config, first_k_dense_replace=3)
    nnx.eval_shape(lambda: MTP(dense, rngs=nnx.Rngs(0)))
