"""The package against DeepSeek's own numerics: FP8 weights, bf16 activations, every rounding."""

import jax.numpy as jnp
import numpy as np

from dsa_jax.indexer import for_selection
from pallas_kernels import KeyRange, Selection, indexer_scores, lightning_indexer
from tests.oracle import deepseek
from tests.oracle.models import LENGTH, jit, setting

VISIBLE = np.tri(LENGTH, dtype=bool)
# DeepGEMM's bound for fp32 logits against a reference of the same quantised inputs.
SCORES = 5e-6
# Scores have standard deviation 1 and are fp32 sums of six heads; 1e-6 was the most seen between
# the two. Keys within this much of the last selected one may be swapped.
MARGIN = 1e-5
# Attention adds bf16 roundings whose order the two do not share. Where one moves a column of
# `o_proj`'s input over an e4m3 boundary, that column moves by 2^-4: 6e-5 was seen.
ATTENTION = 2e-4


def calc_diff(x, y):
    """`1 - 2 <x, y> / (<x, x> + <y, y>)`: half the squared relative distance, for small ones."""
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    return 1 - 2 * (x @ y) / (x @ x + y @ y)


def heads():
    """The package's quantised indexer, given the oracle's bf16 inputs."""
    s = setting()
    q_latent = jnp.asarray(s.projected.q_latent, jnp.bfloat16)[None]
    run = jit(
        lambda mla, *tokens: for_selection(mla.indexer(*tokens), s.config.numerics)
    )  # fmt: skip
    return run(s.mla, s.jax_x, q_latent, s.rows.turn)


def expected_heads():
    s = setting()
    return deepseek.indexer(s.config, s.params, s.x, s.projected.q_latent, s.turn)


def exact(heads):
    return deepseek.Indexed(*(np.asarray(x[0], np.float64) for x in heads))


def keys_of(selection):
    return [{int(s) for s in row if s >= 0} for row in np.asarray(selection.indices[0])]


def test_quantised_indexer():
    """The same e4m3 values and scales, bit for bit; head weights to fp32 rounding."""
    ours, theirs = exact(heads()), expected_heads()
    np.testing.assert_array_equal(ours.q8, theirs.q8)
    np.testing.assert_array_equal(ours.k8, theirs.k8)
    np.testing.assert_array_equal(ours.k_scale, theirs.k_scale)
    # One fp32 product over the model's width, its sums in another order.
    np.testing.assert_allclose(ours.w, theirs.w, rtol=1e-5, atol=1e-6 * np.abs(theirs.w).max())


def test_index_scores():
    """Scores of the package given its quantised inputs, and end to end."""
    h = heads()
    ranges = KeyRange.causal(1, LENGTH)
    scores = np.asarray(indexer_scores(h.q, h.k, h.w, ranges, k_scale=h.k_scale))[0]
    np.testing.assert_array_equal(np.isfinite(scores), VISIBLE)
    assert calc_diff(scores[VISIBLE], deepseek.index_scores(exact(h))[VISIBLE]) < SCORES
    assert calc_diff(scores[VISIBLE], deepseek.index_scores(expected_heads())[VISIBLE]) < SCORES
    assert (scores[VISIBLE] < 0).any()  # head weights of both signs


def test_selection():
    """Chosen keys score at least the last chosen one's score, others at most; up to MARGIN."""
    h, topk = heads(), setting().config.index_topk
    selection = lightning_indexer(
        h.q, h.k, h.w, KeyRange.causal(1, LENGTH), topk=topk, k_scale=h.k_scale
    )
    scores = deepseek.index_scores(exact(h))
    for t, chosen in enumerate(keys_of(selection)):
        assert len(chosen) == min(topk, t + 1)
        if t < topk:
            continue
        last = np.sort(scores[t])[-topk]
        others = set(range(t + 1)) - chosen
        assert min(scores[t, list(chosen)]) >= last - MARGIN
        assert max(scores[t, list(others)]) <= last + MARGIN


def test_prefill_attention():
    """Over expanded keys and values, given the same selected ones."""
    s = setting()
    ours = s.attend("masked")
    expected = deepseek.mha(s.config, s.params, s.projected, keys_of(ours.selection))
    assert calc_diff(ours.out[0], expected) < ATTENTION


def test_absorbed_attention():
    """Over absorbed keys, given the same selected ones."""
    s = setting()
    ours = s.attend("sparse")
    expected = deepseek.mqa(s.config, s.params, s.projected, keys_of(ours.selection))
    assert calc_diff(ours.out[0], expected) < ATTENTION


def test_decode_attention():
    """Over absorbed keys, token by token from a cache that a prefill over expanded ones left."""
    s = setting()
    keys, out = s.prefill_then_decode(LENGTH - 4)
    expected = deepseek.top_keys(deepseek.index_scores(expected_heads()), s.config.index_topk)
    assert keys == expected[-4:]
    expected = deepseek.mqa(s.config, s.params, s.projected, expected)
    assert calc_diff(out, expected[-4:]) < ATTENTION


def test_prefill_and_decode_are_one_function():
    """They differ by their roundings: in one the expansion is an FP8 product, in one bf16."""
    s = setting()
    keys = deepseek.top_keys(deepseek.index_scores(expected_heads()), s.config.index_topk)
    prefill, decode = (
        f(s.config, s.params, s.projected, keys) for f in (deepseek.mha, deepseek.mqa)
    )
    assert 1e-6 < calc_diff(prefill, decode) < ATTENTION


def test_fp32_scores_are_within_the_roundings():
    """The official code keeps scores and probabilities in bf16; fp32 ones, as here, are as near."""
    s = setting()
    keys = deepseek.top_keys(deepseek.index_scores(expected_heads()), s.config.index_topk)
    for f in (deepseek.mha, deepseek.mqa):
        plain = f(s.config, s.params, s.projected, keys)
        assert (
            0 < calc_diff(plain, f(s.config, s.params, s.projected, keys, rounded=True)) < ATTENTION
        )


def test_gate():
    s = setting()
    routing = s.route()
    for t, expected in enumerate(deepseek.gate(s.config, s.params, s.x)):
        ours = dict(
            zip(
                np.asarray(routing.experts[t]).tolist(), np.asarray(routing.weights[t]), strict=True
            )
        )
        assert ours.keys() == expected.keys(), t
        for e, weight in expected.items():
            assert abs(ours[e] - weight) < 1e-5 * weight  # fp32


def test_experts():
    s = setting()
    ours = jit(lambda moe, x: moe(x, jnp.ones((1, LENGTH), bool))[0])(s.moe, s.jax_x)
    # As for attention; sums over three experts.
    assert calc_diff(ours[0], deepseek.moe(s.config, s.params, s.x)) < 2e-5


def test_every_key_when_few_are_visible():
    """A row with fewer keys than topk has them all, and -1 in the slots left over."""
    h, topk = heads(), setting().config.index_topk
    selection = lightning_indexer(
        h.q, h.k, h.w, KeyRange.causal(1, LENGTH), topk=topk, k_scale=h.k_scale
    )
    indices = np.asarray(Selection(selection.indices).indices[0])
    for t in range(topk):
        assert indices[t].tolist() == [*range(t + 1), *[-1] * (topk - t - 1)]
