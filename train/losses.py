"""The two losses, as sums over what is valid: normalising is left to whoever knows the whole batch.

A mean over one micro-batch depends on how the batch was cut and packed; a sum divided by the
*global* number of valid targets or rows does not. So both losses here take that number.

    L = 1/targets * sum_t CE(t)  +  coefficient * 1/layers * sum_l 1/rows * sum_t KL_l(t)

The report writes the KL as a sum over queries t; the mean over valid rows is the same up to a
factor, and keeps the clip's meaning when lengths change. The language-model loss reaches the main
model only and the KL the indexers only: the model detaches what must be detached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsa_jax.spread import axes_of, per_device
from dsa_jax.transformer import Transformer
from pallas_kernels.tiling import vary_like
from train.data import NO_TARGET


def valid_targets(targets: Int[Array, ...]) -> Float[Array, ""]:
    """How many positions have a next token to predict."""
    return jnp.sum(targets != NO_TARGET, dtype=jnp.float32)


def valid_rows(segment_ids: Int[Array, ...]) -> Float[Array, ""]:
    """How many queries see at least themselves, which is all but the padding."""
    return jnp.sum(segment_ids != 0, dtype=jnp.float32)


def cross_entropy(
    model: Transformer, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], chunk: int
) -> Float[Array, ""]:
    """`cross_entropy_sum` over the mesh: of each device's tokens, with the whole head.

    The head is gathered once in each pass, and its gradient summed on the device before it is
    summed over devices.

    Args:
        model: has the head.
        hidden: final hidden states.
        targets: next token of each position, `NO_TARGET` where there is none.
        chunk: positions of a sequence at a time, on each device.
    """
    rules = model.rules
    cut, words = axes_of(rules, "D"), axes_of(rules, "W")
    tokens = axes_of(rules, "B") + axes_of(rules, "T")

    def local(weight: Array, hidden: Array, targets: Array) -> Array:
        weight = vary_like(weight, hidden)
        if cut:
            weight = lax.all_gather(weight, cut, axis=0, tiled=True)
        unembed = functools.partial(model.unembed, weight=weight)
        total = cross_entropy_sum(unembed, hidden, targets, chunk, words)
        return lax.psum(total, tokens) if tokens else total

    run = per_device(local, rules, ("D W", "B T _", "B T"), "")
    return run(model.head(), hidden, targets)


def cross_entropy_sum(
    unembed: Callable[[Float[Array, "B c D"]], Float[Array, "B c vocab"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk: int,
    words: tuple[str, ...] = (),
) -> Float[Array, ""]:
    """Sum over valid targets of -log softmax(unembed(hidden))[target], in nat.

    The logits of `chunk` positions a sequence exist at one time, in both passes: at 128K tokens
    and a vocabulary of 129,280 all of them would be 68 GB of fp32.

    Args:
        unembed: final hidden states to fp32 logits.
        hidden: final hidden states.
        targets: next token of each position, `NO_TARGET` where there is none.
        chunk: positions of a sequence at a time.
        words: inside `shard_map`, the axes over which the vocabulary is split.
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    pad = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=NO_TARGET)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def part(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
        h, target = piece
        logits = unembed(h).astype(jnp.float32)
        loss = _log_sum_exp(logits, words) - _logit(logits, jnp.maximum(target, 0), words)
        # where, not a product: a padded position may hold anything.
        return total + jnp.sum(jnp.where(target == NO_TARGET, 0.0, loss)), None

    zero = vary_like(jnp.float32(0), (hidden, targets))
    return lax.scan(part, zero, (split(hidden), split(targets)))[0]


def _log_sum_exp(logits: Float[Array, "B c W"], words: tuple[str, ...]) -> Float[Array, "B c"]:
    if not words:
        return jax.nn.logsumexp(logits, axis=-1)
    largest = lax.pmax(lax.stop_gradient(logits.max(axis=-1)), words)
    return largest + jnp.log(lax.psum(jnp.exp(logits - largest[..., None]).sum(-1), words))


def _logit(
    logits: Float[Array, "B c W"], target: Int[Array, "B c"], words: tuple[str, ...]
) -> Float[Array, "B c"]:
    if not words:
        return jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    target -= lax.axis_index(words) * logits.shape[-1]
    held = (target >= 0) & (target < logits.shape[-1])
    at = jnp.where(held, target, 0)[..., None]
    return lax.psum(jnp.where(held, jnp.take_along_axis(logits, at, axis=-1)[..., 0], 0), words)


def kl_sum(kl: Float[Array, " layers"], rows_here: Float[Array, ""]) -> Float[Array, " layers"]:
    """Per layer, the sum over this micro-batch's valid rows of KL(target || softmax(I)), in nat.

    Args:
        kl: the model's mean over the valid rows it was given.
        rows_here: how many those are; a micro-batch of padding alone contributes 0.
    """
    return jnp.where(rows_here > 0, kl, 0.0) * rows_here
