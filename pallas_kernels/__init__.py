"""Ops of DeepSeek Sparse Attention as pure functions of arrays."""

from pallas_kernels.dense_attention.api import dense_attention
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.indexer_loss.api import (
    indexer_kl_dense,
    indexer_kl_dense_loss,
    indexer_kl_sparse,
)
from pallas_kernels.lightning_indexer.api import indexer_scores, lightning_indexer, select_topk
from pallas_kernels.sparse_attention.api import sparse_attention, sparse_attention_decode
from pallas_kernels.sparse_attention.pages import Fp8Pages
from pallas_kernels.types import KeyRange, Selection

__all__ = [
    "Fp8Pages",
    "KeyRange",
    "Selection",
    "UnsupportedError",
    "dense_attention",
    "indexer_kl_dense",
    "indexer_kl_dense_loss",
    "indexer_kl_sparse",
    "indexer_scores",
    "lightning_indexer",
    "select_topk",
    "sparse_attention",
    "sparse_attention_decode",
]
