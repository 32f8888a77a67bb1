"""What of the layer's benchmark can be seen without a GPU, on a tiny layer."""

import fcntl
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from benchmarks import layer_check, layer_step, timing
from benchmarks.layer_step import Case
from dsa_jax import presets
from pallas_kernels import Selection
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
    """Without kernels both sides are one; a gradient that is off shows, and no other does."""
    monkeypatch.setattr(layer_check, "compile_", lambda lowered: lowered.compile())
    with ThreadPoolExecutor() as pool:
        run = layer_check.check(64, MODEL, pool)
    row = run()
    assert row["within"]
    assert {"self_attn/q_b_proj", "self_attn/indexer/wk", "mlp/gate", "output", "input"} < set(
        row["errors"]
    )
    assert max(row["errors"].values()) == 0
    plain = layer_check.differences
    spoil = lambda found, *rest: plain(  # noqa: E731
        {p: 1.05 * g if "kv_b_proj" in p else g for p, g in found.items()}, *rest
    )
    monkeypatch.setattr(layer_check, "differences", spoil)
    row = run()
    assert not row["within"]
    assert row["errors"]["self_attn/kv_b_proj"] == pytest.approx(0.05, rel=1e-3)
    assert row["errors"]["self_attn/o_proj"] == 0


def test_xla_attends_to_the_keys_of_the_kernels(monkeypatch):
    """On a CPU both sides would choose the same: what is compiled tells."""
    asked = []

    def gradients(config, skeleton, params, h, above, selected=None):
        asked.append(selected)
        return params, layer_step.Outcome(h, h, h.sum(), Selection(jnp.zeros((1, 64, 8), int)))

    monkeypatch.setattr(layer_check, "gradients", gradients)
    monkeypatch.setattr(layer_check, "compile_", lambda lowered: lowered.compile())
    with ThreadPoolExecutor() as pool:
        layer_check.check(64, MODEL, pool)
    kernels, xla = asked
    assert kernels is None
    assert xla.indices.shape == (1, 64, MODEL.index_topk)


def test_what_passes_through_the_layer_does_not_count():
    h, above = jnp.full((1, 4, 8), 64.0), jnp.full((1, 4, 8), 32.0)
    ours = layer_step.Outcome(h + 1.125, above + 2, None, None)
    theirs = layer_step.Outcome(h + 1, above + 1, None, None)
    weight = {"stacks/0/blocks/0/self_attn/o_proj/weight": jnp.ones((2, 2))}
    moved = jnp.zeros((1, 4), bool)
    found = layer_check.differences(weight, weight, h, above, moved, ours, theirs)
    assert found == {"self_attn/o_proj": 0, "output": 0.125, "input": 1}
    ours = ours._replace(hidden=ours.hidden.at[0, 2].set(9.0))
    moved = moved.at[0, 2].set(True)
    again = layer_check.differences(weight, weight, h, above, moved, ours, theirs)
    assert again == found


def test_many_tokens_that_moved_are_too_many():
    outcomes = [layer_step.Outcome(jnp.zeros(1), None, jnp.float32(0.5), None)] * 2
    moved = jnp.arange(1000)[None] < 5
    row = lambda moved: layer_check.checked_row(1000, MODEL, {"x": 0.0}, moved, outcomes)  # noqa: E731
    assert row(moved)["within"]
    assert not row(moved.at[0, 5].set(True))["within"]


def test_tokens_that_differ_are_counted():
    h, wanted = jnp.zeros((1, 4, 8)), jnp.ones((1, 4, 8))
    found = wanted.at[0, 2].set(1.5)
    assert layer_check.by_token(found, wanted, h)[0].tolist() == [0, 0, 0.5, 0]


def test_what_the_layer_needs_has_no_head():
    case = Case(Stage.SPARSE, 8192)
    work = layer_step.needed(layer_step.train_config(case, layer_step.layer_config()))
    assert "head" not in work
    pairs = sum(min(t, 2048) for t in range(1, 8193))
    assert work["sparse attention"] == pytest.approx(2 * 128 * 1088 * pairs / 1e12, abs=0.01)
    assert work["experts"] == pytest.approx(6 * 8192 * 8 * 3 * 7168 * 2048 / 1e12, abs=0.01)


def test_a_profile_has_a_line_a_kernel(tmp_path):
    run = [("short", 0.5), ("long", 2.0), ("short", 0.25)]
    layer_step.keep_profile(tmp_path, Case(Stage.DENSE, 64), run)
    lines = (tmp_path / "dense_64.txt").read_text().splitlines()
    assert [line.split() for line in lines] == [["2.000", "1", "long"], ["0.750", "2", "short"]]


def test_one_process_has_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_held", [])
    timing.wait_for(tmp_path / "lock")
    with (tmp_path / "lock").open("a") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
