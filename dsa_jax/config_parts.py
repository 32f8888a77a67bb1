"""Parts of `dsa_jax.config.ModelConfig`: YaRN, FP8 weights, roundings; and checks of fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ScaleFormat = Literal["ue8m0", "float"]


def positive(obj: Any, *names: str) -> None:
    """Raises ValueError, with the field's name, unless each is a positive number."""
    for name in names:
        value = getattr(obj, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{type(obj).__name__}.{name}={value!r} must be a positive number")


def positive_int(obj: Any, *names: str, least: int = 1) -> None:
    """Raises ValueError, with the field's name, unless each is an integer of at least `least`."""
    for name in names:
        value = getattr(obj, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{type(obj).__name__}.{name}={value!r} must be an integer >= {least}")


def one_of(obj: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError, with the field's name, unless its value is one of `allowed`."""
    if getattr(obj, name) not in allowed:
        raise ValueError(f"{type(obj).__name__}.{name}={getattr(obj, name)!r} is not in {allowed}")


@dataclass(frozen=True)
class Yarn:
    """Rotary frequencies stretched to a longer context (YaRN), as in `rope_scaling`."""

    # How many times longer the context became.
    factor: float
    # Context length before the stretch, tokens.
    original_max_position_embeddings: int
    # Frequencies that turn more often than this over the original context stay as they are.
    beta_fast: float = 32.0
    # Frequencies that turn less often than this are divided by `factor`.
    beta_slow: float = 1.0
    # Numerator of the cos/sin magnitude rule.
    mscale: float = 1.0
    # Its denominator; squared, it also multiplies the softmax scale. 0 switches both off.
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        if self.factor < 1:
            raise ValueError(
                f"Yarn.factor={self.factor} shrinks the context; it must be >= 1. "
                "Without scaling set ModelConfig.rope_scaling=None"
            )
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"Yarn.beta_fast={self.beta_fast} must exceed Yarn.beta_slow={self.beta_slow}"
            )


@dataclass(frozen=True)
class Fp8Weights:
    """How the checkpoint stores its FP8 (e4m3) weights, as in `quantization_config`."""

    # One scale per block of this many output and input columns.
    weight_block_size: tuple[int, int] = (128, 128)
    # "ue8m0": scales are powers of two; "float": any fp32 number.
    scale_format: ScaleFormat = "float"

    def __post_init__(self) -> None:
        block = tuple(self.weight_block_size)
        if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
            raise ValueError(
                f"Fp8Weights.weight_block_size={self.weight_block_size} must be two positive "
                "integers, such as (128, 128)"
            )
        one_of(self, "scale_format", ("ue8m0", "float"))

    @property
    def tile(self) -> tuple[int, int]:
        """The block of an `[in, out]` weight; the checkpoint's are `[out, in]`."""
        return self.weight_block_size[1], self.weight_block_size[0]


@dataclass(frozen=True)
class Numerics:
    """Which roundings of the reference are reproduced.

    All off is plain arithmetic in the compute dtype. `Numerics.deepseek()` is what the FP8
    checkpoints were served with; `ModelConfig.from_hf` takes it where `quantization_config` says
    FP8. Rotating or quantising never changes a shape or a parameter.
    """

    # Quantise the indexer's queries and keys to e4m3, one scale per head and token.
    indexer_fp8: bool = False
    # Rotate the indexer's queries and keys by a Hadamard matrix. Exact in real arithmetic: it
    # spreads outliers before the quantisation, so it is of use with `indexer_fp8` only.
    indexer_hadamard: bool = False
    # Let the KL loss see the quantised indexer too, straight-through. Off: selection sees the
    # quantised values, the loss the smooth ones.
    indexer_loss_fp8: bool = False
    # Round the latent to e4m3 and back, in blocks of 128, before anything reads it.
    kv_latent_fp8: bool = False
    # Format of the scales of all activations.
    scale_format: ScaleFormat = "ue8m0"
    # Round the residual sum to the compute dtype before the norm reads it (transformers does;
    # DeepSeek's fused add-norm reads the fp32 sum). Halves the bytes kept per layer boundary.
    round_residual: bool = False
    # The four below are transformers' too, and change nothing in fp32.
    # Round the normalised value before the norm's weight multiplies it.
    round_norm: bool = False
    # Round cosine and sine, and every product with them.
    round_rotation: bool = False
    # Round silu(gate) before `up` multiplies it.
    round_swiglu: bool = False
    # Round the routed experts' sum before the shared expert is added.
    round_experts: bool = False
    # Added to the sum that the chosen experts' weights are divided by (transformers: 1e-20). 0 is
    # DeepSeek's own, which divides 0 by 0 where all chosen affinities underflow.
    gate_epsilon: float = 0.0

    def __post_init__(self) -> None:
        one_of(self, "scale_format", ("ue8m0", "float"))
        if not 0 <= self.gate_epsilon < 1:
            raise ValueError(
                f"Numerics.gate_epsilon={self.gate_epsilon} must be a small number: 0 as in "
                "DeepSeek's code, 1e-20 as in transformers"
            )
        if self.indexer_loss_fp8 and not self.indexer_fp8:
            raise ValueError(
                "Numerics.indexer_loss_fp8=True needs indexer_fp8=True: the loss would see a "
                "quantisation that the selection does not have"
            )

    @classmethod
    def deepseek(cls, scale_format: ScaleFormat = "ue8m0") -> Numerics:
        """The numerics of DeepSeek's own inference code since 17 November 2025."""
        return cls(
            indexer_fp8=True, indexer_hadamard=True, kv_latent_fp8=True, scale_format=scale_format
        )

    @classmethod
    def transformers(cls) -> Numerics:
        """The numerics of Hugging Face transformers: nothing in FP8, more roundings to bf16.

        Goes with `ModelConfig.latent_norm_eps=1e-6`.
        """
        return cls(
            round_residual=True,
            round_norm=True,
            round_rotation=True,
            round_swiglu=True,
            round_experts=True,
            gate_epsilon=1e-20,
        )
