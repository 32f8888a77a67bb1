"""Weights come from transformers, train here through both stages, and go back the same."""

import io

import jax.numpy as jnp
import numpy as np
from rich.console import Console

import dsa_jax
from convert import hf_to_orbax, orbax_to_hf
from convert.add_indexer import add_indexer
from convert.compare import (
    cases,
    difference,
    load_transformers,
    observe,
    observe_transformers,
    with_config,
)
from dsa_jax.config import ModelConfig
from tests.oracle.named_weights import tokens_of
from tests.parity import random_models
from train.config import BranchConfig, DataConfig, OptimizerConfig, TrainConfig
from train.loop import train
from train.stages import Stage

HEADS, WIDTH, TOPK = 12, 32, 8


def trained(stage: Stage, folder, model: ModelConfig, init_from, rate: float):
    config = TrainConfig(
        stage=stage,
        output=folder / stage.value,
        init_from=init_from,
        model=model,
        data=DataConfig(sources=(str(folder / "tokens.npy"),), document_end=1),
        optimizer=OptimizerConfig(main=BranchConfig(rate), indexer=BranchConfig(rate)),
        steps=6,
        batch_size=4,
        sequence_length=40,
        compute_dtype="float32",
        remat="none",
    )
    return train(config, console=Console(file=io.StringIO()))


def test_there_and_back(tmp_path):
    random_models.save("deepseek_v3", tmp_path / "dense")
    add_indexer(
        *(tmp_path / name for name in ("dense", "start")),
        index_n_heads=HEADS,
        index_head_dim=WIDTH,
        index_topk=TOPK,
    )
    config = dsa_jax.load_config(tmp_path / "start")
    np.save(tmp_path / "tokens.npy", (2 + np.arange(4000) * 7 % 90).astype(np.uint16))
    warm = trained(Stage.WARMUP, tmp_path, config, tmp_path / "start", 1e-2)
    assert warm.metrics["kl"] > 0
    done = trained(Stage.SPARSE, tmp_path, config, warm.checkpoint_dir, 1e-3)
    assert done.model_dir is not None
    orbax_to_hf(done.model_dir, tmp_path / "back")

    tokens = tokens_of(config, 2)
    theirs = load_transformers(tmp_path / "back", "fp32")
    assert type(theirs).__name__ == "DeepseekV32ForCausalLM"
    expected = observe_transformers(theirs, tokens)
    ours = with_config(done.model, cases(done.model.config)[0].config)
    found = difference(observe(ours, tokens), expected)
    assert found.logits < 1e-4  # fp32, as in the other models
    assert found.keys == 1.0

    # What came back is neither where it started nor the dense model with an indexer.
    before = dsa_jax.load(tmp_path / "start", dtype=jnp.float32)
    moved = difference(observe(before, tokens), expected)
    assert moved.kl > 1e-3
    assert moved.keys < 0.99
    # And once more around: transformers' own copy is read back bit for bit.
    theirs.save_pretrained(tmp_path / "again")
    hf_to_orbax(tmp_path / "again", tmp_path / "again-ours")
    again = dsa_jax.load(tmp_path / "again-ours", dtype=jnp.float32)
    np.testing.assert_array_equal(
        again.embed_tokens.weight[...], done.model.embed_tokens.weight[...]
    )
    assert difference(observe(again, tokens), observe(done.model, tokens)).logits == 0
