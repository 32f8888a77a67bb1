"""Each way a number can break is named with its layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import LENGTH, config, loud_params, packed

from dsa_jax.sharding import MeshConfig, make_mesh
from train import diagnose
from train.optimizer import make_optimizer
from train.stages import Stage
from train.state import new_state, skeleton_of

ATTENTION = "stacks/0/blocks/0/self_attn/"
# Factors of a parameter in layer 1 alone; 1e39 is infinite in fp32, 1e30 only its products are.
CASES = {
    "parameter": ({"q_a_proj/weight": np.inf}, "parameter layers/1/self_attn/q_a_proj/weight"),
    "projection": ({"q_b_proj/weight": 1e38, "q_a_layernorm/weight": 1e3}, "of layer 1"),
    "indexer": (
        {"indexer/wq_b/weight": 1e38, "q_a_layernorm/weight": 1e1},
        "the indexer's queries, keys or head weights in layer 1",
    ),
    "kl": (
        {"indexer/weights_proj/weight": 1e30, "indexer/k_norm/weight": 1e30},
        "the indexer's KL in layer 1",
    ),
    "mlp": ({"../mlp/shared_experts/up_proj/weight": 1e38}, "the output of the last layer, 1"),
    "none": ({}, "every layer, parameter and gradient is finite"),
}


def case(factors):
    run = config(Stage.SPARSE)
    skeleton = skeleton_of(run)
    params = loud_params(skeleton)
    for name, factor in factors.items():
        path = (ATTENTION + name).replace("self_attn/../", "")
        params[path] = params[path].at[1].multiply(factor)
    documents = [np.arange(2, 2 + n) % 96 for n in (24, 17, 5, 20)]
    batch = packed(documents, 4, LENGTH, [[0], [1, 2], [3], []])
    return run, skeleton, new_state(run, params, make_optimizer(run)), batch


@pytest.mark.parametrize("name", CASES)
def test_first_break_is_named(name):
    factors, message = CASES[name]
    assert message in diagnose.locate(*case(factors))


def test_first_break_is_named_where_sequences_are_cut():
    factors, message = CASES["indexer"]
    with jax.set_mesh(make_mesh(MeshConfig(context=2, tensor=2))):
        assert message in diagnose.locate(*case(factors))


def test_a_gradient_is_named_last(monkeypatch):
    def broken(run, skeleton, trainable, frozen, batch):
        path = ATTENTION + "indexer/wk/weight"
        return {}, {**trainable, path: trainable[path].at[1, 0].set(jnp.nan)}

    monkeypatch.setattr(diagnose, "gradient", broken)
    found = diagnose.locate(*case({}))
    assert found == "the gradient of layers/1/self_attn/indexer/wk/weight"
