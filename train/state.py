"""What a training step carries, and the way between a model and a flat dict of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Int32

from dsa_jax.transformer import Transformer
from train.config import TrainConfig
from train.stages import split

Params = dict[str, Array]
"""Path to array: attribute names joined by `/`, layers of one kind stacked in front."""


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
        step: optimizer steps done in this stage.
        params: all parameters, trained or frozen.
        opt_state: of the stage's trainable parameters only.
        ok: False from the first step on whose loss or gradient was not finite; from then on no
            step changes anything, so what is saved is the last good state.
    """

    step: Int32[Array, ""]
    params: Params
    opt_state: optax.OptState
    ok: Bool[Array, ""]


class Skeleton:
    """A model without its arrays: turns models into `Params` and back, inside jit or out.

    Args:
        model: a model, or its `jax.eval_shape`.
    """

    def __init__(self, model: Transformer):
        leaves, self._tree = jax.tree.flatten_with_path(model)
        self.paths = tuple(_name(path) for path, _ in leaves)
        self.shapes = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, (_, leaf) in zip(self.paths, leaves, strict=True)
        }

    def params(self, model: Transformer) -> Params:
        """The model's arrays by path."""
        return dict(zip(self.paths, jax.tree.leaves(model), strict=True))

    def model(self, params: Mapping[str, Any]) -> Transformer:
        """The model with these arrays.

        Raises:
            ValueError: paths missing or unknown.
        """
        if set(params) != set(self.paths):
            missing = sorted(set(self.paths) - set(params))
            extra = sorted(set(params) - set(self.paths))
            raise ValueError(f"params: missing {missing[:5]}, unknown {extra[:5]}")
        return jax.tree.unflatten(self._tree, [params[path] for path in self.paths])


def _name(path: tuple[Any, ...]) -> str:
    names = jax.tree_util.keystr(path, simple=True, separator="/")
    return names.removesuffix("/value")  # an nnx.Param holds its array under `value`


def build(config: TrainConfig, rng: tuple[int, ...]) -> Transformer:
    """A freshly initialised model of the run.

    Args:
        config: of the run.
        rng: its raw key.
    """
    key = jax.random.wrap_key_data(jnp.asarray(rng, jnp.uint32))
    return Transformer(
        config.model,
        rngs=nnx.Rngs(key),
        dtype=jnp.dtype(config.compute_dtype),
        remat=config.remat,
        rules=config.rules,
    )


def skeleton_of(config: TrainConfig) -> Skeleton:
    """The run's model without arrays; nothing is allocated."""
    return Skeleton(jax.eval_shape(lambda: build(config, (0, 0))))


def new_state(
    config: TrainConfig, params: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before a stage's first step: given parameters, fresh optimizer state."""
    trainable, _ = split(params, config.trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(trainable),
        ok=jnp.ones((), bool),
    )


def nested(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from a flat one: `{"a/b": x}` becomes `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in params.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    found: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        found |= flat(node, f"{path}/") if isinstance(node, Mapping) else {path: node}
    return found
