"""Multi-token prediction: one more layer that guesses the token after the next.

h'_i = eh_proj([enorm(embed(t_{i+1})) | hnorm(h_i)]), then a whole layer, then a norm and a head
(DeepSeek-V3 report, 2.2). Published checkpoints carry it as layer L, with copies of the
embedding and the head.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dsa_jax.block import Block
from dsa_jax.config import ModelConfig
from dsa_jax.linear import Linear, float_param_dtype
from dsa_jax.norms import RMSNorm
from dsa_jax.plan import LayerKind


class Table(nnx.Module):
    """A weight of its own: the copies of the embedding and the head."""

    def __init__(self, shape: tuple[int, int], param_dtype: DTypeLike):
        self.weight = nnx.Param(jnp.zeros(shape, float_param_dtype(param_dtype)))


class Head(nnx.Module):
    """The norm before the head, and the head."""

    def __init__(self, norm: RMSNorm, head: Table):
        self.norm = norm
        self.head = head


class MTP(nnx.Module):
    """A multi-token-prediction layer."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
    ):
        D, vocab = config.hidden_size, config.vocab_size
        weights = float_param_dtype(param_dtype)

        def norm() -> RMSNorm:
            return RMSNorm(D, eps=config.rms_norm_eps, dtype=dtype, param_dtype=weights)

        self.embed_tokens = Table((vocab, D), param_dtype)
        self.enorm = norm()
        self.hnorm = norm()
        self.eh_proj = Linear(
            2 * D,
            D,
            rngs=rngs,
            std=config.initializer_range,
            dtype=dtype,
            param_dtype=weights,
        )
        kind = LayerKind(bool(config.n_routed_experts), config.has_indexer)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.block = Block(config, kind, rngs=rngs, **options)
        self.shared_head = Head(norm(), Table((D, vocab), param_dtype))
        self.config = config

    def __call__(self, hidden: Array, tokens: Array) -> Array:
        """Not yet."""
        raise NotImplementedError
