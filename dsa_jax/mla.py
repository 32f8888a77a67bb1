"""Multi-head latent attention in three modes that are one function of the same weights.

Every token leaves a latent c (C wide) and one rotary key (R wide); heads read keys and values from
c through `kv_b_proj`.

- *dense* (MHA): keys and values are expanded per head; queries see their whole key range.
- *sparse* (MQA): the expansion is absorbed into queries and outputs, so that all heads read one
  C + R wide key; queries see the selected keys. q_abs[n] = W_UK[n]^T q_nope[n].
- *masked* (MHA): dense scores with the selection as a mask, for short prefills.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsa_jax.cache import LayerCache, append
from dsa_jax.config import ModelConfig
from dsa_jax.indexer import Indexer, IndexerHeads, for_selection
from dsa_jax.indexer_loss import LossOptions, dense_loss, sparse_loss
from dsa_jax.linear import Linear, float_param_dtype
from dsa_jax.mesh_ops import (
    by_head,
    dense_attention,
    lightning_indexer,
    per_head,
    sparse_attention,
)
from dsa_jax.norms import RMSNorm
from dsa_jax.quantization import round_trip
from dsa_jax.rope import Rotation, rotate
from dsa_jax.sharding import Rules
from dsa_jax.spread import gathered, mesh_sizes, pinned, whole
from pallas_kernels import KeyRange, Selection

Attention = Literal["dense", "sparse", "masked"]
IndexerLoss = Literal["dense", "sparse"]
# The name under which remat policies find the selected keys.
SELECTION_NAME = "selection"


class AttentionState(NamedTuple):
    """What a layer's attention knows, for a `selector` or a `probe`.

    Attributes:
        layer: number of the layer.
        q: absorbed queries, rotated; `q . kv * scale` are the attention's scores.
        kv: latent and rotary key of every key; the first C columns are also the values.
        scale: the softmax scale.
        index_q: the indexer's queries as the selection sees them (FP8 where it runs in FP8); None,
            with the three below, in a layer without an indexer.
        index_k: its keys.
        index_w: its head weights, with all scales folded in.
        index_k_scale: what each key is to be multiplied by; None unless FP8.
        ranges: the keys each query may see.
        selection: the keys it attends to; None in a selector and where nothing was selected.
    """

    layer: Int32[Array, ""]
    q: Float[Array, "B T N C+R"]
    kv: Float[Array, "B S C+R"]
    scale: float
    index_q: Float[Array, "B T I H"] | None
    index_k: Float[Array, "B S H"] | None
    index_w: Float32[Array, "B T I"] | None
    index_k_scale: Float32[Array, "B S"] | None
    ranges: KeyRange
    selection: Selection | None


class Mode(NamedTuple):
    """What a forward pass is asked for; the same for all layers, none of it traced.

    Attributes:
        attention: which of the three modes.
        indexer_loss: the KL over all visible keys (`dense`) or the selected ones (`sparse`).
        selector: chooses keys in the indexer's place.
        probe: what it makes of each layer's state is returned.
        select: whether anything needs the selected keys.
    """

    attention: Attention
    indexer_loss: IndexerLoss | None = None
    selector: Callable[[AttentionState], Selection] | None = None
    probe: Callable[[AttentionState], Any] | None = None
    select: bool = True


class Rows(NamedTuple):
    """Where the tokens stand; the same for all layers.

    Attributes:
        turn: rotation of their positions.
        ranges: the keys each may see.
        valid: False for padding.
        lengths: tokens the cache held before; None without a cache.
    """

    turn: Rotation
    ranges: KeyRange
    valid: Bool[Array, "B T"]
    lengths: Int32[Array, " B"] | None


class AttentionOutput(NamedTuple):
    """What a layer's attention makes; what was not asked for is None."""

    out: Float[Array, "B T D"]
    cache: LayerCache | None
    selection: Selection | None
    kl: Float32[Array, ""] | None
    probe: Any


def absorb_query(
    q: Float[Array, "B T N P+R"], w_uk: Float[Array, "C N P"]
) -> Float[Array, "B T N C+R"]:
    """Moves the keys' up-projection to the query's side: q . (W_UK c) = (W_UK^T q) . c.

    In bf16 on one device the rotary part comes along through an identity beside W_UK^T, unchanged:
    as wide as the heads of all tokens are, putting it there in a pass of its own takes longer than
    the product. In fp32 it may not: a GPU rounds what it multiplies (TF32).
    """
    C, _, P = w_uk.shape
    R = q.shape[-1] - P
    if q.dtype != jnp.bfloat16 or mesh_sizes():
        nope, rope = q[..., :P], q[..., P:]
        return jnp.concatenate([jnp.einsum("BTNP,CNP->BTNC", nope, w_uk), rope], axis=-1)
    up = jnp.pad(jnp.moveaxis(w_uk, 0, -1), ((0, 0), (0, R), (0, R)))
    return by_head(q, up.at[:, P:, C:].set(jnp.eye(R, dtype=up.dtype)))


def masked_attention(
    q: Float[Array, "B T N P+R"],
    k: Float[Array, "B S N P+R"],
    v: Float[Array, "B S N V"],
    selection: Selection,
    *,
    scale: float,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B T N"]]:
    """`dense_attention` over the selected keys only, by masking: short prefills.

    Below a few thousand keys, scoring all of them costs less than gathering. Query by query in
    blocks, each recomputed in the backward pass.
    """

    @jax.checkpoint
    def one_query(row: tuple[Array, Array]) -> tuple[Array, Array]:
        q, indices = row
        mask = Selection(indices[:, None]).mask(k.shape[1])[:, 0, None]  # [B, 1, S]
        scores = scale * jnp.einsum("BND,BSND->BNS", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        # A row without keys has lse = -inf and output 0.
        p = jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
        out = jnp.einsum("BNS,BSNV->BNV", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype), lse

    rows = (jnp.moveaxis(q, 1, 0), jnp.moveaxis(selection.indices, 1, 0))
    out, lse = jax.lax.map(one_query, rows, batch_size=64)
    return jnp.moveaxis(out, 0, 1), jnp.moveaxis(lse, 0, 1)


class MLA(nnx.Module):
    """Projections of the attention, and its indexer where the layer has one."""

    def __init__(
        self,
        config: ModelConfig,
        has_indexer: bool,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rules: Rules | None = None,
    ):
        N, D, C = config.num_attention_heads, config.hidden_size, config.kv_lora_rank

        def linear(in_width: int, out_width: int) -> Linear:
            return Linear(
                in_width,
                out_width,
                rngs=rngs,
                std=config.initializer_range,
                dtype=dtype,
                param_dtype=param_dtype,
                fp8=config.fp8_weights,
            )

        def norm(width: int) -> RMSNorm:
            weights = float_param_dtype(param_dtype)
            return RMSNorm(
                width,
                eps=config.latent_norm_eps or config.rms_norm_eps,
                dtype=dtype,
                param_dtype=weights,
                round_first=config.numerics.round_norm,
            )

        self.q_a_proj = linear(D, config.q_lora_rank)
        self.q_a_layernorm = norm(config.q_lora_rank)
        self.q_b_proj = linear(config.q_lora_rank, N * config.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(D, config.latent_dim)
        self.kv_a_layernorm = norm(C)
        # Per head first P columns of keys (W_UK), then V of values (W_UV).
        self.kv_b_proj = linear(C, N * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = linear(N * config.v_head_dim, D)
        self.indexer = (
            Indexer(config, rngs=nnx.Rngs(rngs.indexer()), dtype=dtype, param_dtype=param_dtype)
            if has_indexer
            else None
        )
        self.config = config
        self.rules = rules or Rules()
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        mode: Mode,
        layer: Int32[Array, ""],
        cache: LayerCache | None = None,
        shared: Selection | None = None,
    ) -> AttentionOutput:
        """Attends.

        Args:
            x: normalised input.
            rows: where the tokens stand.
            mode: what is asked for.
            layer: number of this layer, for selectors and probes.
            cache: this layer's past; keys are then the cache's S, else the T tokens.
            shared: the selection of the full layer before, which a layer without an indexer reuses.
        """
        c = self.config
        q_latent = pinned(self.q_a_layernorm(self.q_a_proj(x)), self.rules, "B T _")
        q = pinned(self._queries(q_latent, rows.turn), self.rules, "B T N _")
        kv = pinned(self._latent_keys(x, rows.turn), self.rules, "B T _")
        tokens = jax.lax.stop_gradient((x, q_latent, rows.turn))
        index = None
        if self.indexer is not None and (mode.select or cache is not None):
            # No gradient goes through a selection, so none is prepared.
            indexer = gathered(self.indexer, self.rules, self.dtype, "indexer/")
            index = for_selection(jax.lax.stop_gradient(indexer)(*tokens), c.numerics)
        if cache is not None:
            cache = _extend(cache, kv, index, rows)
            kv = cache.kv
            if index is not None:
                index = index._replace(k=cache.index_k, k_scale=cache.index_k_scale)

        up = gathered(self.kv_b_proj, self.rules, self.dtype, "self_attn/kv_b_proj/")
        w_uk, w_uv = self._up_projections(up)
        q_abs = absorb_query(q, w_uk)  # dead code, and so free, where nothing below reads it
        state = _state(layer, q_abs, kv, c.softmax_scale, index, rows.ranges)
        selection = self._select(state, index, mode, shared) if mode.select else None
        if mode.attention == "sparse":
            assert selection is not None
            latent, lse = sparse_attention(
                q_abs, kv, selection,
                value_width=c.kv_lora_rank, scale=c.softmax_scale, rules=self.rules,
            )  # fmt: skip
            out = by_head(latent, jnp.moveaxis(w_uv, 0, 1))
        elif mode.attention == "dense":
            out, lse = dense_attention(
                q, kv, up, rows.ranges, scale=c.softmax_scale, rules=self.rules
            )
        else:
            assert selection is not None
            k, v = per_head(up, kv, q)
            out, lse = masked_attention(q, k, v, selection, scale=c.softmax_scale)

        kl = None
        if mode.indexer_loss == "dense":
            kl = self._loss(dense_loss, tokens, (q, kv, up, lse), rows.ranges)
        elif mode.indexer_loss == "sparse":
            kl = self._loss(sparse_loss, tokens, (q_abs, kv, lse), rows.ranges, selection)
        probe = None
        if mode.probe is not None:
            probe = mode.probe(state._replace(selection=selection))
        out = pinned(out, self.rules, "B T N _").reshape(*out.shape[:2], -1)
        out = self.o_proj(out)
        return AttentionOutput(out, cache, selection, kl, probe)

    def _queries(self, q_latent: Array, turn: Rotation) -> Float[Array, "B T N P+R"]:
        c = self.config
        q = self.q_b_proj(q_latent)
        q = q.reshape(*q.shape[:-1], c.num_attention_heads, c.qk_head_dim)
        nope, rope = q[..., : c.qk_nope_head_dim], q[..., c.qk_nope_head_dim :]
        return jnp.concatenate([nope, rotate(rope, turn, interleaved=True)], axis=-1)

    def _latent_keys(self, x: Array, turn: Rotation) -> Float[Array, "B T C+R"]:
        """Latent (normed) and rotary key (not normed) side by side: what a cache keeps."""
        c = self.config
        kv = self.kv_a_proj_with_mqa(x)
        latent, rope = kv[..., : c.kv_lora_rank], kv[..., c.kv_lora_rank :]
        latent = self.kv_a_layernorm(latent)
        if c.numerics.kv_latent_fp8:
            # The rotary key stays as it is. Prefill reads the rounded latent too, not only decode.
            latent = round_trip(latent, 128, c.numerics.scale_format)
        return jnp.concatenate([latent, rotate(rope, turn, interleaved=True)], axis=-1)

    def _up_projections(self, up: Linear) -> tuple[Float[Array, "C N P"], Float[Array, "C N V"]]:
        """W_UK and W_UV: with FP8 weights the absorbed modes read them in the compute dtype.

        Args:
            up: `kv_b_proj`, whole, which FP8 weights are read from.
        """
        c = self.config
        w = (self.kv_b_proj if up.fp8 is None else up).dequantized()
        w = w.reshape(c.kv_lora_rank, c.num_attention_heads, -1)
        # Each gathered by itself: a gradient is cut as it is summed only where a product made it.
        w_uk = whole(w[..., : c.qk_nope_head_dim], self.rules, "C N _")
        return w_uk, whole(w[..., c.qk_nope_head_dim :], self.rules, "C N _")

    def _select(
        self,
        state: AttentionState,
        index: IndexerHeads | None,
        mode: Mode,
        shared: Selection | None,
    ) -> Selection:
        if shared is not None and self.indexer is None:
            return shared
        if mode.selector is not None:
            selection = mode.selector(state)
        else:
            topk = self.config.index_topk
            assert index is not None
            assert topk is not None
            selection = lightning_indexer(index, state.ranges, topk=topk, rules=self.rules)
        indices = jax.lax.stop_gradient(selection.indices)
        return Selection(checkpoint_name(indices, SELECTION_NAME))

    def _loss(self, loss: Callable, tokens: Any, target: Any, *selected: Any) -> Array:
        """The layer's KL; 0 in a layer that has no indexer to teach."""
        if self.indexer is None:
            return jnp.float32(0)
        c = self.config
        gather = functools.partial(gathered, rules=self.rules, dtype=self.dtype, within="indexer/")
        options = LossOptions(c.numerics, c.softmax_scale, self.rules, gather)
        return loss(self.indexer, tokens, target, *selected, options)


def _extend(cache: LayerCache, kv: Array, index: IndexerHeads | None, rows: Rows) -> LayerCache:
    lengths, valid = rows.lengths, rows.valid
    assert lengths is not None
    new = LayerCache(kv, None, None)
    if index is not None:
        new = LayerCache(kv, index.k, index.k_scale)
    return jax.tree.map(lambda past, now: append(past, now, lengths, valid), cache, new)


def _state(
    layer: Array,
    q: Array,
    kv: Array,
    scale: float,
    index: IndexerHeads | None,
    ranges: KeyRange,
) -> AttentionState:
    """Detached: selectors and probes look, they do not teach."""
    q, kv, index = jax.lax.stop_gradient((q, kv, index))
    return AttentionState(
        layer=layer,
        q=q,
        kv=kv,
        scale=scale,
        index_q=None if index is None else index.q,
        index_k=None if index is None else index.k,
        index_w=None if index is None else index.w,
        index_k_scale=None if index is None else index.k_scale,
        ranges=ranges,
        selection=None,
    )
