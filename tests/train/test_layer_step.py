"""What of the layer's benchmark can be seen without a GPU, on a tiny layer."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from benchmarks import layer_check, layer_step
from benchmarks.layer_step import Case
from dsa_jax import presets
from train.stages import Group, Stage, group_of

MODEL = presets.get("tiny").replace(
    num_hidden_layers=1, first_k_dense_replace=0, tie_word_embeddings=True
)


def test_the_layer_is_the_published_one():
    config = layer_step.layer_config()
    assert (config.hidden_size, config.num_attention_heads) == (7168, 128)
    assert (config.q_lora_rank, config.latent_dim) == (1536, 576)
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (64, 128, 2048)
    assert config.num_experts_per_tok == 8
    assert config.is_moe(0)


@pytest.mark.parametrize("stage", [Stage.WARMUP, Stage.SPARSE])
def test_a_step_moves_what_its_stage_trains(stage):
    config = layer_step.train_config(Case(stage, 64), MODEL)
    state, h, above = layer_step.prepare(config)
    before = {path: jnp.array(leaf) for path, leaf in state.params.items()}
    step = jax.jit(layer_step.make_step(config, layer_step.skeleton_of(config)))
    after, outcome = step(state, h, above)
    assert outcome.hidden.shape == h.shape
    assert (outcome.below is None) == (stage is Stage.WARMUP)
    assert outcome.kl > 0
    for path, leaf in before.items():
        trained = group_of(path) in stage.trainable and path.startswith("stacks/")
        moved = bool(jnp.any(leaf != after.params[path]))
        if "k_norm/bias" not in path and group_of(path) is not Group.BALANCE:
            assert moved == trained, path


def test_the_check_sees_a_difference(monkeypatch):
    """Without kernels both sides are one; a gradient that is 1% off shows in its own group."""
    monkeypatch.setattr(layer_check, "compile_", lambda lowered: lowered.compile())
    with ThreadPoolExecutor() as pool:
        run = layer_check.check(64, MODEL, pool)
    row = run()
    assert row["within"]
    assert set(row["errors"]) == {"attention", "experts", "indexer", "norms", "output", "input"}
    assert max(row["errors"].values()) == 0
    plain = layer_check.differences
    spoil = lambda found, *rest: plain(  # noqa: E731
        {p: 1.05 * g if layer_check.group(p) == "experts" else g for p, g in found.items()}, *rest
    )
    monkeypatch.setattr(layer_check, "differences", spoil)
    row = run()
    assert not row["within"]
    assert row["errors"]["experts"] == pytest.approx(0.05, rel=1e-3)
    assert row["errors"]["attention"] == 0


def test_kernels_are_told_by_name():
    found = layer_step.shares(
        {
            "dsa_dense_attention_mosaic_gpu_kernel": 3.0,
            "dsa_dense_attention_dkv_mosaic_gpu_kernel": 2.0,
            "sparse_attention_rows_mosaic_gpu_kernel": 1.0,
            "nvjet_tst_128": 0.5,
            "loop_fusion": 0.25,
        }
    )
    assert found == {
        "dense attention, forward": 3.0, "dense attention, backward": 2.0,
        "sparse attention, backward": 1.0, "other matmuls": 0.5, "the rest": 0.25,
    }  # fmt: skip
