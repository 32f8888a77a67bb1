"""What a model is: `ModelConfig`, checked when it is made, and its Hugging Face form.

Field names are those of the published `config.json`, so that the two can be read side by side. The
letters in the comments are the ones of every annotation and einsum in this package: N attention
heads, I indexer heads, D model width, H indexer head width, C latent width, R rotary width,
P nope width, V value width, E experts, F expert width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsa_jax.config_parts import (
    Fp8Weights,
    Numerics,
    Yarn,
    positive,
    positive_int,
)

IndexerType = Literal["full", "shared"]

# The model types this package builds, and whether they carry an indexer.
MODEL_TYPES = {"deepseek_v3": False, "deepseek_v32": True, "glm_moe_dsa": True}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and numerics of one model; frozen, hashable, validated.

    Make one with `from_hf` or `dsa_jax.presets.get`, vary it with `replace`.
    """

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # width of the dense layers' SwiGLU
    num_hidden_layers: int
    num_attention_heads: int  # N
    q_lora_rank: int  # width of the query latent
    kv_lora_rank: int  # C
    qk_nope_head_dim: int  # P
    qk_rope_head_dim: int  # R
    v_head_dim: int  # V

    # Layers before this one have a dense SwiGLU, the others experts (each `moe_layer_freq`-th).
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    moe_intermediate_size: int = 0  # F
    n_routed_experts: int = 0  # E
    n_shared_experts: int = 0  # always-on experts, fused into one SwiGLU of this many times F
    num_experts_per_tok: int = 0
    # Experts come in `n_group` groups, of which the best `topk_group` are eligible per token.
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True  # divide the chosen experts' weights by their sum
    routed_scaling_factor: float = 1.0

    # The indexer. All three None: dense attention only (DeepSeek-V3.1-Terminus).
    index_n_heads: int | None = None  # I
    index_head_dim: int | None = None  # H
    index_topk: int | None = None
    # Pair layout of the indexer's rotary embedding: False half-split, True interleaved (GLM-5).
    indexer_rope_interleave: bool = False
    # "full" layers choose keys, "shared" ones reuse the choice of the full layer before them. None:
    # layer i is full where max(i - index_skip_topk_offset + 1, 0) is a multiple of index_topk_freq.
    indexer_types: tuple[IndexerType, ...] | None = None
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 2

    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    rms_norm_eps: float = 1e-6
    index_norm_eps: float = 1e-6  # the LayerNorm of the indexer's keys
    # The norms of the two latents. None: rms_norm_eps, as serving engines do; transformers has 1e-6
    # whatever the checkpoint says, which differs for GLM-5.
    latent_norm_eps: float | None = None
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0  # multi-token-prediction layers in the checkpoint
    initializer_range: float = 0.02  # standard deviation of fresh weights

    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    model_type: str = "deepseek_v32"
    fp8_weights: Fp8Weights | None = None  # how the checkpoint stores weights, if FP8
    numerics: Numerics = dataclasses.field(default_factory=Numerics)
    # Keys of the source's config.json without a meaning here, (name, JSON text), kept for `to_hf`.
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.indexer_types is not None:
            object.__setattr__(self, "indexer_types", tuple(self.indexer_types))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        _check_sizes(self)
        _check_experts(self)
        _check_indexer(self)
        _check_positions(self)

    # What follows from the fields.

    @property
    def qk_head_dim(self) -> int:
        """P + R, the width of one un-absorbed query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """C + R, the width of what the cache keeps of a token and of an absorbed query head."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by, in every mode.

        scale = (P + R)^-1/2 * m^2, m = 0.1 * mscale_all_dim * ln(factor) + 1 with YaRN, else 1. The
        absorbed mode uses it too: it is the same score, computed in another order.
        """
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @property
    def has_indexer(self) -> bool:
        """Whether the model can choose keys by itself."""
        return self.index_topk is not None

    @property
    def indexer_layers(self) -> tuple[int, ...]:
        """Layers with indexer parameters: the full ones; none in a dense model."""
        layers = range(self.num_hidden_layers)
        return tuple(i for i in layers if self.has_indexer and self.indexer_type(i) == "full")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe(i))

    def indexer_type(self, layer: int) -> IndexerType:
        """Whether a layer chooses keys ("full") or reuses an earlier choice ("shared")."""
        if self.indexer_types is not None:
            return self.indexer_types[layer]
        return _scheduled_type(self, layer)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)

    def without_indexer(self) -> ModelConfig:
        """The dense model this one grew from (V3.2-Exp -> V3.1-Terminus)."""
        return self.replace(
            index_n_heads=None,
            index_head_dim=None,
            index_topk=None,
            indexer_types=None,
            index_topk_freq=1,
            index_skip_topk_offset=2,
            model_type="deepseek_v3",
            numerics=dataclasses.replace(
                self.numerics, indexer_fp8=False, indexer_hadamard=False, indexer_loss_fp8=False
            ),
        )

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face `config.json`: see `dsa_jax.hf_config.read`."""
        from dsa_jax import hf_config

        return hf_config.read(source)

    def to_hf(self) -> dict[str, Any]:
        """This config as a `config.json` dictionary: see `dsa_jax.hf_config.write`."""
        from dsa_jax import hf_config

        return hf_config.write(self)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's magnitude correction, `0.1 * mscale * ln(factor) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _check_sizes(c: ModelConfig) -> None:
    positive_int(
        c,
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
        *("qk_rope_head_dim", "v_head_dim", "moe_layer_freq", "max_position_embeddings"),
    )
    positive_int(c, "first_k_dense_replace", "num_nextn_predict_layers", least=0)
    positive(c, "rope_theta", "rms_norm_eps", "index_norm_eps", "initializer_range")
    if c.latent_norm_eps is not None:
        positive(c, "latent_norm_eps")
    if c.model_type not in MODEL_TYPES:
        raise ValueError(
            f"ModelConfig.model_type={c.model_type!r} is not one this package builds: "
            f"{', '.join(MODEL_TYPES)}"
        )
    if c.first_k_dense_replace > c.num_hidden_layers:
        raise ValueError(
            f"ModelConfig.first_k_dense_replace={c.first_k_dense_replace} exceeds "
            f"num_hidden_layers={c.num_hidden_layers}; make them equal for a model without experts"
        )
    if c.qk_rope_head_dim % 2:
        raise ValueError(
            f"ModelConfig.qk_rope_head_dim={c.qk_rope_head_dim} must be even: rotary embedding "
            "turns pairs"
        )
    if c.numerics.kv_latent_fp8 and c.kv_lora_rank % 128:
        raise ValueError(
            f"ModelConfig.kv_lora_rank={c.kv_lora_rank} must be a multiple of 128 with "
            "numerics.kv_latent_fp8=True (blocks of 128 share a scale); switch that off or widen it"
        )


def _check_experts(c: ModelConfig) -> None:
    if not c.moe_layers:
        return
    positive_int(
        c,
        *("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"),
        *("n_group", "topk_group"),
    )
    positive_int(c, "n_shared_experts", least=0)
    if c.n_routed_experts % c.n_group:
        raise ValueError(
            f"ModelConfig.n_routed_experts={c.n_routed_experts} is not a multiple of "
            f"n_group={c.n_group}: groups are equal and contiguous"
        )
    if c.topk_group > c.n_group:
        raise ValueError(
            f"ModelConfig.topk_group={c.topk_group} exceeds n_group={c.n_group}: no more groups "
            "can be eligible than there are"
        )
    size = c.n_routed_experts // c.n_group
    if c.n_group > 1 and size < 2:
        raise ValueError(
            f"ModelConfig.n_group={c.n_group} leaves {size} expert a group; a group is scored by "
            "its best two, so it needs at least 2 (or n_group=1)"
        )
    if c.num_experts_per_tok > c.topk_group * size:
        raise ValueError(
            f"ModelConfig.num_experts_per_tok={c.num_experts_per_tok} exceeds the "
            f"{c.topk_group * size} experts that topk_group={c.topk_group} groups of {size} leave "
            "eligible"
        )


def _check_indexer(c: ModelConfig) -> None:
    fields = {n: getattr(c, n) for n in ("index_n_heads", "index_head_dim", "index_topk")}
    missing = [name for name, value in fields.items() if value is None]
    if missing and len(missing) < 3:
        raise ValueError(
            f"ModelConfig has {', '.join(n for n in fields if n not in missing)} but "
            f"{', '.join(missing)}=None: an indexer needs all three, a dense model none"
        )
    if bool(missing) == MODEL_TYPES[c.model_type]:
        raise ValueError(
            f"ModelConfig.model_type={c.model_type!r} {'needs' if missing else 'has no'} "
            f"index_n_heads, index_head_dim and index_topk; "
            "the dense type is 'deepseek_v3', the ones with an indexer 'deepseek_v32' and "
            "'glm_moe_dsa'"
        )
    if missing:
        if c.numerics.indexer_fp8 or c.numerics.indexer_hadamard or c.indexer_types is not None:
            raise ValueError(
                "ModelConfig has no indexer (index_topk=None), so numerics.indexer_fp8, "
                "numerics.indexer_hadamard and indexer_types must be off"
            )
        return
    positive_int(c, *fields, "index_topk_freq")
    positive_int(c, "index_skip_topk_offset", least=0)
    H = c.index_head_dim
    assert H is not None
    if c.qk_rope_head_dim > H:
        raise ValueError(
            f"ModelConfig.qk_rope_head_dim={c.qk_rope_head_dim} exceeds index_head_dim={H}: the "
            "indexer rotates the first qk_rope_head_dim columns of each of its heads"
        )
    if c.numerics.indexer_hadamard and H & (H - 1):
        raise ValueError(
            f"ModelConfig.index_head_dim={H} must be a power of two with "
            "numerics.indexer_hadamard=True; switch that off for other widths"
        )
    _check_schedule(c)


def _scheduled_type(c: ModelConfig, layer: int) -> IndexerType:
    distance = max(layer - c.index_skip_topk_offset + 1, 0)
    return "full" if distance % c.index_topk_freq == 0 else "shared"


def _check_schedule(c: ModelConfig) -> None:
    types = c.indexer_types
    if types is not None:
        if len(types) != c.num_hidden_layers or set(types) - {"full", "shared"}:
            raise ValueError(
                f"ModelConfig.indexer_types has {len(types)} entries {sorted(set(types))}; it "
                f"needs num_hidden_layers={c.num_hidden_layers} of 'full' or 'shared'"
            )
        rule = tuple(_scheduled_type(c, i) for i in range(c.num_hidden_layers))
        if c.index_topk_freq != 1 and rule != types:
            raise ValueError(
                f"ModelConfig.indexer_types contradicts index_topk_freq={c.index_topk_freq} with "
                f"index_skip_topk_offset={c.index_skip_topk_offset}; leave index_topk_freq=1 to "
                "let indexer_types decide"
            )
    if c.indexer_type(0) != "full":
        raise ValueError(
            "ModelConfig.indexer_types: layer 0 is 'shared' but there is no earlier layer whose "
            "keys it could reuse; make it 'full'"
        )


def _check_positions(c: ModelConfig) -> None:
    scaling = c.rope_scaling
    if scaling is not None and c.max_position_embeddings < scaling.original_max_position_embeddings:
        raise ValueError(
            f"ModelConfig.max_position_embeddings={c.max_position_embeddings} is below "
            f"rope_scaling.original_max_position_embeddings="
            f"{scaling.original_max_position_embeddings}: a stretched context cannot be shorter; "
            "set rope_scaling=None for plain rotary embedding"
        )
