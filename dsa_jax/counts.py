"""How many parameters a config has, by arithmetic: for reports, plans and checkpoint checks."""

from __future__ import annotations

import math
from typing import NamedTuple

from dsa_jax.config import ModelConfig


class ParamCount(NamedTuple):
    """Numbers of parameters; FP8 block scales are counted apart, in `scales`.

    Attributes:
        main: the model without multi-token-prediction layers: what `Transformer` holds.
        indexer: the share of the indexers in `main`.
        active: the share of `main` that works on one token: all but the experts not chosen.
        mtp: multi-token-prediction layers, their copies of embedding and head included.
        scales: block scales of the checkpoint's FP8 weights, `mtp` included; 0 without FP8.
    """

    main: int
    indexer: int
    active: int
    mtp: int
    scales: int


def param_count(config: ModelConfig) -> ParamCount:
    """Counts a model's parameters without building it."""
    c = config
    D, vocab = c.hidden_size, c.vocab_size
    attention, indexer = attention_matrices(c), indexer_matrices(c)
    attention_size = sum(map(math.prod, attention)) + 2 * D + c.q_lora_rank + c.kv_lora_rank
    indexer_size = sum(map(math.prod, indexer))
    if c.has_indexer:
        indexer_size += c.hidden_size * (c.index_n_heads or 0) + 2 * (c.index_head_dim or 0)
    expert = [(D, c.moe_intermediate_size)] * 3
    dense = [(D, c.intermediate_size)] * 3
    shared = [(D, c.moe_intermediate_size * c.n_shared_experts)] * 3 if c.n_shared_experts else []
    router = (D + 1) * c.n_routed_experts
    expert_size, shared_size = sum(map(math.prod, expert)), sum(map(math.prod, shared))

    layers, moe, full = c.num_hidden_layers, len(c.moe_layers), len(c.indexer_layers)
    tables = vocab * D * (1 if c.tie_word_embeddings else 2)
    indexers = full * indexer_size
    fixed = tables + D + layers * attention_size + indexers
    fixed += (layers - moe) * sum(map(math.prod, dense)) + moe * (router + shared_size)
    main = fixed + moe * c.n_routed_experts * expert_size
    active = fixed + moe * c.num_experts_per_tok * expert_size
    # eh_proj and its two input norms, a whole MoE layer with an indexer, head norm, both tables.
    mtp_layer = 2 * D * D + 3 * D + 2 * vocab * D + attention_size + indexer_size
    mtp_layer += router + shared_size + c.n_routed_experts * expert_size
    mtp = c.num_nextn_predict_layers

    tiles = 0
    if c.fp8_weights is not None:
        tiles += _tiles(c, [*attention * (layers + mtp), *indexer * (full + mtp)])
        tiles += _tiles(c, dense * (layers - moe))
        tiles += (moe + mtp) * _tiles(c, [*shared, *expert * c.n_routed_experts])
    return ParamCount(main, indexers, active, mtp * mtp_layer, tiles)


def attention_matrices(c: ModelConfig) -> list[tuple[int, int]]:
    """Shapes of an attention layer's projections, `[in, out]`, the indexer's left out."""
    N, D, Q, C = c.num_attention_heads, c.hidden_size, c.q_lora_rank, c.kv_lora_rank
    up = N * (c.qk_nope_head_dim + c.v_head_dim)
    return [(D, Q), (Q, N * c.qk_head_dim), (D, c.latent_dim), (C, up), (N * c.v_head_dim, D)]


def indexer_matrices(c: ModelConfig) -> list[tuple[int, int]]:
    """Shapes of an indexer's projections that a checkpoint keeps in FP8; its head weights' is not
    one of them. Empty in a dense model."""
    if c.index_n_heads is None or c.index_head_dim is None:
        return []
    return [
        (c.q_lora_rank, c.index_n_heads * c.index_head_dim),
        (c.hidden_size, c.index_head_dim),
    ]


def _tiles(c: ModelConfig, matrices: list[tuple[int, int]]) -> int:
    assert c.fp8_weights is not None
    a, b = c.fp8_weights.tile
    return sum(-(-rows // a) * -(-columns // b) for rows, columns in matrices)
