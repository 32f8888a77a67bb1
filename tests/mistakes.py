"""Known mistakes, each put into the package by a function of pytest's `monkeypatch`."""

import jax
import jax.numpy as jnp

import dsa_jax.indexer
import dsa_jax.mla
import dsa_jax.moe
from dsa_jax.config import ModelConfig


def flipped_indexer_rope(m):
    """Half-split where it is interleaved, and the other way round."""
    _flip(m, dsa_jax.indexer)


def flipped_attention_rope(m):
    """The same in MLA."""
    _flip(m, dsa_jax.mla)


def _flip(m, module):
    right = module.rotate

    def flipped(x, turn, *, interleaved):
        return right(x, turn, interleaved=not interleaved)

    m.setattr(module, "rotate", flipped)


def indexer_rope_last(m):
    """The indexer's last columns are rotated, not its first."""
    right = dsa_jax.indexer.Indexer._rotate

    def last(self, x, turn):
        return jnp.roll(right(self, jnp.roll(x, self.rope_width, -1), turn), -self.rope_width, -1)

    m.setattr(dsa_jax.indexer.Indexer, "_rotate", last)


def one_sided_hadamard(m):
    """Of the queries only."""
    right = dsa_jax.indexer.hadamard
    m.setattr(dsa_jax.indexer, "hadamard", lambda x: right(x) if x.ndim == 4 else x)


def no_mscale(m):
    """The softmax scale without mscale^2."""
    m.setattr(ModelConfig, "softmax_scale", property(lambda self: self.qk_head_dim**-0.5))


def unrounded_latent(m):
    """No FP8 round trip of the latent."""
    m.setattr(dsa_jax.mla, "round_trip", lambda x, *_: x)


def zero_for_masked_experts(m):
    """Experts outside the chosen groups at 0, which beats negative scores."""
    where = jnp.where

    def zeros(condition, x, y):
        return where(condition, x, 0.0 if isinstance(y, float) and y == -jnp.inf else y)

    m.setattr(dsa_jax.moe.jnp, "where", zeros)


def max_for_groups(m):
    """A group's score is its best expert, not its best two."""
    top_k = jax.lax.top_k

    def best_only(x, k):
        values, indices = top_k(x, k)
        return (values[..., :1] if x.ndim == 3 else values), indices

    m.setattr(dsa_jax.moe.jax.lax, "top_k", best_only)
