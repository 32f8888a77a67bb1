"""Multi-token prediction: one more layer, which guesses the token after the next.

    h'_i = eh_proj [enorm(embed(t_{i+1})) | hnorm(h_i)]
    logits_i = head(norm(layer(h')_i)), for the token t_{i+2}

(DeepSeek-V3 report, section 2.2, where the halves stand in the other order; the published weights
have the embedding first.) Checkpoints carry it as layer L, with copies of the embedding and the
head. The model runs without it: `dsa_jax.load` leaves it out, `dsa_jax.load_mtp` reads it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from dsa_jax.block import Block, residual_dtype
from dsa_jax.config import ModelConfig
from dsa_jax.linear import Linear, float_param_dtype
from dsa_jax.mla import Attention, Mode, Rows
from dsa_jax.norms import RMSNorm
from dsa_jax.plan import LayerKind
from dsa_jax.transformer import Embedding


class MTPOutput(NamedTuple):
    """What the layer makes.

    Attributes:
        logits: of the token after the next.
        hidden: what its head reads; `h` of a further such layer.
    """

    logits: Float32[Array, "B T vocab"]
    hidden: Float[Array, "B T D"]


class SharedHead(nnx.Module):
    """The norm before the head, and the head."""

    def __init__(self, norm: RMSNorm, head: Embedding):
        self.norm = norm
        self.head = head


class MTP(nnx.Module):
    """A multi-token-prediction layer.

    Args:
        config: the model's.
        rngs: for fresh parameters.
        dtype: in which activations are computed, as in the model.
        param_dtype: in which parameters are kept, likewise.
    """

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
            return RMSNorm(
                D,
                eps=config.rms_norm_eps,
                dtype=dtype,
                param_dtype=weights,
                round_first=config.numerics.round_norm,
            )

        def table(shape: tuple[int, int]) -> Embedding:
            std = config.initializer_range
            return Embedding(shape, key=rngs.params(), std=std, param_dtype=param_dtype)

        self.embed_tokens = table((vocab, D))
        self.enorm = norm()
        self.hnorm = norm()
        # Not in FP8 even where all other matrices are, so without `fp8`.
        self.eh_proj = Linear(
            2 * D, D, rngs=rngs, std=config.initializer_range, dtype=dtype, param_dtype=weights
        )
        kind = LayerKind(has_experts=bool(config.moe_layers), has_indexer=config.has_indexer)
        options: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.block = Block(config, kind, **options)
        self.shared_head = SharedHead(norm(), table((D, vocab)))
        self.config = config
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        next_tokens: Int[Array, "B T"],
        rows: Rows,
        *,
        attention: Attention = "sparse",
    ) -> MTPOutput:
        """Guesses tokens i + 2 from hidden states i and tokens i + 1.

        Args:
            h: `hidden` of the model's output, after its final norm: what the engines that run this
                layer give it.
            next_tokens: the token after each position's.
            rows: where the positions stand: the model's own, `model.rows(tokens, ...)`.
            attention: as for the model.
        """
        c = self.config
        embedded = jnp.take(self.embed_tokens.weight[...], next_tokens, axis=0).astype(self.dtype)
        x = jnp.concatenate([self.enorm(embedded), self.hnorm(h)], axis=-1)
        x = self.eh_proj(x).astype(residual_dtype(c, self.dtype))
        mode = Mode(attention, select=attention != "dense")
        out = self.block(x, rows, mode, jnp.int32(c.num_hidden_layers))
        hidden = self.shared_head.norm(out.h)
        logits = jnp.matmul(
            hidden,
            self.shared_head.head.weight[...].astype(self.dtype),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return MTPOutput(logits, hidden)
