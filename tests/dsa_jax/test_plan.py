"""How layers are grouped."""

import pytest

from dsa_jax import presets
from dsa_jax.plan import layer_plan


@pytest.mark.parametrize("name", presets.names())
def test_every_layer_once_in_order(name):
    config = presets.get(name)
    seen = []
    for stack in layer_plan(config):
        for repeat in range(stack.repeats):
            for block, kind in enumerate(stack.kinds):
                layer = stack.layer(block, repeat)
                seen.append(layer)
                assert kind.has_experts == config.is_moe(layer)
                assert kind.has_indexer == (layer in config.indexer_layers)
    assert seen == list(range(config.num_hidden_layers))


def test_programs_do_not_grow_with_depth():
    """(layers in the scanned unit, repeats) of each stack."""

    def shape(name):
        return [(len(stack.kinds), stack.repeats) for stack in layer_plan(presets.get(name))]

    assert shape("deepseek-v3.2-exp") == [(1, 3), (1, 58)]
    assert shape("glm-5.2") == [(1, 3), (4, 18), (1, 3)]
    assert shape("tiny-shared") == [(1, 2), (3, 2), (1, 1)]
