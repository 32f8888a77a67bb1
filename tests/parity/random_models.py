"""Random-weight checkpoints written by transformers, small and with every width different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from convert.compare import torch_modules
from dsa_jax import presets
from dsa_jax.config import ModelConfig, Numerics

LENGTH = 72  # nine times index_topk, and beyond YaRN's original context of 64


def configs() -> dict[str, ModelConfig]:
    """What is compared, by name."""
    widths = {
        # With few heads, keys that all of them reject tie at exactly 0, and torch breaks ties as
        # it likes.
        "index_n_heads": 12,
        "moe_intermediate_size": 32,  # torch's grouped products want strides of 16 bytes
    }
    v32 = presets.get("tiny-fp8").replace(numerics=Numerics(), **widths)
    glm = presets.get("tiny-shared").replace(**widths)
    return {
        "deepseek_v32": v32,
        "deepseek_v3": v32.without_indexer(),
        "glm-5": glm.replace(num_hidden_layers=3, index_topk_freq=1),
        "glm-5.2": glm,
    }


def build(config: ModelConfig, seed: int = 0, update: float = 1.0) -> Any:
    """A transformers model of lively weights: norms off 1, biases off 0, scores not uniform.

    Args:
        config: the architecture.
        seed: of the weights.
        update: factor on what a layer adds to the residual. At 1 a layer rewrites it, and in bf16
            one expert chosen otherwise changes all that follows; trained models are calmer.
    """
    torch, transformers = torch_modules()
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters())
    tensors |= {k: v for k, v in model.named_buffers() if "e_score_correction_bias" in k}
    with torch.no_grad():
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                value = 0.3 * noise + (0 if "bias" in name else 1)
            elif "e_score_correction_bias" in name:
                value = 0.2 * noise - 1.0  # sigmoid + bias is mostly below zero
            elif "embed" in name:
                value = noise
            else:
                value = 1.2 * noise * tensor.shape[-1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                value = update * value
            tensor.copy_(value)
    return model.eval()


def save(name: str, folder: Path, dtype: str = "fp32", update: float = 1.0) -> Path:
    """Writes the checkpoint of a name, as `save_pretrained` does."""
    torch, _ = torch_modules()
    model = build(configs()[name], update=update)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def tokens_of(config: ModelConfig, batch: int, length: int = LENGTH, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))
