"""One layer: attention and MLP, each around a residual stream that is summed in fp32."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from dsa_jax.cache import LayerCache
from dsa_jax.config import ModelConfig
from dsa_jax.linear import float_param_dtype
from dsa_jax.mla import MLA, Mode, Rows
from dsa_jax.moe import MoE, SwiGLU
from dsa_jax.norms import RMSNorm, round_to
from dsa_jax.plan import LayerKind
from dsa_jax.sharding import Rules
from dsa_jax.spread import gathered, pinned
from pallas_kernels import Selection


class BlockOutput(NamedTuple):
    """What a layer makes; what was not asked for is None.

    Attributes:
        h: the residual sum, see `residual_dtype`.
        cache: this layer's, with the new tokens.
        selection: the keys attended to.
        kl: the indexer's loss, a row's mean.
        load: tokens each expert got; None in a dense layer.
        probe: what the probe returned.
    """

    h: Float[Array, "B T D"]
    cache: LayerCache | None
    selection: Selection | None
    kl: Float32[Array, ""] | None
    load: Float32[Array, " E"] | None
    probe: Any


def residual_dtype(config: ModelConfig, dtype: DTypeLike) -> jnp.dtype:
    """In what the sum of residual and update goes from one norm to the next.

    DeepSeek's fused add-norm adds in fp32, normalises that sum un-rounded, and only then rounds it
    to be the next residual. transformers rounds first.
    """
    return jnp.dtype(dtype if config.numerics.round_residual else jnp.float32)


class Block(nnx.Module):
    """One layer of a kind."""

    def __init__(
        self,
        config: ModelConfig,
        kind: LayerKind,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rules: Rules | None = None,
    ):
        def norm() -> RMSNorm:
            return RMSNorm(
                config.hidden_size,
                eps=config.rms_norm_eps,
                dtype=dtype,
                param_dtype=float_param_dtype(param_dtype),
                round_first=config.numerics.round_norm,
            )

        options: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.input_layernorm = norm()
        self.self_attn = MLA(config, kind.has_indexer, **options, rules=rules)
        self.post_attention_layernorm = norm()
        self.mlp = (
            MoE(config, **options, rules=rules)
            if kind.has_experts
            else SwiGLU(config, config.intermediate_size, **options)
        )
        self.dtype = jnp.dtype(dtype)
        self.rules = rules or Rules()

    def __call__(
        self,
        h: Float[Array, "B T D"],
        rows: Rows,
        mode: Mode,
        layer: Int32[Array, ""],
        cache: LayerCache | None = None,
        shared: Selection | None = None,
    ) -> BlockOutput:
        """Runs the layer; arguments as for `MLA`, `h` the residual sum."""
        here = gathered(self, self.rules, self.dtype)
        h = pinned(h, self.rules, "B T _")
        attention = here.self_attn(here.input_layernorm(h), rows, mode, layer, cache, shared)
        h = pinned(self._add(h, attention.out), self.rules, "B T _")
        x = here.post_attention_layernorm(h)
        load = None
        if isinstance(here.mlp, MoE):
            update, load = here.mlp(x, rows.valid)
        else:
            update = here.mlp(x)
        h = self._add(h, update)
        return BlockOutput(
            h, attention.cache, attention.selection, attention.kl, load, attention.probe
        )

    def _add(self, h: Array, update: Array) -> Array:
        # The rounded sum is the residual, as DeepSeek stores it; the norm has read h itself.
        residual = round_to(h.astype(jnp.float32), self.dtype)
        return (residual + update.astype(jnp.float32)).astype(h.dtype)
