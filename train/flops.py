"""Operations of a training step, counted from the config as DeepSeek's reports count them.

A product of `[a, b]` with `[b, c]` is 2abc operations. Attention and indexer count the pairs of
query and key that they visit: every visible one (T (T + 1) / 2 of a sequence that is one document)
where attention is dense or the indexer scores, at most k a query where attention is sparse. A
token visits `num_experts_per_tok` experts and the shared one. Norms, rotations, softmax and the
optimizer are not counted.

What the model needs (`forward`, `backward`) is told apart from what is done twice to save memory
(`recomputed`): a utilisation in the sense of MFU divides the first two by the time.
"""

from __future__ import annotations

from typing import NamedTuple

from dsa_jax.config import ModelConfig
from dsa_jax.counts import attention_matrices, indexer_matrices
from train.config import TrainConfig
from train.cost import LayerShape
from train.stages import Stage


class Work(NamedTuple):
    """Operations of one part of the model on one sequence, all layers together.

    Attributes:
        name: of the part.
        kind: what runs it: a name of `train.plan.hardware.Rates`.
        forward: of the forward pass.
        backward: of the gradients that the stage takes.
        recomputed: of what the backward pass computes again.
    """

    name: str
    kind: str
    forward: float
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """All that is computed."""
        return self.forward + self.backward + self.recomputed


def layer_shape(model: ModelConfig) -> LayerShape:
    """The model's attention layer, for the costs that grow with position."""
    return LayerShape(
        heads=model.num_attention_heads,
        latent=model.kv_lora_rank,
        rotary=model.qk_rope_head_dim,
        nope=model.qk_nope_head_dim,
        value=model.v_head_dim,
        indexer_heads=model.index_n_heads or 0,
        indexer_width=model.index_head_dim or 0,
        topk=model.index_topk or 0,
    )


def visible_pairs(length: int) -> int:
    """Pairs of a query and a key it may see, in one document."""
    return length * (length + 1) // 2


def selected_pairs(length: int, topk: int) -> int:
    """Pairs of a query and a key it selects."""
    full = min(length, topk)
    return full * (full + 1) // 2 + (length - full) * topk


def step_work(config: TrainConfig) -> tuple[Work, ...]:
    """Operations on one sequence of a step, part by part.

    Args:
        config: a resolved config.
    """
    assert config.sequence_length is not None
    parts = (*_linear(config, config.sequence_length), *_attention(config, config.sequence_length))
    return tuple(part for part in parts if part.total)


def model_flop(config: TrainConfig) -> float:
    """Operations that one sequence needs, nothing counted twice: the numerator of MFU."""
    return sum(part.forward + part.backward for part in step_work(config))


def computed_flop(config: TrainConfig) -> float:
    """Operations that one sequence takes, what is recomputed included."""
    return sum(part.total for part in step_work(config))


def _linear(config: TrainConfig, length: int) -> tuple[Work, ...]:
    """Products with weights: 2 operations a weight and token, twice that for both gradients."""
    c = config.model
    layers, moe = c.num_hidden_layers, len(c.moe_layers)
    D = c.hidden_size
    dense = layers * _size(attention_matrices(c)) + (layers - moe) * 3 * D * c.intermediate_size
    dense += moe * (D * c.n_routed_experts + 3 * D * c.moe_intermediate_size * c.n_shared_experts)
    experts = moe * c.num_experts_per_tok * 3 * D * c.moe_intermediate_size
    # "dots" keeps every product with a weight; the experts' are grouped, and recomputed.
    again = config.remat in ("full", "selection")
    parts = [
        _weights("projections and MLPs", "matmul", dense, config, length, again),
        _weights("experts", "experts", experts, config, length, again or config.remat == "dots"),
    ]
    if config.stage.lm_loss:
        # A head's logits are always made again: a chunk of them is all that exists at a time.
        head = c.vocab_size * D
        parts.append(_weights("head", "matmul", head, config, length, True))
    if config.stage.needs_indexer:
        weights = _size(indexer_matrices(c)) + D * (c.index_n_heads or 0)
        once = 2.0 * length * weights * len(c.indexer_layers)
        # Its inputs are detached: a gradient of the weights alone. The selection is made again
        # under "full", and with it the projections.
        again = once if config.remat == "full" and config.stage is Stage.SPARSE else 0.0
        gradient = once if config.indexer_loss else 0.0
        parts.append(Work("indexer's projections", "matmul", once, gradient, again))
    return tuple(parts)


def _weights(
    name: str, kind: str, weights: float, config: TrainConfig, length: int, again: bool
) -> Work:
    once = 2.0 * length * weights
    if config.stage is Stage.WARMUP:
        return Work(name, kind, once)
    return Work(name, kind, once, 2 * once, once if again else 0.0)


def _attention(config: TrainConfig, length: int) -> tuple[Work, ...]:
    c, stage = config.model, config.stage
    shape, layers = layer_shape(c), c.num_hidden_layers
    visible, indexers = visible_pairs(length), len(c.indexer_layers)
    backward = stage is not Stage.WARMUP
    again = backward and config.remat != "none"
    N, row = shape.heads, shape.latent + shape.rotary
    if stage.attention == "dense":
        # Five products for three: the scores once more, and one gradient for each operand.
        width = shape.nope + shape.rotary
        gradient = 2 * N * (3 * width + 2 * shape.value)
        attention = _pairs(
            "dense attention", "dense_attention", layers * visible, shape.mha_flop,
            gradient * backward, again,
        )  # fmt: skip
    else:
        selected = selected_pairs(length, shape.topk)
        gradient = 2 * N * (3 * row + 2 * shape.latent)
        attention = _pairs(
            "sparse attention", "sparse_attention", layers * selected, shape.mqa_flop,
            gradient * backward, again,
        )  # fmt: skip
    parts = list(attention)
    if stage is Stage.SPARSE:
        once = float(indexers * visible * shape.indexer_flop)
        rescored = once if config.remat == "full" else 0.0
        kind = "indexer" if c.numerics.indexer_fp8 else "indexer_bf16"
        parts.append(Work("indexer's scores", kind, once, 0.0, rescored))
        if config.indexer_loss is not None:
            pairs, target = indexers * selected_pairs(length, shape.topk), 2 * N * row
            parts.append(_loss("KL on selected keys", "kl_sparse", pairs, target, shape))
    elif stage is Stage.WARMUP:
        target = 2 * N * (shape.nope + shape.rotary)
        parts.append(_loss("KL on all keys", "kl_dense", indexers * visible, target, shape))
    return tuple(parts)


def _pairs(
    name: str, kind: str, pairs: float, forward: float, backward: float, again: bool
) -> tuple[Work, Work]:
    return (
        Work(name, kind, pairs * forward, 0.0, pairs * forward * again),
        Work(f"{name}, gradient", f"{kind}_gradient", 0.0, pairs * backward),
    )


def _loss(name: str, kind: str, pairs: float, target: float, shape: LayerShape) -> Work:
    """The target's probabilities, the indexer's scores, and the gradients of its two operands."""
    return Work(name, kind, pairs * (target + shape.indexer_flop), pairs * 2.0 * shape.indexer_flop)


def _size(matrices: list[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in matrices)
