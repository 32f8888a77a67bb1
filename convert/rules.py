"""One table of names for all directions: ours, Hugging Face's, DeepSeek's inference demo's.

A row of `RULES` is one parameter of a layer, or of the model. What it becomes in a given model, its
layers and experts counted out, is an `Entry`; `entries(config)` is the whole inventory. Shapes and
dtypes come from the model's own code, so a table that disagrees with the model cannot be built.

Published weights are `[out, in]`, ours `[in, out]`; experts are one tensor each there and one stack
`[E, in, out]` here. A weight in FP8 goes with block scales, whose names follow from its own:

    ours                    Hugging Face                 demo
    .../weight              X.weight                     X.weight
    .../scale               X.weight_scale_inv           X.scale
    .../experts/up_proj     X.weight                     X.weight
    .../experts/up_proj_scale
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsa_jax.config import Fp8Weights, ModelConfig
from dsa_jax.layer_tree import KeyPath, flatten, leaf_places, scale_path
from dsa_jax.mtp import MTP
from dsa_jax.quantization import E4M3
from dsa_jax.transformer import Transformer


class Rule(NamedTuple):
    """One parameter in three layouts; `{e}` stands for the number of an expert.

    Attributes:
        ours: path below the layer.
        hf: the name in a Hugging Face checkpoint, below the layer.
        demo: the name in DeepSeek's inference demo.
        transposed: whether ours is the transpose of theirs.
        split: the axis of their tensor that the demo cuts into one piece a file; None: every file
            has it whole. Experts are dealt out whole.
    """

    ours: str
    hf: str
    demo: str
    transposed: bool = False
    split: int | None = None


def _linear(ours: str, demo: str, split: int | None = None) -> Rule:
    return Rule(f"{ours}/weight", f"{ours.replace('/', '.')}.weight", f"{demo}.weight", True, split)


def _vector(ours: str, demo: str) -> Rule:
    return Rule(ours, ours.replace("/", "."), demo)


def _expert(name: str, demo: str) -> Rule:
    hf = f"mlp.experts.{{e}}.{name}.weight"
    return Rule(f"mlp/experts/{name}", hf, f"ffn.experts.{{e}}.{demo}.weight", True)


def _swiglu(ours: str, demo: str) -> tuple[Rule, ...]:
    return (
        _linear(f"{ours}/gate_proj", f"{demo}.w1", split=0),
        _linear(f"{ours}/up_proj", f"{demo}.w3", split=0),
        _linear(f"{ours}/down_proj", f"{demo}.w2", split=1),
    )


# Of the model, before and after the layers.
MODEL_RULES = (
    Rule("embed_tokens/weight", "model.embed_tokens.weight", "embed.weight", split=0),
    Rule("norm/weight", "model.norm.weight", "norm.weight"),
    Rule("lm_head/weight", "lm_head.weight", "head.weight", transposed=True, split=0),
)

# Below `layers/<i>/`, `model.layers.<i>.` and `layers.<i>.`.
LAYER_RULES = (
    _vector("input_layernorm/weight", "attn_norm.weight"),
    _linear("self_attn/q_a_proj", "attn.wq_a"),
    _vector("self_attn/q_a_layernorm/weight", "attn.q_norm.weight"),
    _linear("self_attn/q_b_proj", "attn.wq_b", split=0),
    _linear("self_attn/kv_a_proj_with_mqa", "attn.wkv_a"),
    _vector("self_attn/kv_a_layernorm/weight", "attn.kv_norm.weight"),
    _linear("self_attn/kv_b_proj", "attn.wkv_b", split=0),
    _linear("self_attn/o_proj", "attn.wo", split=1),
    # Every file of the demo has the whole indexer: the sum over its heads must not be cut. Its
    # wq_b shares no more than the name with the attention's.
    _linear("self_attn/indexer/wq_b", "attn.indexer.wq_b"),
    _linear("self_attn/indexer/wk", "attn.indexer.wk"),
    _vector("self_attn/indexer/k_norm/weight", "attn.indexer.k_norm.weight"),
    _vector("self_attn/indexer/k_norm/bias", "attn.indexer.k_norm.bias"),
    _linear("self_attn/indexer/weights_proj", "attn.indexer.weights_proj"),
    _vector("post_attention_layernorm/weight", "ffn_norm.weight"),
    *_swiglu("mlp", "ffn"),
    _linear("mlp/gate", "ffn.gate"),
    _vector("mlp/gate/e_score_correction_bias", "ffn.gate.bias"),
    _expert("gate_proj", "w1"),
    _expert("up_proj", "w3"),
    _expert("down_proj", "w2"),
    *_swiglu("mlp/shared_experts", "ffn.shared_experts"),
)

# Of a multi-token-prediction layer, beside the layer it contains: below `mtp/<k>/` and
# `model.layers.<L + k>.`, for a model of L layers. The demo has none.
MTP_RULES = (
    Rule("embed_tokens/weight", "embed_tokens.weight", ""),
    _vector("enorm/weight", ""),
    _vector("hnorm/weight", ""),
    _linear("eh_proj", ""),
    _vector("shared_head/norm/weight", ""),
    Rule("shared_head/head/weight", "shared_head.head.weight", "", transposed=True),
)

RULES = {
    "model": {rule.ours: rule for rule in MODEL_RULES},
    "layer": {rule.ours: rule for rule in LAYER_RULES},
    "mtp": {rule.ours: rule for rule in MTP_RULES},
}


@dataclass(frozen=True)
class Entry:
    """One of our parameters, and the tensors that hold it elsewhere.

    Attributes:
        path: of our leaf on disk.
        shape: of our leaf.
        kind: "matrix" can be in FP8, "float" follows the model's dtype, "fp32" stays fp32.
        names: of the Hugging Face tensors: one, or one for each expert.
        demo: of the demo's, likewise; empty for what the demo leaves out.
        transposed: whether ours is the transpose of theirs.
        split: see `Rule`.
    """

    path: KeyPath
    shape: tuple[int, ...]
    kind: str
    names: tuple[str, ...]
    demo: tuple[str, ...]
    transposed: bool
    split: int | None

    @property
    def stacked(self) -> bool:
        """Whether ours is a stack of their tensors."""
        return len(self.shape) == 3

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Of each of `names`."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    @property
    def scale_path(self) -> KeyPath:
        """Of our leaf of block scales."""
        return scale_path(self.path)

    def scale_shape(self, fp8: Fp8Weights) -> tuple[int, ...]:
        """Of our leaf of block scales."""
        *stack, rows, columns = self.shape
        return (*stack, -(-rows // fp8.tile[0]), -(-columns // fp8.tile[1]))

    def part(self, leaf: np.ndarray, expert: int) -> np.ndarray:
        """What is one tensor of a leaf (or of its scales), as a view in their layout."""
        found = leaf[expert] if self.stacked else leaf
        return found.T if self.transposed else found

    def their_scale_shape(self, fp8: Fp8Weights) -> tuple[int, ...]:
        """Of the block scales of each of `names`."""
        return self.scale_shape(fp8)[-1:-3:-1]

    def __str__(self) -> str:
        return "/".join(self.path)


def hf_scale(name: str) -> str:
    """The tensor with the block scales of a Hugging Face weight."""
    return f"{name}_scale_inv"


def demo_scale(name: str) -> str:
    """The tensor with the block scales of a weight in the demo's layout."""
    return name.removesuffix("weight") + "scale"


@lru_cache(maxsize=8)
def entries(config: ModelConfig) -> tuple[Entry, ...]:
    """A model's whole inventory, by layer; with multi-token-prediction layers if it has any.

    Args:
        config: `num_nextn_predict_layers=0` leaves those out.

    Raises:
        KeyError: a parameter of the model that is not in the table.
    """
    config = config.replace(fp8_weights=config.fp8_weights or Fp8Weights())

    def build() -> dict[str, Any]:
        make: dict[str, Any] = {"rngs": nnx.Rngs(0), "param_dtype": E4M3}
        model = Transformer(config, **make)
        mtp = [MTP(config, **make)] if config.num_nextn_predict_layers else []
        return {"model": model, "mtp": mtp}

    shapes = jax.eval_shape(build)
    flat = flatten(shapes["model"])
    found = []
    for place in leaf_places(flat, config):
        leaf = flat[place.memory]
        shape = leaf.shape if place.row is None else leaf.shape[1:]
        found.append((place.disk, shape, leaf.dtype))
    for k in range(config.num_nextn_predict_layers):
        flat = flatten(shapes["mtp"][0])
        found += [(("mtp", str(k), *path), leaf.shape, leaf.dtype) for path, leaf in flat.items()]
    made = [
        _entry(path, shape, dtype, config)
        for path, shape, dtype in found
        if not path[-1].endswith("scale")
    ]
    return tuple(sorted(made, key=lambda entry: _order(entry.path)))


def _entry(path: KeyPath, shape: tuple[int, ...], dtype: np.dtype, config: ModelConfig) -> Entry:
    section, below, hf, demo = _prefix(path, config)
    rule = RULES[section]["/".join(below)]
    numbers = range(shape[0]) if len(shape) == 3 else range(1)
    kind = "matrix" if dtype == E4M3 else "fp32" if dtype == jnp.float32 else "float"
    return Entry(
        path=path,
        shape=tuple(shape),
        kind=kind,
        names=tuple(hf + rule.hf.format(e=e) for e in numbers),
        demo=() if demo is None else tuple(demo + rule.demo.format(e=e) for e in numbers),
        transposed=rule.transposed,
        split=rule.split,
    )


def _prefix(path: KeyPath, config: ModelConfig) -> tuple[str, KeyPath, str, str | None]:
    """Which rules a path is under, the path below, and the other layouts' prefixes."""
    match path:
        case ("layers", i, *rest):
            return "layer", tuple(rest), f"model.layers.{i}.", f"layers.{i}."
        case ("mtp", k, *rest):
            hf = f"model.layers.{config.num_hidden_layers + int(k)}."
            if rest[0] == "block":
                return "layer", tuple(rest[1:]), hf, None
            return "mtp", tuple(rest), hf, None
    return "model", path, "", ""


def _order(path: KeyPath) -> tuple[int, int]:
    """The embedding, the layers, the final norm and the head, the extra layers."""
    if path[0] == "layers":
        return 1, int(path[1])
    places = {"embed_tokens": 0, "norm": 2, "lm_head": 3, "mtp": 4}
    return places[path[0]], 0


def tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and kind of every Hugging Face tensor; kind "scale" for block scales."""
    for entry in entries(config):
        for name in entry.names:
            yield name, entry.their_shape, entry.kind
            if config.fp8_weights is not None and entry.kind == "matrix":
                yield hf_scale(name), entry.their_scale_shape(config.fp8_weights), "scale"
