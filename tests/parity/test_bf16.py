"""In bf16: how near, by which switch. Bounds are about twice what was measured."""

import jax.numpy as jnp
import numpy as np
import pytest

import dsa_jax
from convert import hf_to_orbax
from convert.compare import (
    cases,
    difference,
    load_transformers,
    observe,
    observe_layers,
    observe_transformers,
    with_config,
)
from tests.oracle.named_weights import tokens_of
from tests.parity import random_models


@pytest.fixture(scope="module", params=["deepseek_v32", "glm-5"])
def setting(request, tmp_path_factory):
    """A checkpoint in bf16, what transformers makes of it, and our ways to run it."""
    folder = tmp_path_factory.mktemp(request.param)
    random_models.save(request.param, folder / "hf", "bf16", update=0.25)
    hf_to_orbax(folder / "hf", folder / "ours")
    model = dsa_jax.load(folder / "ours")
    assert model.embed_tokens.weight.dtype == jnp.bfloat16
    tokens = tokens_of(model.config, 2)
    theirs = observe_transformers(load_transformers(folder / "hf", "bf16"), tokens)
    ways = {case.name: with_config(model, case.config) for case in cases(model.config)}
    return tokens, theirs, ways


# Bounds are about twice what the three models gave (docs/parity.md has the table): single keys and
# experts near a tie fall to the other side, and how many do depends on the machine's order of sums.
# A switch on the wrong side moves a layer's update by half as much again, as the comparisons show.


def test_layer_by_layer(setting):
    """Given transformers' own inputs: products are summed in another order, the rest is equal."""
    _, theirs, ways = setting
    same = observe_layers(ways["as transformers"], theirs)
    assert same.update < 1.5e-2  # bf16 has steps of 2^-8 = 4e-3, and the residual is four times
    assert same.keys > 0.99  # the update; 99.7 % of the keys
    other = observe_layers(ways["all roundings as DeepSeek, no FP8"], theirs)
    assert same.update < other.update < 3e-2  # the switches do reproduce transformers
    assert other.keys > 0.98


def test_whole_model(setting):
    """Differences add up, and where a key or expert is chosen otherwise a token goes astray."""
    tokens, theirs, ways = setting
    found = difference(observe(ways["as transformers"], tokens), theirs)
    assert found.kl < 2.5e-2
    assert found.keys > 0.97
    found = difference(observe(ways["all roundings as DeepSeek, no FP8"], tokens), theirs)
    assert found.kl < 3e-2
    assert found.keys > 0.95


def test_fp8_is_deepseeks_side(setting):
    """The default for FP8 checkpoints: e4m3 has three bits, so keys near the cut change."""
    tokens, theirs, ways = setting
    if "as DeepSeek" not in ways:
        pytest.skip("GLM's small model has no widths of 128")
    found = observe_layers(ways["as DeepSeek"], theirs)
    plain = observe_layers(ways["all roundings as DeepSeek, no FP8"], theirs)
    assert plain.update < found.update < 6e-2
    assert 0.94 < found.keys < plain.keys
    whole = difference(observe(ways["as DeepSeek"], tokens), theirs)
    assert whole.kl < 0.1
    assert whole.keys > 0.85


def test_rotating_alone_changes_nothing_much(setting):
    _, theirs, ways = setting
    plain = observe_layers(ways["as transformers"], theirs)
    rotated = observe_layers(ways["Hadamard rotation alone"], theirs)
    assert np.isclose(plain.keys, rotated.keys, atol=5e-3)
