"""One optimizer step: losses and gradients summed over micro-batches, then the update.

Everything is normalised by counts of the whole batch, taken before the first micro-batch, so value
and gradient do not depend on how the batch is cut, packed or spread over devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from train import losses
from train.config import TrainConfig
from train.data import Batch
from train.optimizer import branches, schedule
from train.stages import Group, group_of, split
from train.state import Params, Skeleton, TrainState

StepMetrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_step(
    config: TrainConfig, skeleton: Skeleton, optimizer: optax.GradientTransformation
) -> Step:
    """The stage's step as a pure function, to be jitted with the state donated.

    Args:
        config: a resolved config.
        skeleton: of the run's model.
        optimizer: `make_optimizer(config)`.

    Returns:
        `(state, batch) -> (state, metrics)`. Metrics are scalars, or vectors over layers.
    """
    speed = config.bias_update_speed or 0.0

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        trainable, frozen = split(state.params, config.trainable)
        sums, gradients = gradient(config, skeleton, trainable, frozen, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
        params = {**state.params, **optax.apply_updates(trainable, updates)}  # pyright: ignore
        load = sums.pop("router_load", None)
        if speed and load is not None:
            params |= balanced(params, load, speed)
        metrics = {**sums, **_gradient_metrics(config, gradients, state.step)}
        metrics |= _load_metrics(params, load)
        finite = [jnp.isfinite(metrics["loss"])]
        finite += [jnp.isfinite(v) for k, v in metrics.items() if k.startswith("gradient_norm")]
        ok = state.ok & jnp.all(jnp.stack(finite))
        new = TrainState(state.step + 1, params, opt_state, ok)
        # A step that went wrong changes nothing: the state stays the one that explains it.
        kept = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)
        return kept._replace(ok=ok), {**metrics, "ok": ok}

    return step


def gradient(
    config: TrainConfig, skeleton: Skeleton, trainable: Params, frozen: Params, batch: Batch
) -> tuple[StepMetrics, Params]:
    """Loss terms and gradient of a whole batch, one micro-batch after the other.

    Only `trainable` is differentiated: in warm-up that is the indexers, whose gradient is complete
    when their layer's forward ends, so neither a backward pass of the main model nor its
    activations exist.

    Args:
        config: a resolved config.
        skeleton: of the run's model.
        trainable: parameters to differentiate.
        frozen: the others.
        batch: arrays `[B, T]`.

    Returns:
        `loss`, its parts and counts; the gradient, by path, in fp32.
    """
    rows = losses.valid_rows(batch["segment_ids"])
    targets = losses.valid_targets(batch["targets"])
    part = lambda p, micro: micro_loss(config, skeleton, p, frozen, micro, rows, targets)  # noqa: E731

    def accumulate(carry: Any, micro: Batch) -> tuple[Any, None]:
        (_, sums), gradients = jax.value_and_grad(part, has_aux=True)(trainable, micro)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (sums, gradients)), None

    cut = {name: micro_batches(x, config.micro_batches) for name, x in batch.items()}
    first = jax.tree.map(lambda x: x[0], cut)
    shapes = jax.eval_shape(lambda: part(trainable, first)[1])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (shapes, trainable))
    (sums, gradients), _ = jax.lax.scan(accumulate, zeros, cut)
    return {**sums, "valid_rows": rows, "valid_targets": targets}, gradients


def micro_batches(x: Float[Array, "B T"], count: int) -> Float[Array, "count b T"]:
    """Cuts a batch into `count` parts of rows.

    Part j takes every count-th row, so that a batch spread over devices stays where it is.
    """
    return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)


def micro_loss(
    config: TrainConfig,
    skeleton: Skeleton,
    trainable: Params,
    frozen: Params,
    micro: Batch,
    rows: Float[Array, ""],
    targets: Float[Array, ""],
) -> tuple[Float[Array, ""], StepMetrics]:
    """One micro-batch's share of the batch's loss.

    Args:
        config: a resolved config.
        skeleton: of the run's model.
        trainable: parameters to differentiate.
        frozen: the others.
        micro: arrays `[b, T]`.
        rows: valid query rows of the whole batch.
        targets: valid targets of the whole batch.

    Returns:
        The share, and its parts: shares of `loss`, `lm_loss`, `kl`, `kl_layers`, and the experts'
        token counts `router_load`.
    """
    stage = config.stage
    model = skeleton.model({**frozen, **trainable})
    out = model(
        micro["tokens"],
        positions=micro["positions"],
        segment_ids=micro["segment_ids"],
        attention=stage.attention,
        indexer_loss=config.indexer_loss,
    )
    loss, sums = jnp.float32(0), {}
    if stage.lm_loss:
        total = losses.cross_entropy(model, out.hidden, micro["targets"], config.loss_chunk)
        sums["lm_loss"] = total / jnp.maximum(targets, 1)
        loss += sums["lm_loss"]
    if out.kl is not None:
        here = losses.valid_rows(micro["segment_ids"])
        sums["kl_layers"] = losses.kl_sum(out.kl, here) / jnp.maximum(rows, 1)
        # Layers that share another layer's choice have no indexer and no KL of their own.
        sums["kl"] = jnp.sum(sums["kl_layers"]) / len(config.model.indexer_layers)
        loss += config.kl_coefficient * sums["kl"]
    if out.router_load is not None:
        sums["router_load"] = out.router_load
    return loss, {**sums, "loss": loss}


def balanced(params: Params, load: Float[Array, "layers E"], speed: float) -> Params:
    """The routers' correction biases after one step of DeepSeek-V3's balancing.

    b_e <- b_e + speed * sign(mean load - load_e): an expert with more tokens than the mean becomes
    less attractive by a fixed amount, one with fewer more so. The bias only chooses experts, it
    never weighs them, so no gradient is involved.

    Args:
        params: all parameters.
        load: tokens routed to each expert by the whole batch.
        speed: the amount.
    """
    move = speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    biases = {p: b for p, b in params.items() if group_of(p) is Group.BALANCE}
    layers = sum(bias.size for bias in biases.values()) // load.shape[-1]
    if layers != load.shape[0]:
        raise ValueError(f"router_load has {load.shape[0]} layers, the biases {layers}")
    moved, start = {}, 0
    for path, bias in biases.items():
        stop = start + bias.size // load.shape[-1]
        moved[path] = bias + move[start:stop].reshape(bias.shape).astype(bias.dtype)
        start = stop
    return moved


def _gradient_metrics(config: TrainConfig, gradients: Params, step: Array) -> StepMetrics:
    """Norm before the clip and learning rate, per branch."""
    metrics = {}
    for name, branch in branches(config).items():
        mine, _ = split(gradients, (Group(name),))
        metrics[f"gradient_norm_{name}"] = optax.tree.norm(mine)
        metrics[f"learning_rate_{name}"] = jnp.asarray(schedule(config, branch)(step))
    return metrics


def _load_metrics(params: Params, load: Array | None) -> StepMetrics:
    """How unequal the experts' loads are, and how far the biases have moved."""
    if load is None or not load.size:
        return {}
    mean = jnp.maximum(jnp.mean(load, axis=-1), 1e-9)
    biases = [b for p, b in params.items() if group_of(p) is Group.BALANCE]
    return {
        "expert_load_max": jnp.max(load, axis=-1) / mean,  # 1: perfectly even
        "correction_bias_max": jnp.max(jnp.stack([jnp.max(jnp.abs(b)) for b in biases])),
    }
