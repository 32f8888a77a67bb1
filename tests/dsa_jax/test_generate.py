"""Generation equals repeated full forwards, row by row, with contexts far beyond topk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import filled, jit, tokens_of

from dsa_jax import presets
from dsa_jax.generate import generate

CONFIG = presets.get("tiny")  # topk 8
NEW = 9
LENGTHS = (33, 5, 70, 1)


@pytest.fixture(scope="module")
def model():
    return filled(CONFIG)


@pytest.fixture(scope="module")
def prompts():
    tokens = np.asarray(tokens_of(CONFIG, len(LENGTHS), max(LENGTHS)))
    return [row[:n].tolist() for row, n in zip(tokens, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def greedy(model, prompts):
    return generate(model, prompts, max_new_tokens=NEW, eos=())


@jit
def forward(model, tokens, segment_ids):
    return model(tokens, segment_ids=segment_ids, attention="sparse").logits


def test_greedy_equals_one_long_forward(model, prompts, greedy):
    """Each generated token is the argmax of a forward, without a cache, of all before it."""
    total = max(LENGTHS) + NEW
    tokens, segments = np.zeros((len(prompts), total), np.int32), np.zeros((len(prompts), total))
    for row, (prompt, new) in enumerate(zip(prompts, greedy.tokens, strict=True)):
        tokens[row, : len(prompt) + NEW] = prompt + new
        segments[row, : len(prompt) + NEW] = 1
    logits = np.asarray(forward(model, tokens, segments.astype(np.int32)))
    for row, (prompt, new) in enumerate(zip(prompts, greedy.tokens, strict=True)):
        assert len(new) == NEW
        at = slice(len(prompt) - 1, len(prompt) - 1 + NEW)
        np.testing.assert_array_equal(logits[row, at].argmax(-1), new, err_msg=f"row {row}")
        # The comparison means something: no near-ties, and not one token over and over.
        best = np.sort(logits[row, at], axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4
    assert len({token for new in greedy.tokens for token in new}) > 8
    assert greedy.ended == [False] * len(prompts)


def test_chunked_prefill_changes_nothing(model, prompts, greedy):
    # 16 divides neither the prompts nor topk-sized steps: chunks end inside prompts.
    assert generate(model, prompts, max_new_tokens=NEW, eos=(), prefill_chunk=16) == greedy


def test_rows_do_not_see_each_other(model, prompts, greedy):
    rows = (2, 0, 0, 3)
    other = generate(model, [prompts[row] for row in rows], max_new_tokens=NEW, eos=())
    assert other.tokens == [greedy.tokens[row] for row in rows]


def test_each_row_stops_at_its_own_end(model, prompts, greedy):
    end = greedy.tokens[0][3]
    stopped = generate(model, prompts, max_new_tokens=NEW, eos=[end, CONFIG.vocab_size - 1])
    for row, whole in enumerate(greedy.tokens):
        hits = [i for i, token in enumerate(whole) if token in (end, CONFIG.vocab_size - 1)]
        assert stopped.tokens[row] == (whole[: hits[0]] if hits else whole)
        assert stopped.ended[row] == bool(hits)
    assert len(stopped.tokens[0]) <= 3
    assert not all(stopped.ended)


def test_stream_tells_every_token_in_order(model, prompts, greedy):
    heard = [[] for _ in prompts]
    streamed = generate(
        model,
        prompts,
        max_new_tokens=NEW,
        eos=(),
        on_token=lambda row, token: heard[row].append(token),
    )
    assert streamed == greedy
    assert heard == greedy.tokens


def test_draws_follow_seed_and_row_only(model, prompts):
    def draw(rows, seeds, **options):
        options = {"temperature": 1.5, "top_p": 0.95, "eos": ()} | options
        rows = [prompts[row] for row in rows]
        return generate(model, rows, max_new_tokens=NEW, seed=seeds, **options).tokens

    first = draw([0, 1, 2, 3], [3, 4, 5, 6])
    assert draw([0, 1, 2, 3], [3, 4, 5, 6]) == first
    assert draw([3, 2, 1, 0], [6, 5, 4, 3]) == first[::-1]
    other = draw([0, 1, 2, 3], [13, 14, 15, 16])
    assert all(a != b for a, b in zip(first, other, strict=True))
    # Rows choose for themselves: the first greedy, the others drawn as before.
    mixed = draw([0, 1, 2, 3], [3, 4, 5, 6], temperature=[0.0, 1.5, 1.5, 1.5])
    assert mixed[0] != first[0]
    assert mixed[1:] == first[1:]


def test_every_step_draws_anew(model, prompts):
    """With equal logits everywhere, nothing but the draw itself can change from step to step."""
    flat = jax.tree.map(lambda x: x, model)
    flat.norm.weight[...] = jnp.zeros_like(flat.norm.weight[...])
    drawn = generate(flat, prompts, max_new_tokens=NEW, eos=(), temperature=1.0, seed=1).tokens
    # 9 draws out of 96: fewer than 6 different ones have a chance below 1e-4.
    assert all(len(set(row)) >= 6 for row in drawn)


def test_ids_beyond_the_tokenizer_are_never_drawn(model, prompts, greedy):
    limit = 20
    assert any(token >= limit for new in greedy.tokens for token in new)
    for temperature in (0.0, 5.0):
        tokens = generate(
            model, prompts, max_new_tokens=NEW, eos=(), vocab_size=limit, temperature=temperature
        ).tokens
        assert all(token < limit for new in tokens for token in new)


def test_nan_is_an_error(model, prompts):
    broken = jax.tree.map(lambda x: x, model)
    broken.norm.weight[...] = broken.norm.weight[...].at[3].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="row 0 has NaN logits after 0 tokens"):
        generate(broken, prompts, max_new_tokens=NEW)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty; begin it with"),
        ({"prompts": [[1, 96]]}, r"prompts\[0\] holds id 96, outside the model's 0\.\.95"),
        ({"prompts": [[-1]]}, "holds id -1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 512}, "exceeds the model's max_position_embeddings=512"),
        ({"temperature": -1.0}, r"temperature=-1\.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0"),
        ({"top_p": [0.5, 0.5]}, r"top_p has shape \(2,\)"),
        ({"vocab_size": 97}, r"vocab_size=97 must lie in 1\.\.96"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
    ],
)
def test_bad_calls(model, change, complaint):
    arguments = {"prompts": [[1, 2, 3]], "max_new_tokens": 2} | change
    with pytest.raises(ValueError, match=complaint):
        generate(model, **arguments)
