"""Configs by name: `presets.get("deepseek-v3.2-exp")`.

The published models go through `ModelConfig.from_hf`, from the values of their `config.json`; the
small ones are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dsa_jax.config import ModelConfig, Numerics, Yarn

_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "scale_fmt": "ue8m0",
}
_DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_theta": 10000,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": _FP8,
}
_GLM: dict[str, Any] = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "num_hidden_layers": 78,
    "first_k_dense_replace": 3,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "num_nextn_predict_layers": 1,
}


def _deepseek_v32_exp() -> ModelConfig:
    index = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    return ModelConfig.from_hf(_DEEPSEEK | {"model_type": "deepseek_v32"} | index)


def _deepseek_v31_terminus() -> ModelConfig:
    return ModelConfig.from_hf(_DEEPSEEK)


def _glm_5() -> ModelConfig:
    return ModelConfig.from_hf(_GLM)


def _glm_52() -> ModelConfig:
    """GLM-5 with one indexer for four layers (21 of 78) and a longer context."""
    return ModelConfig.from_hf(
        _GLM
        | {"index_topk_freq": 4, "index_skip_topk_offset": 3, "max_position_embeddings": 1_048_576}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 8_000_000}}
    )


def _tiny() -> ModelConfig:
    """The smallest model on which a mistake shows.

    All widths differ, so that a swapped split cannot pass; `index_topk` is far below any useful
    length; YaRN's ramp has an untouched, a mixed and a divided pair; experts come in groups.
    """
    return ModelConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=40,
        kv_lora_rank=32,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=20,
        moe_intermediate_size=28,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        index_n_heads=6,
        index_head_dim=32,
        index_topk=8,
        rope_theta=1000.0,
        max_position_embeddings=512,
        rope_scaling=Yarn(factor=8, original_max_position_embeddings=64, mscale_all_dim=1.0),
        bos_token_id=0,
        eos_token_id=1,
    )


def _tiny_fp8() -> ModelConfig:
    """`tiny` with widths that fill FP8 blocks, and every rounding of DeepSeek's inference code."""
    return _tiny().replace(
        hidden_size=128,
        q_lora_rank=128,
        kv_lora_rank=128,
        index_head_dim=128,
        numerics=Numerics.deepseek(),
    )


def _tiny_shared() -> ModelConfig:
    """`tiny` as a GLM-5.2: layers 0, 1, 4 and 7 of 9 choose keys; interleaved, plain RoPE."""
    return dataclasses.replace(
        _tiny(),
        num_hidden_layers=9,
        first_k_dense_replace=2,
        n_group=1,
        topk_group=1,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        index_topk_freq=3,
        index_skip_topk_offset=2,
        indexer_rope_interleave=True,
        model_type="glm_moe_dsa",
    )


def _demo() -> ModelConfig:
    """What `make demo` trains on a CPU: bytes in, three layers, a few hundred thousand weights."""
    return ModelConfig(
        vocab_size=264,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        moe_intermediate_size=64,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=16,
        max_position_embeddings=512,
    )


_PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "deepseek-v3.2-exp": _deepseek_v32_exp,
    "deepseek-v3.1-terminus": _deepseek_v31_terminus,
    "glm-5": _glm_5,
    "glm-5.1": _glm_5,
    "glm-5.2": _glm_52,
    "demo": _demo,
    "tiny": _tiny,
    "tiny-fp8": _tiny_fp8,
    "tiny-shared": _tiny_shared,
}


def names() -> tuple[str, ...]:
    """The names `get` knows."""
    return tuple(_PRESETS)


def get(name: str) -> ModelConfig:
    """The config of a name.

    Raises:
        ValueError: no such preset; the message lists them.
    """
    if name not in _PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(_PRESETS)}")
    return _PRESETS[name]()
