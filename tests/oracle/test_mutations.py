"""Each known mistake, put into the package, makes a named comparison with the oracle fail."""

import jax
import jax.numpy as jnp
import pytest

import dsa_jax.indexer
import dsa_jax.mla
import dsa_jax.moe
from dsa_jax.config import ModelConfig
from dsa_jax.mla import MLA
from dsa_jax.rope import rotate
from pallas_kernels.lightning_indexer import reference
from tests.oracle import test_deepseek as comparisons


@pytest.fixture(autouse=True)
def fresh_traces():
    """The ops are compiled once a process; what was traced without a mistake must not serve it."""
    ops = (reference.indexer_scores, reference.lightning_indexer)
    for op in ops:
        op.clear_cache()
    yield
    for op in ops:
        op.clear_cache()


def _flipped_indexer_rope(m):
    flipped = lambda x, turn, *, interleaved: rotate(x, turn, interleaved=not interleaved)  # noqa: E731
    m.setattr(dsa_jax.indexer, "rotate", flipped)


def _indexer_rope_last(m):
    right = dsa_jax.indexer.Indexer._rotate

    def last(self, x, turn):
        return jnp.roll(right(self, jnp.roll(x, self.rope_width, -1), turn), -self.rope_width, -1)

    m.setattr(dsa_jax.indexer.Indexer, "_rotate", last)


def _no_relu(m):
    m.setattr(reference, "weigh", lambda dots, w: (w[..., None] * dots).sum(axis=2))


def _one_sided_hadamard(m):
    right = dsa_jax.indexer.hadamard
    m.setattr(dsa_jax.indexer, "hadamard", lambda x: right(x) if x.ndim == 4 else x)


def _bf16_head_weights(m):
    right = jnp.matmul

    def low(a, b, **options):
        return right(a, b, **options).astype(jnp.bfloat16).astype(jnp.float32)

    m.setattr(dsa_jax.indexer.jnp, "matmul", low)


def _no_mscale(m):
    m.setattr(ModelConfig, "softmax_scale", property(lambda self: self.qk_head_dim**-0.5))


def _rope_before_nope(m):
    def swapped(self, q_latent, turn):
        c = self.config
        q = self.q_b_proj(q_latent)
        q = q.reshape(*q.shape[:-1], c.num_attention_heads, c.qk_head_dim)
        rope, nope = q[..., : c.qk_rope_head_dim], q[..., c.qk_rope_head_dim :]
        return jnp.concatenate([nope, rotate(rope, turn, interleaved=True)], axis=-1)

    m.setattr(MLA, "_queries", swapped)


def _half_split_attention_rope(m):
    m.setattr(
        dsa_jax.mla, "rotate", lambda x, turn, *, interleaved: rotate(x, turn, interleaved=False)
    )


def _values_before_keys(m):
    right = MLA._up_projections

    def swapped(self):
        w = jnp.concatenate(right(self), axis=-1)
        return w[..., self.config.v_head_dim :], w[..., : self.config.v_head_dim]

    m.setattr(MLA, "_up_projections", swapped)


def _unrounded_latent(m):
    m.setattr(dsa_jax.mla, "round_trip", lambda x, *_: x)


def _zero_for_masked_experts(m):
    where = jnp.where

    def zeros(condition, x, y):
        return where(condition, x, 0.0 if isinstance(y, float) and y == -jnp.inf else y)

    m.setattr(dsa_jax.moe.jnp, "where", zeros)


def _max_for_groups(m):
    top_k = jax.lax.top_k

    def best_only(x, k):
        values, indices = top_k(x, k)
        return (values[..., :1] if x.ndim == 3 else values), indices

    m.setattr(dsa_jax.moe.jax.lax, "top_k", best_only)


MISTAKES = {
    "indexer RoPE interleaved": (_flipped_indexer_rope, comparisons.test_quantised_indexer),
    "indexer RoPE on the last columns": (_indexer_rope_last, comparisons.test_quantised_indexer),
    "no ReLU": (_no_relu, comparisons.test_index_scores),
    "no ReLU, selection": (_no_relu, comparisons.test_selection),
    "one-sided Hadamard": (_one_sided_hadamard, comparisons.test_index_scores),
    "head weights in bf16": (_bf16_head_weights, comparisons.test_quantised_indexer),
    "no mscale^2 in prefill": (_no_mscale, comparisons.test_prefill_attention),
    "no mscale^2 in decode": (_no_mscale, comparisons.test_absorbed_attention),
    "rotary columns before the others": (_rope_before_nope, comparisons.test_prefill_attention),
    "attention RoPE half-split": (_half_split_attention_rope, comparisons.test_prefill_attention),
    "values before keys in kv_b_proj": (_values_before_keys, comparisons.test_absorbed_attention),
    # Only here: the FP8 product of the other mode rounds the latent once more, to the same values.
    "latent not rounded": (_unrounded_latent, comparisons.test_absorbed_attention),
    "masked experts at 0": (_zero_for_masked_experts, comparisons.test_gate),
    "groups by their best expert": (_max_for_groups, comparisons.test_gate),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_shows(mistake, monkeypatch):
    patch, comparison = MISTAKES[mistake]
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        comparison()
