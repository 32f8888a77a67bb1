"""`ModelConfig`: what is refused, and the way to `config.json` and back."""

import json

import pytest

from dsa_jax import presets
from dsa_jax.config import Fp8Weights, ModelConfig, Numerics, Yarn

# The published config.json of DeepSeek-V3.2-Exp, whole.
V32_EXP = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_published_config_round_trips():
    config = ModelConfig.from_hf(V32_EXP)
    assert config.to_hf() == V32_EXP
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert hash(config) == hash(ModelConfig.from_hf(V32_EXP))


def test_published_config_is_read_right():
    config = ModelConfig.from_hf(V32_EXP)
    assert config.softmax_scale == pytest.approx(0.1352337789, abs=1e-10)
    assert config.rope_scaling == Yarn(40, 4096, 32, 1, 1.0, 1.0)
    assert config.fp8_weights == Fp8Weights((128, 128), "ue8m0")
    assert config.numerics == Numerics(
        indexer_fp8=True, indexer_hadamard=True, kv_latent_fp8=True, scale_format="ue8m0"
    )
    assert config.index_topk == 2048
    assert not config.indexer_rope_interleave
    assert dict(config.extra)["torch_dtype"] == '"bfloat16"'
    assert config == presets.get("deepseek-v3.2-exp").replace(extra=config.extra)


def test_both_spellings_of_the_rotary_settings():
    published = ModelConfig.from_hf(V32_EXP)
    newer = {k: v for k, v in V32_EXP.items() if k not in ("rope_scaling", "rope_theta")}
    scaling = dict(V32_EXP["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type")
    newer["rope_parameters"] = {"rope_theta": 10000, **scaling}
    newer["head_dim"] = 64  # transformers 5 writes what follows from other keys
    newer["qk_head_dim"] = 192
    newer["mlp_layer_types"] = ["dense"] * 3 + ["sparse"] * 58
    assert ModelConfig.from_hf(newer) == published
    plain = newer | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert ModelConfig.from_hf(plain).rope_scaling is None
    assert ModelConfig.from_hf(plain).softmax_scale == 192**-0.5


def test_dense_base():
    dense = {k: v for k, v in V32_EXP.items() if not k.startswith("index")}
    dense["model_type"] = "deepseek_v3"
    config = ModelConfig.from_hf(dense)
    assert not config.has_indexer
    assert config.indexer_layers == ()
    assert config.numerics == Numerics()
    assert config == ModelConfig.from_hf(V32_EXP).without_indexer().replace(numerics=Numerics())


def test_glm_52_layers():
    config = presets.get("glm-5.2")
    assert len(config.indexer_layers) == 21
    assert config.indexer_layers == (0, 1, 2, *range(6, 75, 4))
    assert config.indexer_rope_interleave
    assert config.softmax_scale == 256**-0.5
    types = ["full" if i in config.indexer_layers else "shared" for i in range(78)]
    hf = config.to_hf()
    assert hf["rope_parameters"] == {"rope_theta": 8e6, "rope_type": "default"}
    for schedule in (
        {"indexer_types": types},
        {"index_topk_pattern": "".join(t[0].upper() for t in types)},
        {"indexer_types": types, "index_topk_freq": 4, "index_skip_topk_offset": 3},
    ):
        bare = {
            k: v for k, v in hf.items() if k not in ("index_topk_freq", "index_skip_topk_offset")
        }
        other = ModelConfig.from_hf(bare | schedule)
        assert other.indexer_layers == config.indexer_layers
        assert ModelConfig.from_hf(other.to_hf()) == other


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_survives_json(name):
    config = presets.get(name)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_our_own_fields_survive():
    config = ModelConfig.from_hf(V32_EXP).replace(
        numerics=Numerics(indexer_fp8=True, round_residual=True, gate_epsilon=1e-20),
        index_norm_eps=1e-5,
        latent_norm_eps=1e-6,
    )
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"model_type": "deepseek_v3"}, "'deepseek_v3' has no index_n_heads"),
        ({"index_topk": None}, "lacks index_topk"),
        ({"index_topk": 0}, "index_topk=0 must be an integer >= 1"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"scoring_func": "softmax"}, "only scoring_func='sigmoid'"),
        ({"attention_bias": True}, "only attention_bias=False"),
        ({"index_kpool": 4}, "index_kpool=4"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8 must equal"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'"),
        ({"mlp_layer_types": ["sparse"] * 61}, "mlp_layer_types contradicts"),
        ({"indexer_types": ["full"] * 3}, "indexer_types has 3 entries"),
    ],
)
def test_refused_files(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(V32_EXP | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_topk": 0}, "index_topk=0"),
        ({"index_topk": None}, "an indexer needs all three"),
        ({"index_n_heads": None, "index_head_dim": None, "index_topk": None}, "needs index_n"),
        ({"model_type": "deepseek_v3"}, "has no index"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"hidden_size": 48.0}, "hidden_size=48.0"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 must be even"),
        ({"qk_rope_head_dim": 64}, "exceeds index_head_dim=32"),
        ({"n_group": 3}, "not a multiple of n_group=3"),
        ({"n_group": 8}, "leaves 1 expert a group"),
        ({"topk_group": 5}, "topk_group=5 exceeds n_group=4"),
        ({"topk_group": 1, "num_experts_per_tok": 3}, "exceeds the 2 experts"),
        ({"first_k_dense_replace": 4}, "exceeds num_hidden_layers=3"),
        ({"max_position_embeddings": 32}, "cannot be shorter"),
        ({"index_head_dim": 24, "numerics": Numerics(indexer_hadamard=True)}, "power of two"),
        ({"numerics": Numerics(kv_latent_fp8=True)}, "kv_lora_rank=32 must be a multiple of 128"),
        ({"indexer_types": ("shared", "full", "full")}, "layer 0 is 'shared'"),
        ({"indexer_types": ("full", "none", "full")}, "'full' or 'shared'"),
        (
            {"indexer_types": ("full", "shared", "full"), "index_topk_freq": 5},
            "contradicts index_topk_freq=5",
        ),
        ({"rope_theta": 0}, "rope_theta=0"),
    ],
)
def test_fields_that_contradict(changes, message):
    with pytest.raises(ValueError, match=message):
        presets.get("tiny").replace(**changes)


def test_nested_values_are_checked():
    with pytest.raises(ValueError, match=r"factor=0\.5"):
        Yarn(0.5, 4096)
    with pytest.raises(ValueError, match="beta_fast=1"):
        Yarn(2, 4096, beta_fast=1, beta_slow=1)
    with pytest.raises(ValueError, match="scale_format='int8'"):
        Numerics(scale_format="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs indexer_fp8=True"):
        Numerics(indexer_loss_fp8=True)
    with pytest.raises(ValueError, match="weight_block_size"):
        Fp8Weights((128,))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x80\x81\x00", "not UTF-8"),
        (b"{'a': 1}", "is not JSON"),
        (b"[1]", "holds a JSON list"),
        (b"{}", "model_type=None"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(tmp_path)


def test_reads_a_folder_or_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V32_EXP))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(path)
    with pytest.raises(FileNotFoundError, match="no config at"):
        ModelConfig.from_hf(tmp_path / "missing")


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"no preset 'v4'.*deepseek-v3\.2-exp"):
        presets.get("v4")
