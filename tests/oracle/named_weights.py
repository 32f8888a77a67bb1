"""Lively random weights by the names of a Hugging Face checkpoint, the same with and without torch.

Norms are off 1, biases off 0, scores far from uniform: no parameter is without effect.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.rules import entries
from dsa_jax import presets
from dsa_jax.config import ModelConfig, Numerics
from dsa_jax.layer_tree import nest, stack_layers
from dsa_jax.transformer import Transformer

LENGTH = 72  # nine times index_topk, and beyond YaRN's original context of 64


def configs() -> dict[str, ModelConfig]:
    """What is compared with transformers, by name."""
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


def weight(name: str, shape: tuple[int, ...], update: float = 1.0) -> np.ndarray:
    """The value of a tensor, drawn from a seed that is its name.

    Args:
        name: of the tensor in the checkpoint.
        shape: likewise; matrices are `[out, in]`.
        update: factor on what a layer adds to the residual. At 1 a layer rewrites it, and in bf16
            one expert chosen otherwise changes all that follows; trained models are calmer.
    """
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name:
        value = 0.3 * noise + (0 if "bias" in name else 1)
    elif "e_score_correction_bias" in name:
        value = 0.2 * noise - 1.0  # sigmoid + bias is mostly below zero
    elif "embed" in name:
        value = noise
    else:
        value = 1.2 * noise * shape[-1] ** -0.5
    if "o_proj" in name or "down_proj" in name:
        value = update * value
    return value.astype(np.float32)


def build(config: ModelConfig) -> Transformer:
    """Our model of these weights, in fp32."""
    like = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    leaves: dict[tuple[str, ...], Any] = {}
    for entry in entries(config):
        parts = [weight(name, entry.their_shape) for name in entry.names]
        parts = [part.T if entry.transposed else part for part in parts]
        leaves[entry.path] = jnp.asarray(np.stack(parts) if entry.stacked else parts[0])
    return stack_layers(nest(leaves), like, config)


def tokens_of(config: ModelConfig, batch: int, length: int = LENGTH, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))
