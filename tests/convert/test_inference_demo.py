"""The inference demo's layout, for any number of files."""

import json

import numpy as np
import pytest
from checkpoints import assert_same_bits, fp8_config, random_tensors, read_file, read_hf, write_hf

from convert import ConvertError, demo_to_orbax, hf_to_orbax, orbax_to_demo, orbax_to_hf
from dsa_jax.config import ModelConfig

# Everything that is split divides by 4, in whole tiles.
CONFIG = fp8_config(
    vocab_size=96,
    intermediate_size=512,
    moe_intermediate_size=512,
    qk_nope_head_dim=96,  # with 32 rotary columns, or 32 of values, a head is one tile
    qk_rope_head_dim=32,
    num_hidden_layers=2,
    num_attention_heads=16,
)


@pytest.fixture(scope="module")
def content():
    return random_tensors(CONFIG)


@pytest.fixture(scope="module")
def ours(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    hf_to_orbax(write_hf(folder / "hf", CONFIG, content), folder / "ours")
    return folder / "ours"


def main_model(content):
    extra = f"model.layers.{CONFIG.num_hidden_layers}."
    return {name: x for name, x in content.items() if not name.startswith(extra)}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_there_and_back_keeps_every_bit(count, ours, content, tmp_path):
    orbax_to_demo(ours, tmp_path / "demo", parallel=count)
    names = {path.name for path in (tmp_path / "demo").glob("*.safetensors")}
    assert names == {f"model{i}-mp{count}.safetensors" for i in range(count)}
    written = demo_to_orbax(tmp_path / "demo", tmp_path / "again")
    assert written == CONFIG.replace(num_nextn_predict_layers=0)
    orbax_to_hf(tmp_path / "again", tmp_path / "hf")
    assert_same_bits(read_hf(tmp_path / "hf"), main_model(content))


def test_what_each_file_holds(ours, content, tmp_path):
    """By the demo's own rule: rows or columns in even parts, experts whole, the rest everywhere."""
    orbax_to_demo(ours, tmp_path / "demo", parallel=4)
    files = [read_file(tmp_path / "demo" / f"model{i}-mp4.safetensors") for i in range(4)]

    def same(a, b):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == np.ascontiguousarray(b).tobytes()

    layer = "model.layers.1"
    for i, file in enumerate(files):
        for demo, hf, axis in (
            ("embed.weight", "model.embed_tokens.weight", 0),
            ("head.weight", "lm_head.weight", 0),
            ("layers.1.attn.wq_b.weight", f"{layer}.self_attn.q_b_proj.weight", 0),
            ("layers.1.attn.wq_b.scale", f"{layer}.self_attn.q_b_proj.weight_scale_inv", 0),
            ("layers.1.attn.wo.weight", f"{layer}.self_attn.o_proj.weight", 1),
            ("layers.1.attn.wo.scale", f"{layer}.self_attn.o_proj.weight_scale_inv", 1),
            ("layers.0.ffn.w2.weight", "model.layers.0.mlp.down_proj.weight", 1),
            (
                "layers.1.ffn.shared_experts.w3.scale",
                f"{layer}.mlp.shared_experts.up_proj.weight_scale_inv",
                0,
            ),
        ):
            same(file[demo], np.split(content[hf], 4, axis)[i])
        for demo, hf in (
            ("norm.weight", "model.norm.weight"),
            ("layers.1.ffn.gate.bias", f"{layer}.mlp.gate.e_score_correction_bias"),
            ("layers.1.attn.wkv_a.weight", f"{layer}.self_attn.kv_a_proj_with_mqa.weight"),
            ("layers.1.attn.indexer.wq_b.weight", f"{layer}.self_attn.indexer.wq_b.weight"),
            ("layers.1.attn.indexer.k_norm.bias", f"{layer}.self_attn.indexer.k_norm.bias"),
        ):
            same(file[demo], content[hf])
        experts = {int(n.split(".")[4]) for n in file if ".ffn.experts." in n}
        assert experts == {2 * i, 2 * i + 1}
        expert = f"{layer}.mlp.experts.{2 * i}.down_proj.weight"
        same(file[f"layers.1.ffn.experts.{2 * i}.w2.weight"], content[expert])
        assert not any(name.startswith("layers.2.") for name in file)  # no extra layer


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "at least 1"),
        (3, "does not divide num_attention_heads=16"),
        (16, "does not divide n_routed_experts=8"),
        (8, r"does not divide axis 1 of layers.0.ffn.w2.weight \[128, 512\] in whole tiles of 128"),
    ],
)
def test_a_number_of_files_that_does_not_divide(count, message, ours, tmp_path):
    with pytest.raises(ConvertError, match=message):
        orbax_to_demo(ours, tmp_path / "demo", parallel=count)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def demo(ours, tmp_path):
    orbax_to_demo(ours, tmp_path / "demo", parallel=2)
    return tmp_path / "demo"


def test_a_missing_file(demo, tmp_path):
    (demo / "model1-mp2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model1-mp2.safetensors is missing"):
        demo_to_orbax(demo, tmp_path / "ours")


def test_files_of_two_kinds(demo, tmp_path):
    (demo / "model0-mp4.safetensors").write_bytes(b"")
    with pytest.raises(ConvertError, match=r"holds mp2, mp4; a checkpoint is n files of one n"):
        demo_to_orbax(demo, tmp_path / "ours")


def test_a_file_that_lacks_its_part(demo, ours, tmp_path):
    orbax_to_demo(ours, tmp_path / "one")
    (tmp_path / "one" / "model0-mp1.safetensors").rename(demo / "model1-mp2.safetensors")
    with pytest.raises(ConvertError, match=r"model1-mp2.safetensors: tensor .* in another file"):
        demo_to_orbax(demo, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_config_may_be_the_demo_s_own_or_elsewhere(demo, content, tmp_path):
    (demo / "config.json").rename(tmp_path / "config.json")
    config = demo_to_orbax(demo, tmp_path / "elsewhere", config=tmp_path / "config.json")
    assert config == CONFIG.replace(num_nextn_predict_layers=0)
    own = json.loads((demo / "inference_config.json").read_text())
    assert (own["dim"], own["dtype"], own["scale_fmt"], own["n_activated_experts"]) == (
        128, "fp8", "ue8m0", 2,
    )  # fmt: skip
    orbax_to_hf(tmp_path / "elsewhere", tmp_path / "a")
    demo_to_orbax(demo, tmp_path / "own")
    orbax_to_hf(tmp_path / "own", tmp_path / "b")
    assert_same_bits(read_hf(tmp_path / "a"), read_hf(tmp_path / "b"))
    config = ModelConfig.from_hf(tmp_path / "own")
    for name in ("hidden_size", "index_topk", "fp8_weights", "numerics", "softmax_scale"):
        assert getattr(config, name) == getattr(CONFIG, name), name
    (demo / "inference_config.json").unlink()
    with pytest.raises(ConvertError, match=r"no config.json; name the model's with --config"):
        demo_to_orbax(demo, tmp_path / "none")
