"""Counted operations against the published model's own figures and against a model's weights."""

import dataclasses

import pytest

from dsa_jax import presets
from train.config import TrainConfig
from train.flops import (
    computed_flop,
    layer_shape,
    model_flop,
    selected_pairs,
    step_work,
    visible_pairs,
)
from train.stages import Stage

PFLOP = 1e15


def work(stage, **changes):
    config = TrainConfig(stage=stage, model=presets.get("deepseek-v3.2-exp"), **changes).resolved()
    return config, {part.name: part for part in step_work(config)}


def test_a_sequence_of_128k_through_the_sparse_stage():
    """Forward: 9.7 PFLOP in weights, 4.5 in sparse attention, 8.6 in the indexer's scores."""
    config, parts = work(Stage.SPARSE)
    weights = sum(parts[n].forward for n in ("projections and MLPs", "experts", "head"))
    assert weights == pytest.approx(9.6 * PFLOP, rel=0.01)
    assert parts["sparse attention"].forward == pytest.approx(4.53 * PFLOP, rel=0.01)
    assert parts["indexer's scores"].forward == pytest.approx(8.59 * PFLOP, rel=0.01)
    assert computed_flop(config) == pytest.approx(79 * PFLOP, rel=0.02)


def test_a_sequence_of_128k_through_warm_up():
    """Dense attention 42.9 PFLOP, the target's scores 25.8, the indexer's loss 25.8."""
    config, parts = work(Stage.WARMUP)
    assert parts["dense attention"].forward == pytest.approx(42.9 * PFLOP, rel=0.01)
    assert parts["KL on all keys"].total == pytest.approx(51.5 * PFLOP, rel=0.01)
    assert computed_flop(config) == pytest.approx(104 * PFLOP, rel=0.01)
    assert model_flop(config) == computed_flop(config), "nothing is recomputed without a backward"
    assert "head" not in parts, "warm-up computes no logits"


def test_weights_are_counted_once_each():
    """2 operations a weight and token: the active parameters, but for table, norms and router's
    biases, are the weights that the linear parts multiply with."""
    from dsa_jax.counts import param_count

    config, parts = work(Stage.DENSE)
    model = config.model
    linear = sum(parts[n].forward for n in ("projections and MLPs", "experts", "head"))
    active = param_count(model.without_indexer()).active - model.vocab_size * model.hidden_size
    assert config.sequence_length is not None
    assert linear / (2 * config.sequence_length) == pytest.approx(active, rel=1e-4)


def test_coefficient_0_counts_no_loss():
    """And no gradient of the indexers; all else is the same."""
    _, with_loss = work(Stage.SPARSE)
    _, without = work(Stage.SPARSE, kl_coefficient=0.0)
    assert set(with_loss) - set(without) == {"KL on selected keys"}
    changed = {name for name, part in without.items() if part != with_loss[name]}
    assert changed == {"indexer's projections"}
    assert without["indexer's projections"].backward == 0


def test_recomputation_follows_the_policy():
    again = {}
    for remat in ("none", "dots", "selection", "full"):
        _, parts = work(Stage.SPARSE, remat=remat)
        again[remat] = {name for name, part in parts.items() if part.recomputed}
    assert again["none"] == {"head"}
    assert again["dots"] == {"head", "experts", "sparse attention"}
    assert again["selection"] == again["dots"] | {"projections and MLPs"}
    assert again["full"] == again["selection"] | {"indexer's scores", "indexer's projections"}


def test_pairs():
    assert visible_pairs(5) == 15
    assert selected_pairs(5, 2) == 1 + 2 + 2 + 2 + 2
    assert selected_pairs(2, 5) == 3


def test_the_costs_by_position_are_the_same_layer():
    """`train.cost` counts a token at a position: here are the sums over positions."""
    config, parts = work(Stage.SPARSE, sequence_length=4096)
    shape, layers = layer_shape(config.model), config.model.num_hidden_layers
    summed = layers * sum(shape.sparse_flop(t) for t in range(1, 4097))
    counted = parts["sparse attention"].forward + parts["indexer's scores"].forward
    assert summed == pytest.approx(counted)
    assert dataclasses.asdict(shape)["topk"] == 2048
