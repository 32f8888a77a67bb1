"""`config.json` as transformers writes it means what ours meant."""

import json

import pytest

from convert.compare import torch_modules
from dsa_jax.config import ModelConfig
from tests.oracle.named_weights import configs


@pytest.mark.parametrize("name", configs())
def test_config_through_transformers(name):
    config = configs()[name]
    _, transformers = torch_modules()
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    back = ModelConfig.from_hf(json.loads(theirs.to_json_string()))  # as it is saved
    kinds = tuple(config.indexer_type(i) for i in range(config.num_hidden_layers))
    assert tuple(back.indexer_type(i) for i in range(config.num_hidden_layers)) == kinds
    # The schedule comes back as a list of its layers.
    schedule = {"indexer_types": None, "index_topk_freq": 1, "index_skip_topk_offset": 2}
    assert back.replace(extra=(), **schedule) == config.replace(extra=(), **schedule)
