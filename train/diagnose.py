"""Where a number stopped being one: run once, after a step whose loss or gradient was not finite.

The state is untouched since before that step (`TrainState.ok`), so running its batch again shows
the same failure with every layer watched.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dsa_jax.layer_tree import split_layers
from dsa_jax.mla import AttentionState
from train.config import TrainConfig
from train.data import Batch
from train.stages import split
from train.state import Params, Skeleton, TrainState, flat, nested
from train.step import gradient


class NonFiniteError(FloatingPointError):
    """Training met NaN or infinity; the message names step, place and last good checkpoint."""


def _finite(state: AttentionState) -> Bool[Array, " 2"]:
    """Whether a layer's attention, and its indexer, read finite numbers only.

    The indexer's are looked at and not its scores alone: XLA's relu on a CPU turns NaN into 0.
    """
    indexer = (state.index_q, state.index_k, state.index_w)
    return jnp.stack([_all_finite(state.q, state.kv), _all_finite(*indexer)])


_finite.any_order = True  # pyright: ignore  # the order of tokens is that of the devices


def _all_finite(*arrays: Array | None) -> Bool[Array, ""]:
    found = [jnp.isfinite(x.astype(jnp.float32)).all() for x in arrays if x is not None]
    return jnp.all(jnp.array(found)) if found else jnp.array(True)


def locate(config: TrainConfig, skeleton: Skeleton, state: TrainState, batch: Batch) -> str:
    """Names the first place, in the order of computation, that is not finite.

    Args:
        config: a resolved config.
        skeleton: of the run's model.
        state: from before the failing step.
        batch: of the failing step.
    """
    broken = _broken(config, state.params)
    if broken:
        return f"parameter {broken[0]}"

    def forward(params: dict[str, Array], batch: Batch) -> tuple[Array, Array, Array | None]:
        out = skeleton.model(params)(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            attention=config.stage.attention,
            indexer_loss=config.indexer_loss,
            probe=_finite,
        )
        return out.probe, jnp.isfinite(out.hidden).all(), out.kl

    inputs, output, kl = jax.device_get(jax.jit(forward)(state.params, batch))
    for layer, (attention, indexer) in enumerate(np.asarray(inputs).tolist()):
        before = "the embedding" if layer == 0 else f"the output of layer {layer - 1}"
        if not attention:
            return f"queries or keys of layer {layer} (its projections, or {before})"
        if not indexer:
            return f"the indexer's queries, keys or head weights in layer {layer}"
        if kl is not None and not np.isfinite(kl[layer]):
            return f"the indexer's KL in layer {layer}"
    if not output:
        return f"the output of the last layer, {config.model.num_hidden_layers - 1}"
    trainable, frozen = split(state.params, config.trainable)
    _, gradients = jax.jit(lambda t, f, b: gradient(config, skeleton, t, f, b))(
        trainable, frozen, batch
    )
    broken = _broken(config, gradients)
    if broken:  # a backward pass runs from the last layer to the first
        return f"the gradient of {broken[-1]}"
    return "the loss itself: every layer, parameter and gradient is finite"


def _broken(config: TrainConfig, params: Params) -> list[str]:
    """The leaves with a number that is not finite, one a layer, in the order of the layers."""
    finite = {
        path: jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
        if path.startswith("stacks/")
        else jnp.isfinite(leaf).all()
        for path, leaf in params.items()
    }
    layers = flat(split_layers(nested(jax.device_get(finite)), config.model))
    return [path for path, good in layers.items() if not good]
