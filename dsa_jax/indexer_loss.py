"""A layer's KL loss, whose gradient is known the moment the layer's forward pass ends.

Everything that enters the loss is detached but the indexer's parameters. So the gradient needs
nothing from the layers above, and can be computed on the spot: differentiating with respect to the
indexers alone (the warm-up stage) then keeps no activations and runs no backward pass through the
model, with nothing more than `jax.grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float32

from dsa_jax.config import Numerics
from dsa_jax.indexer import Indexer, for_loss
from dsa_jax.linear import Linear
from dsa_jax.mesh_ops import indexer_kl_dense_loss, indexer_kl_sparse
from dsa_jax.rope import Rotation
from dsa_jax.sharding import Rules
from pallas_kernels import KeyRange, Selection

# Remat policies keep this, or the backward pass would run the loss a second time.
GRADIENT_NAME = "indexer_gradient"


def leaf_loss(loss: Callable[[Any, Any], Array], params: Any, inputs: Any) -> Array:
    """`loss(params, inputs)`, differentiable in `params` only, its gradient taken at once.

    Under differentiation the forward pass computes the gradient too and keeps it, as large as the
    parameters, instead of residuals as large as the activations. Without differentiation nothing
    but the value is computed.

    Args:
        loss: scalar; must not close over traced arrays.
        params: what is differentiated.
        inputs: everything else; gets no gradient.
    """

    @jax.custom_vjp
    def value(params, inputs):
        return loss(params, inputs)

    # A call that partial evaluation sees from outside only: in a scan it would divide a function
    # into what the backward pass needs and the rest, and cannot where one works on a `jax.Ref`, as
    # kernels do that add up in place. (Batching is the one thing that this wrapper is named for.)
    @jax.custom_batching.sequential_vmap
    def both(params, inputs):
        return jax.value_and_grad(loss)(params, inputs)

    def forward(params, inputs):
        out, gradient = both(params, inputs)
        return out, jax.tree.map(lambda g: checkpoint_name(g, GRADIENT_NAME), gradient)

    def backward(gradient, g):
        return jax.tree.map(lambda leaf: (g * leaf).astype(leaf.dtype), gradient), None

    value.defvjp(forward, backward)
    return value(params, jax.lax.stop_gradient(inputs))


def row_weights(ranges: KeyRange) -> Float32[Array, "B T"]:
    """What makes a sum over queries a mean over those that see a key: padding has no part in it."""
    rows = ranges.end > ranges.start
    return rows.astype(jnp.float32) / jnp.maximum(rows.sum(), 1)


def mean_over_rows(kl: Float32[Array, "B T"], ranges: KeyRange) -> Float32[Array, ""]:
    """Mean over the queries that see a key."""
    return (row_weights(ranges) * kl).sum()


class LossOptions(NamedTuple):
    """What is the same for all layers.

    Attributes:
        numerics: whether the loss sees the quantised indexer.
        scale: the attention's softmax scale.
        rules: from letters to the axes of the mesh.
        whole: makes the indexer's weights whole; their gradient comes back cut, and so is kept.
    """

    numerics: Numerics
    scale: float
    rules: Rules
    whole: Callable[[Indexer], Indexer]


def dense_loss(
    indexer: Indexer,
    tokens: tuple[Array, Array, Rotation],
    target: tuple[Array, Array, Linear, Array],
    ranges: KeyRange,
    options: LossOptions,
) -> Float32[Array, ""]:
    """Warm-up: KL(p || softmax(I)) over all visible keys, a row's mean.

    p sums the attention's probabilities over its heads and divides by the number of heads.

    Args:
        indexer: what learns.
        tokens: the indexer's arguments.
        target: the attention's un-absorbed queries, latent keys, their up-projection, and lse.
        ranges: the keys each query may see.
        options: the same for all layers.
    """

    def loss(indexer: Indexer, inputs: Any) -> Array:
        tokens, (q, kv, up, lse), ranges = inputs
        heads = for_loss(options.whole(indexer)(*tokens), options.numerics)
        # A mean's weights are known beforehand: so value and gradient share one target.
        weights = row_weights(ranges)
        return indexer_kl_dense_loss(
            heads, q, kv, up, lse, ranges, weights, scale=options.scale, rules=options.rules
        )

    return leaf_loss(loss, indexer, (tokens, target, ranges))


def sparse_loss(
    indexer: Indexer,
    tokens: tuple[Array, Array, Rotation],
    target: tuple[Array, Array, Array],
    ranges: KeyRange,
    selection: Selection,
    options: LossOptions,
) -> Float32[Array, ""]:
    """Sparse stage: the same over the selected keys, of both distributions.

    Args:
        indexer: what learns.
        tokens: the indexer's arguments.
        target: the attention's absorbed queries, latent keys and lse.
        ranges: the keys each query may see; they say which rows count.
        selection: the keys the attention read.
        options: the same for all layers.
    """

    def loss(indexer: Indexer, inputs: Any) -> Array:
        tokens, (q, kv, lse), ranges, selection = inputs
        heads = for_loss(options.whole(indexer)(*tokens), options.numerics)
        kl = indexer_kl_sparse(
            heads, q, kv, lse, selection, scale=options.scale, rules=options.rules
        )
        return mean_over_rows(kl, ranges)

    return leaf_loss(loss, indexer, (tokens, target, ranges, selection))
