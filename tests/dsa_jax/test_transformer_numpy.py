"""The model against an independent float64 NumPy one, and the mistakes that must show."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from small_models import filled, jit, layer_params, tokens_of

import dsa_jax.indexer
import dsa_jax.mla
import dsa_jax.moe
from dsa_jax import presets
from tests import mistakes

LENGTH = 40  # five times index_topk
NAMES = ("tiny", "tiny-shared", "tiny-fp8")


def reference(config, model, *, dense=False):
    tables = (model.embed_tokens.weight, model.norm.weight, model.lm_head.weight)
    embed, norm, head = (np.asarray(x[...], np.float64) for x in tables)
    tokens = np.asarray(tokens_of(config, 1, LENGTH)[0])
    layers = layer_params(model)
    return numpy_reference.forward(config, layers, embed, norm, head, tokens, dense=dense)


@pytest.fixture(scope="module")
def one_layer():
    """Per preset, cut to one layer with experts: the model, its NumPy logits and selections."""
    found = {}
    for name in NAMES:
        config = presets.get(name).replace(num_hidden_layers=1, first_k_dense_replace=0)
        model = filled(config)
        found[name] = (model, *reference(config, model))
    return found


def check(model, logits, selections):
    """Runs the model, under whatever patches are in place, and compares."""
    tokens = tokens_of(model.config, 1, LENGTH)
    out = jit(lambda model, tokens: model(tokens, return_selection=True))(model, tokens)
    chosen = [
        [[int(s) for s in row if s >= 0] for row in layer[0]]
        for layer in np.asarray(out.selection.indices)
    ]
    assert chosen == selections
    # fp32 against float64; logits reach 5, and 2e-5 was the most seen over the three models.
    np.testing.assert_allclose(out.logits[0], logits, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_forward(name):
    model = filled(presets.get(name))
    check(model, *reference(model.config, model))


def test_dense_forward():
    model = filled(presets.get("tiny").without_indexer())
    logits, _ = reference(model.config, model, dense=True)
    tokens = tokens_of(model.config, 1, LENGTH)
    out = jit(lambda model, tokens: model(tokens, attention="dense"))(model, tokens)
    np.testing.assert_allclose(out.logits[0], logits, atol=1e-4)  # as above
    assert out.selection is None
    assert out.kl is None


def _patch_method(monkeypatch, owner, name, wrong):
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: wrong(right, *args, **kwargs))


def _biased_expert_weights(monkeypatch):
    def biased(right, scores, bias, config):
        return right(scores + bias, jnp.zeros_like(bias), config)

    _patch_method(monkeypatch, dsa_jax.moe, "route", biased)


MUTATIONS = {
    "indexer rope layout": ("tiny", mistakes.flipped_indexer_rope),
    "attention rope layout": ("tiny", mistakes.flipped_attention_rope),
    "GLM's indexer rope layout": ("tiny-shared", mistakes.flipped_indexer_rope),
    "indexer rope last": ("tiny", mistakes.indexer_rope_last),
    "one-sided Hadamard": ("tiny-fp8", mistakes.one_sided_hadamard),
    "no mscale": ("tiny", mistakes.no_mscale),
    "zero instead of -inf": ("tiny", mistakes.zero_for_masked_experts),
    "biased expert weights": ("tiny", _biased_expert_weights),
    "groups by their best expert": ("tiny", mistakes.max_for_groups),
    "latent not rounded": ("tiny-fp8", mistakes.unrounded_latent),
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_mistakes_show(mistake, one_layer, monkeypatch):
    name, patch = MUTATIONS[mistake]
    model, logits, selections = one_layer[name]
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        check(model, logits, selections)


def test_switching_fp8_off_shows(one_layer):
    model, logits, selections = one_layer["tiny-fp8"]
    plain = dataclasses.replace(model.config.numerics, indexer_fp8=False)
    other = filled(model.config.replace(numerics=plain))
    with pytest.raises(AssertionError):
        check(other, logits, selections)


@pytest.mark.parametrize("name", NAMES)
def test_without_mistakes(name, one_layer):
    """What the mistakes are told apart from."""
    check(*one_layer[name])
