"""The lightning indexer: small heads that score every key for every query.

I[t, s] = sum_i w[t, i] * relu(q[t, i] . k[s]) (DeepSeek-V3.2-Exp report, equation 1); the keys of
the `index_topk` highest scores are attended to. This module makes q, k and w; the ops score and
select.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from dsa_jax.config import ModelConfig, Numerics
from dsa_jax.linear import Linear, float_param_dtype
from dsa_jax.norms import LayerNorm
from dsa_jax.quantization import act_quant, hadamard, round_trip
from dsa_jax.rope import Rotation, rotate

# Fresh indexers start almost indifferent: scores vary little, so softmax(I) is close to uniform,
# but no weight is zero, so that gradient reaches all three projections from the first step.
_PROJECTION_STD = 0.5
_HEAD_WEIGHT_STD = 0.1


class IndexerHeads(NamedTuple):
    """What the scores are made of.

    Attributes:
        q: queries, compute dtype or e4m3.
        k: keys, likewise.
        w: head weights of either sign, with I^-1/2 * H^-1/2 and the queries' FP8 scales folded in.
        k_scale: the keys' FP8 scales; None unless quantised.
    """

    q: Float[Array, "B T I H"]
    k: Float[Array, "B S H"]
    w: Float32[Array, "B T I"]
    k_scale: Float32[Array, "B S"] | None


class Indexer(nnx.Module):
    """Projections of the indexer; their inputs are the attention's, detached by the caller."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ):
        I, H, D = config.index_n_heads, config.index_head_dim, config.hidden_size
        assert I is not None
        assert H is not None
        self.heads, self.width, self.rope_width = I, H, config.qk_rope_head_dim
        self.interleaved = config.indexer_rope_interleave

        def linear(in_width: int, out_width: int, std: float, weights: DTypeLike) -> Linear:
            return Linear(
                in_width,
                out_width,
                rngs=rngs,
                std=std * in_width**-0.5,
                dtype=dtype,
                param_dtype=weights,
                fp8=config.fp8_weights,
            )

        self.wq_b = linear(config.q_lora_rank, I * H, _PROJECTION_STD, param_dtype)
        self.wk = linear(D, H, _PROJECTION_STD, param_dtype)
        self.k_norm = LayerNorm(H, eps=config.index_norm_eps, dtype=dtype)
        self.weights_proj = linear(D, I, _HEAD_WEIGHT_STD, float_param_dtype(param_dtype))

    def __call__(
        self, x: Float[Array, "B T D"], q_latent: Float[Array, "B T Q"], turn: Rotation
    ) -> IndexerHeads:
        """Queries, keys and head weights of the given tokens, not quantised.

        Args:
            x: the attention's input, after its norm.
            q_latent: the attention's query latent, after its norm.
            turn: the rotation of the tokens' positions: the attention's own angles.
        """
        q = self.wq_b(q_latent)
        q = q.reshape(*q.shape[:-1], self.heads, self.width)
        k = self.k_norm(self.wk(x))
        # fp32 on both sides: rounding the head weights to bf16 flips near-ties of the selection.
        w = jnp.matmul(
            x.astype(jnp.float32),
            self.weights_proj.weight[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        # No mscale^2 here, unlike the attention's scale.
        w = w * (self.heads**-0.5 * self.width**-0.5)
        return IndexerHeads(self._rotate(q, turn), self._rotate(k, turn), w, None)

    def _rotate(self, x: Array, turn: Rotation) -> Array:
        """Turns the *first* R columns; in the attention it is the last."""
        rope, nope = x[..., : self.rope_width], x[..., self.rope_width :]
        rope = rotate(rope, turn, interleaved=self.interleaved)
        return jnp.concatenate([rope, nope], axis=-1)


def for_selection(heads: IndexerHeads, numerics: Numerics) -> IndexerHeads:
    """The heads as the selection sees them: rotated and quantised where the numerics say so.

    One scale for a whole head. Scales are positive, so relu(q . k) takes them out as factors: the
    queries' go into `w`, the keys' multiply the score.
    """
    q, k, w, _ = heads
    if numerics.indexer_hadamard:
        q, k = hadamard(q), hadamard(k)
    if not numerics.indexer_fp8:
        return IndexerHeads(q, k, w, None)
    q, q_scale = act_quant(q, q.shape[-1], numerics.scale_format)
    k, k_scale = act_quant(k, k.shape[-1], numerics.scale_format)
    return IndexerHeads(q, k, w * q_scale[..., 0], k_scale[..., 0])


def for_loss(heads: IndexerHeads, numerics: Numerics) -> IndexerHeads:
    """The heads as the KL loss sees them.

    By default the smooth ones: rounding has no useful gradient, the report trains in higher
    precision, and the Hadamard rotation cancels in q . k. With `indexer_loss_fp8` the values are
    those of the selection and gradients pass straight through the rounding.
    """
    if not numerics.indexer_loss_fp8:
        return heads
    q, k, w, _ = heads
    if numerics.indexer_hadamard:
        q, k = hadamard(q), hadamard(k)
    q = round_trip(q, q.shape[-1], numerics.scale_format)
    k = round_trip(k, k.shape[-1], numerics.scale_format)
    return IndexerHeads(q, k, w, None)
