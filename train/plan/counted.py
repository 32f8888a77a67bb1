"""Memory and communication of a step by arithmetic: to compare meshes before one is compiled.

State is exact: shapes cut as the sharding rules cut them. Temporaries and traffic follow the way
the step is written and are good to some ten per cent; whoever wants to know compiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from dsa_jax.counts import attention_matrices, param_count
from dsa_jax.expert_parallel import RAGGED, ROOM, quota_of
from dsa_jax.sharding import AXES, axes_tuple
from train.config import TrainConfig
from train.optimizer import make_optimizer
from train.plan.collectives import Traffic, sent
from train.plan.options import mesh_sizes, ways
from train.stages import Group, Stage, group_of
from train.start import param_shardings
from train.state import new_state, skeleton_of

_BF16, _FP32 = 2, 4


class Shapes(NamedTuple):
    """A run's state without a mesh: what to cut."""

    params: Mapping[str, jax.ShapeDtypeStruct]
    optimizer: list[tuple[str, jax.ShapeDtypeStruct]]


class State(NamedTuple):
    """What a run's state is, and what it takes on each device.

    Attributes:
        parameters: how many.
        trainable: of them, with a gradient.
        indexer: of them, in the indexers.
        parameter_bytes: on a device.
        optimizer_bytes: on a device.
        gradient_bytes: on a device, all gradients once in fp32.
        late_bytes: of them, those that a backward pass has not yet in fp32 when memory is
            fullest: of stacks of one layer, which no loop collects, and of the embedding.
    """

    parameters: int
    trainable: int
    indexer: int
    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    late_bytes: int = 0


def shapes_of(config: TrainConfig) -> Shapes:
    """The arrays of a run's state; allocates nothing."""
    params = skeleton_of(config).shapes
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda p: new_state(config, p, optimizer), params)
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    return Shapes(params, [(str(getattr(path[-1], "key", "")), leaf) for path, leaf in leaves])


def state(config: TrainConfig, shapes: Shapes) -> State:
    """Counts a run's state on its mesh.

    Raises:
        ValueError: a mesh that does not divide the parameters.
    """
    mesh: Any = AbstractMesh(config.mesh.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    where = param_shardings(shapes.params, mesh)

    def held(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None, itemsize: int) -> int:
        cut = leaf.shape if sharding is None or not leaf.ndim else sharding.shard_shape(leaf.shape)
        return math.prod(cut) * itemsize

    learns = [path for path in shapes.params if group_of(path) in config.trainable]
    gradients = {path: held(shapes.params[path], where[path], _FP32) for path in learns}
    return State(
        parameters=sum(leaf.size for leaf in shapes.params.values()),
        trainable=sum(shapes.params[path].size for path in learns),
        indexer=sum(
            leaf.size for path, leaf in shapes.params.items() if group_of(path) is Group.INDEXER
        ),
        parameter_bytes=sum(
            held(leaf, where[path], leaf.dtype.itemsize) for path, leaf in shapes.params.items()
        ),
        # A moment's path ends in the key of its parameter, and it lives where that does.
        optimizer_bytes=sum(
            held(leaf, where.get(path), leaf.dtype.itemsize) for path, leaf in shapes.optimizer
        ),
        gradient_bytes=sum(gradients.values()),
        late_bytes=sum(
            size
            for path, size in gradients.items()
            if path.startswith("embed")
            or (path.startswith("stacks/") and shapes.params[path].shape[0] == 1)
        ),
    )


def tokens_at_once(config: TrainConfig) -> int:
    """Tokens that a device works on at a time: of one micro-batch, its share."""
    assert config.batch_size is not None
    assert config.sequence_length is not None
    rows = config.batch_size // config.micro_batches // ways(config.mesh, 0)
    return rows * config.sequence_length // ways(config.mesh, 1)


def temporaries(config: TrainConfig, held: State) -> dict[str, int]:
    """Bytes of a device beside its state at the fullest moment, by what they are.

    That is the backward pass of a layer's experts, while what its attention keeps for its own is
    there already; in warm-up, the forward pass of the one or the other. The multiples below are
    how many arrays of a kind are alive then, as compiled programs show.

    Args:
        config: resolved, its mesh written out.
        held: its state.
    """
    c, t = config.model, tokens_at_once(config)
    backward = config.stage is not Stage.WARMUP
    attention, experts = _attention(config, t), _experts(config, t)
    if not backward:
        attention, experts = (attention, 0) if attention > experts else (0, experts)
    # Of every layer its input in fp32, or with less recomputation some multiple of that.
    kept = {"none": 8, "dots": 4}.get(config.remat, 1) if backward else 1 / c.num_hidden_layers
    hidden = t * c.hidden_size * _FP32
    weights = (_layer_weights(config) + _expert_weights(config)) / mesh_sizes(config.mesh)["tensor"]
    once = held.gradient_bytes - held.late_bytes
    return {
        # Beside the sum so far stand those of the micro-batch at work.
        "gradients": once + (held.gradient_bytes if config.micro_batches > 1 else 0),
        "layers' inputs": int(kept * c.num_hidden_layers * hidden),
        "one layer's residual sums": int(_HIDDEN[backward] * hidden),
        "one layer's attention": attention,
        "sparse attention's workspace": _workspace(config, t),
        "one layer's experts": experts,
        "one layer's weights": int(_BF16 * weights),
    }


# Arrays of the residual sum's size, in fp32, that a layer's pass holds: forward alone, backward.
_HIDDEN = {False: 2.5, True: 4.5}
# Rows of dKV that the backward of sparse attention adds up at a time.
_ADDED_ROWS = 2_433_024


def _attention(config: TrainConfig, t: int) -> int:
    """What a layer's attention holds for t queries: queries, keys and values by head, results."""
    c, stage = config.model, config.stage
    N = c.num_attention_heads // mesh_sizes(config.mesh)["tensor"]
    qk, V, row = c.qk_head_dim, c.v_head_dim, c.latent_dim
    if stage.attention == "sparse":
        # Queries and their gradient, the result in the latent space, two of a value's width.
        return t * N * (2 * row + c.kv_lora_rank + 2 * V) * _BF16
    keys = t * ways(config.mesh, 1)  # of a whole sequence
    held = t * qk + keys * (qk + V)
    if stage is not Stage.WARMUP:
        return (held + t * V) * N * _BF16
    # Keys and values as their projection leaves them, and the gradient of the indexer's queries.
    indexer = t * (c.index_n_heads or 0) * (c.index_head_dim or 0)
    return ((held + keys * (c.qk_nope_head_dim + V)) * N + indexer) * _BF16


def _workspace(config: TrainConfig, t: int) -> int:
    """Rows of dKV, one for every query and key it selects."""
    c = config.model
    if config.stage.attention != "sparse":
        return 0
    return min(t * (c.index_topk or 0), _ADDED_ROWS) * c.latent_dim * _BF16


def _experts(config: TrainConfig, t: int) -> int:
    """Copies of tokens for their experts, and the experts' activations."""
    c = config.model
    if not c.moe_layers:
        return 0
    backward = config.stage is not Stage.WARMUP
    D, F = c.hidden_size, c.moe_intermediate_size // mesh_sizes(config.mesh)["tensor"]
    rows = t * c.num_experts_per_tok
    if _dealt(config) > 1:  # they travel, and arrive where there is room for more of them
        return int(ROOM * rows) * (5 if backward else 3) * (D + F) * _BF16
    return rows * ((3 * D + 2 * F) if backward else (D + 3 * F)) * _BF16


def traffic(config: TrainConfig, per_host: int = 8) -> list[Traffic]:
    """Collectives that the step needs.

    Weights are gathered for each layer's forward pass, once more where it is recomputed, and their
    gradients summed and cut; tokens travel to their experts and back; keys of a cut sequence are
    gathered; copies of the model sum their gradients once a step.
    """
    c, t, sizes = config.model, tokens_at_once(config), mesh_sizes(config.mesh)
    rules = config.rules
    backward = config.stage is not Stage.WARMUP
    forwards = 2 if backward and config.remat in ("full", "selection") else 1
    layers, moe, micro = c.num_hidden_layers, len(c.moe_layers), config.micro_batches
    routed = moe * _expert_weights(config) / sizes["tensor"]
    rest = (param_count(c).main - moe * _all_experts(config)) / sizes["tensor"]
    dealt, copies = _dealt(config), t * c.num_experts_per_tok
    if dealt > 1 and not RAGGED:  # a full quota to each device
        copies = dealt * quota_of(copies, dealt)
    copies *= c.hidden_size
    keys = t * ways(config.mesh, 1) * (c.latent_dim + (c.index_head_dim or 0))
    heads = t * c.hidden_size
    wanted = [
        ("all-gather", rules.D, micro * forwards, _BF16 * rest),
        ("all-gather", rules.X, micro * forwards, _BF16 * routed),
        # Out and back; in the backward pass out once more, and gradients both ways.
        ("all-to-all", rules.E, (5 if backward else 2) * moe * micro, _BF16 * copies),
        ("all-gather", rules.T, layers * micro * forwards, _BF16 * keys),
        ("all-reduce", rules.N, 2 * layers * micro * (forwards + backward), _BF16 * heads),
    ]
    if backward:
        parts = math.prod(n for axis, n in sizes.items() if axis not in ("data", "tensor"))
        wanted += [
            ("reduce-scatter", rules.D, micro, _BF16 * rest),
            ("reduce-scatter", rules.X, micro, _BF16 * routed),
            ("reduce-scatter", rules.T, layers * micro, _FP32 * keys),
            ("all-reduce", "data", 1, _FP32 * param_count(c).main / parts / sizes["tensor"]),
        ]
    found = [_traffic(op, axes, sizes, per_host, *rest) for op, axes, *rest in wanted]
    return sorted((one for one in found if one is not None), key=lambda one: -one.bytes_sent)


def _traffic(
    op: str, over: Any, sizes: Mapping[str, int], per_host: int, calls: int, size: float
) -> Traffic | None:
    """So many calls over some axes, `size` being the larger side of one call on one device."""
    axes = tuple(axis for axis in AXES if axis in axes_tuple(over) and sizes[axis] > 1)
    n = math.prod(sizes[axis] for axis in axes)
    if n < 2 or not size:
        return None
    operand = size / n if op == "all-gather" else size
    neighbours = _neighbours(axes, sizes, per_host)
    return Traffic(op, axes, True, n, neighbours, calls, calls * sent(op, n, operand))


def _neighbours(axes: tuple[str, ...], sizes: Mapping[str, int], per_host: int) -> int:
    """How many members of a group over `axes` share a host."""
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    group = ids[tuple(slice(None) if axis in axes else 0 for axis in sizes)]
    return int(np.unique(group.reshape(-1) // per_host, return_counts=True)[1].max())


def _layer_weights(config: TrainConfig) -> int:
    """Of the widest layer, the routed experts left out."""
    c = config.model
    dense = c.intermediate_size if len(c.moe_layers) < c.num_hidden_layers else 0
    shared = c.moe_intermediate_size * c.n_shared_experts
    return sum(a * b for a, b in attention_matrices(c)) + 3 * c.hidden_size * max(dense, shared)


def _all_experts(config: TrainConfig) -> int:
    """Weights of one layer's routed experts."""
    c = config.model
    return c.n_routed_experts * 3 * c.hidden_size * c.moe_intermediate_size


def _expert_weights(config: TrainConfig) -> float:
    """Of one layer's routed experts, the weights that a device multiplies with, unless `tensor`
    cuts them."""
    return _all_experts(config) / _dealt(config) if config.model.moe_layers else 0.0


def _dealt(config: TrainConfig) -> int:
    """Over how many devices the routed experts are dealt out."""
    sizes = mesh_sizes(config.mesh)
    return math.prod(sizes[axis] for axis in axes_tuple(config.rules.E))
