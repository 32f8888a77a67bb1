"""From a dense DeepSeek-V3 checkpoint to one with indexers, where continued pretraining starts.

Indexers are made as a fresh model's are; everything else must be there, and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.formats import open_checkpoint
from convert.ours import to_ours
from convert.rules import Entry, entries, hf_scale
from convert.safetensors import ConvertError
from convert.source import DType, Source, Tensor, has_mtp
from convert.weights import E4M3, F32
from dsa_jax.config import ModelConfig, Numerics
from dsa_jax.folder import refuse_existing
from dsa_jax.indexer import Indexer
from dsa_jax.layer_tree import KeyPath, flatten


def add_indexer(
    source: str | Path,
    destination: str | Path,
    *,
    index_n_heads: int = 64,
    index_head_dim: int = 128,
    index_topk: int = 2048,
    seed: int = 0,
    dtype: DType = "keep",
    mtp: bool = True,
) -> ModelConfig:
    """Gives a dense checkpoint an indexer in every layer; the result is one of this package.

    Args:
        source: DeepSeek-V3.1-Terminus or another checkpoint of that kind, in any format.
        destination: the folder to make; refused if anything is there.
        index_n_heads: heads of each indexer, I.
        index_head_dim: their width, H.
        index_topk: keys that a query attends to.
        seed: of the indexers' weights.
        dtype: of all weights; "keep" leaves the source's and gives the indexers the same.
        mtp: whether to carry the multi-token-prediction layers, where there are any.

    Returns:
        The config of what was written.

    Raises:
        FileNotFoundError: nothing at `source`.
        FileExistsError: something at `destination`.
        ConvertError: a source that has indexers already, or lacks a tensor that is none of theirs.
    """
    refuse_existing(destination)
    _, base = open_checkpoint(source)
    made = WithIndexer(base, (index_n_heads, index_head_dim, index_topk), seed)
    return to_ours(made, destination, dtype=dtype, mtp=mtp)


class WithIndexer:
    """A dense source, and fresh indexers."""

    def __init__(self, base: Source, index: tuple[int, int, int], seed: int):
        if base.config.has_indexer or base.config.model_type != "deepseek_v3":
            raise ConvertError(
                f"{base} is a {base.config.model_type} with index_topk={base.config.index_topk}; "
                "an indexer can be added to a dense deepseek_v3"
            )
        self._base = base
        self._seed = seed
        self.config = _with_indexer(base, index)
        self.companions = base.companions
        like = "model.layers.0.self_attn.o_proj.weight"
        if like not in base.tensors:
            raise ConvertError(
                f"{base}: missing tensor {like}, whose dtype the indexers would have"
            )
        self._dtype = base.tensors[like].dtype
        self._made: dict[str, tuple[Entry, bool]] = {}
        tensors = dict(base.tensors)
        for entry in entries(self.config):
            if "indexer" not in entry.path:
                continue
            (name,) = entry.names
            tensors[name] = Tensor(self._dtype_of(entry), entry.their_shape)
            self._made[name] = entry, False
            if tensors[name].dtype == E4M3:
                assert self.config.fp8_weights is not None
                shape = entry.their_scale_shape(self.config.fp8_weights)
                tensors[hf_scale(name)] = Tensor(F32, shape)
                self._made[hf_scale(name)] = entry, True
        self.tensors: Mapping[str, Tensor] = tensors

    def __str__(self) -> str:
        return str(self._base)

    def _dtype_of(self, entry: Entry) -> np.dtype:
        if entry.kind == "fp32":
            return F32
        if entry.kind == "float" and self._dtype == E4M3:
            return np.dtype(jnp.bfloat16)
        return self._dtype

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"the new tensor {name}" if name in self._made else self._base.where(name)

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of a tensor."""
        if name not in self._made:
            return self._base.read(name, rows)
        entry, is_scale = self._made[name]
        at = entry.path.index("indexer")
        layer = int(name.split(".")[2])
        path = (entry.scale_path if is_scale else entry.path)[at + 1 :]
        value = _fresh(self.config, self._dtype, self._seed, layer)[path]
        return entry.part(value.astype(self.tensors[name].dtype), 0)[rows]


@lru_cache(maxsize=1)
def _maker(config: ModelConfig, dtype: np.dtype) -> Callable[[jax.Array], Indexer]:
    """Compiled once for all layers."""

    def make(key: jax.Array) -> Indexer:
        rngs = nnx.Rngs(params=key)
        return Indexer(config, rngs=rngs, dtype=jnp.float32, param_dtype=dtype)

    return jax.jit(make)


@lru_cache(maxsize=1)
def _fresh(
    config: ModelConfig, dtype: np.dtype, seed: int, layer: int
) -> dict[KeyPath, np.ndarray]:
    """The indexer of a layer, as a fresh model's is made."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        made = _maker(config, dtype)(jax.random.fold_in(jax.random.key(seed), layer))
    return {path: np.asarray(leaf) for path, leaf in flatten(made).items()}


def _with_indexer(base: Source, index: tuple[int, int, int]) -> ModelConfig:
    config, fp8 = base.config, base.config.fp8_weights
    heads, width, topk = index
    return config.replace(
        model_type="deepseek_v32",
        index_n_heads=heads,
        index_head_dim=width,
        index_topk=topk,
        numerics=config.numerics if fp8 is None else Numerics.deepseek(fp8.scale_format),
        num_nextn_predict_layers=config.num_nextn_predict_layers if has_mtp(base) else 0,
    )
