"""Each known mistake, put into the package, makes a named comparison with the oracle fail."""

import jax.numpy as jnp
import pytest

import dsa_jax.indexer
import dsa_jax.mla
import dsa_jax.moe
from dsa_jax.mla import MLA
from dsa_jax.rope import rotate
from pallas_kernels.lightning_indexer import reference
from tests import mistakes
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


def _no_relu(m):
    m.setattr(reference, "weigh", lambda dots, w: (w[..., None] * dots).sum(axis=2))


def _bf16_head_weights(m):
    right = jnp.matmul

    def low(a, b, **options):
        return right(a, b, **options).astype(jnp.bfloat16).astype(jnp.float32)

    m.setattr(dsa_jax.indexer.jnp, "matmul", low)


def _rope_before_nope(m):
    def swapped(self, q_latent, turn):
        c = self.config
        q = self.q_b_proj(q_latent)
        q = q.reshape(*q.shape[:-1], c.num_attention_heads, c.qk_head_dim)
        rope, nope = q[..., : c.qk_rope_head_dim], q[..., c.qk_rope_head_dim :]
        return jnp.concatenate([nope, rotate(rope, turn, interleaved=True)], axis=-1)

    m.setattr(MLA, "_queries", swapped)


def _values_before_keys(m):
    right = MLA._up_projections

    def swapped(self, up):
        w = jnp.concatenate(right(self, up), axis=-1)
        return w[..., self.config.v_head_dim :], w[..., : self.config.v_head_dim]

    m.setattr(MLA, "_up_projections", swapped)


MISTAKES = {
    "indexer RoPE interleaved": (mistakes.flipped_indexer_rope, comparisons.test_quantised_indexer),
    "indexer RoPE last": (
        mistakes.indexer_rope_last,
        comparisons.test_quantised_indexer,
    ),
    "no ReLU": (_no_relu, comparisons.test_index_scores),
    "no ReLU, selection": (_no_relu, comparisons.test_selection),
    "one-sided Hadamard": (mistakes.one_sided_hadamard, comparisons.test_index_scores),
    "head weights in bf16": (_bf16_head_weights, comparisons.test_quantised_indexer),
    "no mscale^2 in prefill": (mistakes.no_mscale, comparisons.test_prefill_attention),
    "no mscale^2 in decode": (mistakes.no_mscale, comparisons.test_absorbed_attention),
    "RoPE before the others": (_rope_before_nope, comparisons.test_prefill_attention),
    "MLA RoPE half-split": (
        mistakes.flipped_attention_rope,
        comparisons.test_prefill_attention,
    ),
    "values before keys in kv_b_proj": (_values_before_keys, comparisons.test_absorbed_attention),
    # Only here: the FP8 product of the other mode rounds the latent once more, to the same values.
    "latent not rounded": (mistakes.unrounded_latent, comparisons.test_absorbed_attention),
    "masked experts at 0": (mistakes.zero_for_masked_experts, comparisons.test_gate),
    "groups by their best expert": (mistakes.max_for_groups, comparisons.test_gate),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_shows(mistake, monkeypatch):
    patch, comparison = MISTAKES[mistake]
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        comparison()
