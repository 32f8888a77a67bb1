"""What decoding keeps of the past: per layer and token, the latent with its rotary key, and the
indexer's key.

Everything is functional: a forward pass takes a `Cache` and returns the next one. Rows of a batch
have their own lengths. Where the indexer runs in FP8 its keys are kept in FP8 with one scale each,
so that a key is quantised once and selected by the same number ever after.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from dsa_jax.config import ModelConfig
from dsa_jax.plan import layer_plan


class LayerCache(NamedTuple):
    """One layer's past, or a stack's with a leading axis over its layers.

    Attributes:
        kv: latent (after norm) and rotary key (after rotation) of each token.
        index_k: the indexer's key of each token; None where the layer has no indexer.
        index_k_scale: what `index_k` is to be multiplied by; None unless it is FP8.
    """

    kv: Float[Array, "*L B S C+R"]
    index_k: Float[Array, "*L B S H"] | None
    index_k_scale: Float[Array, "*L B S"] | None


class Cache(NamedTuple):
    """The past of a batch.

    Attributes:
        lengths: tokens held of each row; the next token of row b has position `lengths[b]`.
        stacks: `stacks[s][u]` belongs to `model.stacks[s].blocks[u]`.
    """

    lengths: Int32[Array, " B"]
    stacks: tuple[tuple[LayerCache, ...], ...]

    @property
    def max_length(self) -> int:
        """Tokens a row can hold (S)."""
        return self.stacks[0][0].kv.shape[-2]


def init_cache(
    config: ModelConfig, batch: int, max_length: int, dtype: DTypeLike = jnp.bfloat16
) -> Cache:
    """An empty cache.

    Args:
        config: the model's.
        batch: rows B.
        max_length: tokens a row can hold, prompt and continuation together.
        dtype: of the latent and rotary key, and of unquantised indexer keys; the model's compute
            dtype. bf16 at the published widths: 1152 + 256 bytes a token and layer.

    Raises:
        ValueError: a size below 1, or longer than the positions the model knows.
    """
    for name, value in (("batch", batch), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"init_cache: {name}={value} must be at least 1")
    if max_length > config.max_position_embeddings:
        raise ValueError(
            f"init_cache: max_length={max_length} exceeds max_position_embeddings="
            f"{config.max_position_embeddings}; shorten it or raise the config's"
        )

    def layers(number: int, has_indexer: bool) -> LayerCache:
        kv = jnp.zeros((number, batch, max_length, config.latent_dim), dtype)
        if not has_indexer:
            return LayerCache(kv, None, None)
        fp8 = config.numerics.indexer_fp8
        shape = (number, batch, max_length, config.index_head_dim)
        index_k = jnp.zeros(shape, jnp.float8_e4m3fn if fp8 else dtype)
        return LayerCache(kv, index_k, jnp.ones(shape[:-1], jnp.float32) if fp8 else None)

    stacks = tuple(
        tuple(layers(stack.repeats, kind.has_indexer) for kind in stack.kinds)
        for stack in layer_plan(config)
    )
    return Cache(jnp.zeros((batch,), jnp.int32), stacks)


def check_room(cache: Cache, batch: int, queries: int) -> None:
    """Refuses tokens that do not fit.

    Lengths are data: inside `jit` they are unknown, and only the caller's own count can tell that a
    row is full. Outside, and for shapes always, this can.

    Raises:
        ValueError: another batch than the cache's, or more tokens than it has room for.
    """
    if cache.lengths.shape != (batch,):
        raise ValueError(
            f"tokens have batch {batch} but the cache was made for {cache.lengths.shape[0]} rows; "
            "make one with init_cache(config, batch, max_length)"
        )
    room = cache.max_length
    if not isinstance(cache.lengths, Tracer):
        room -= int(cache.lengths.max())
    if queries > room:
        raise ValueError(
            f"{queries} new tokens do not fit: the cache holds {cache.max_length} and has room for "
            f"{room} more in its fullest row; make it longer with init_cache(max_length=...)"
        )


def append(
    past: Float[Array, "B S *W"],
    new: Float[Array, "B T *W"],
    lengths: Int[Array, " B"],
    valid: Bool[Array, "B T"],
) -> Float[Array, "B S *W"]:
    """Writes each row's new tokens after its old ones; invalid ones are not written.

    A token beyond the end is dropped, never wrapped or clamped onto another one.
    """
    batch, queries = valid.shape
    slot = lengths[:, None] + jnp.arange(queries, dtype=lengths.dtype)
    slot = jnp.where(valid, slot, past.shape[1])
    rows = jnp.arange(batch)[:, None]
    return past.at[rows, slot].set(new.astype(past.dtype), mode="drop")
