"""Text from a model: prompts into the cache, then one token at a time.

Rows have their own lengths, seeds and ends. Prompts are padded on the right and read in chunks of
equal shape; padding never enters the cache. Two programs are compiled, one for a chunk and one for
a run of decode steps, and both are used again by later calls of similar size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from dsa_jax import sampling
from dsa_jax.cache import Cache, init_cache
from dsa_jax.config import ModelConfig
from dsa_jax.mla import Attention
from dsa_jax.transformer import Transformer

# Decode steps that run on the device without asking the host. Bounds how late an interrupt is seen.
_BLOCK = 32
# Sizes are rounded up to multiples of these, so that a growing conversation compiles rarely.
_PROMPT_STEP = 64
_CACHE_STEP = 256


class Generation(NamedTuple):
    """What was generated.

    Attributes:
        tokens: per row, without the prompt and without the end token.
        ended: per row, whether it ended by itself; False: it ran into `max_new_tokens`.
    """

    tokens: list[list[int]]
    ended: list[bool]


class _Choice(NamedTuple):
    """How tokens are chosen; arrays, so that other values compile nothing."""

    seeds: UInt32[Array, " B"]
    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    ends: Int32[Array, " e"]
    vocab_size: Int32[Array, ""]


class _State(NamedTuple):
    """Between decode steps.

    Attributes:
        cache: everything but the last token of each row.
        token: the last token of each row.
        step: tokens generated so far; of rows that are done, no more than that.
        done: rows that have ended.
    """

    cache: Cache
    token: Int32[Array, " B"]
    step: Int32[Array, ""]
    done: Bool[Array, " B"]


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 0.0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    eos: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    attention: Attention | None = None,
    prefill_chunk: int = 1024,
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continues each prompt.

    Args:
        model: decides dtype and placement; the cache is kept in its compute dtype.
        prompts: token ids of each row, at least one each; lengths may differ.
        max_new_tokens: where a row ends if it does not end by itself.
        temperature: 0 takes the most likely token; see `dsa_jax.sampling.sample`. One number, or
            one per row.
        top_p: mass of the nucleus that is drawn from; 1 draws from everything.
        seed: of the draws, in `[0, 2**32)`. Given one per row, a row's text does not depend on
            the rest of the batch (up to rounding of its logits).
        eos: ids that end a row; None: the config's. Pass `()` to run to `max_new_tokens`.
        vocab_size: ids from here on are never drawn; None: the config's. Published models have
            more rows than their tokenizer has tokens.
        attention: None: "sparse" where the model has an indexer, else "dense".
        prefill_chunk: prompt tokens read at a time; bounds the memory of long prompts.
        on_token: called with (row, token) as soon as a token is known, end tokens aside. Makes
            every step wait for the host.

    Raises:
        ValueError: a prompt, sampling parameter or length that cannot be served.
        FloatingPointError: the model's logits hold a NaN.
    """
    config = model.config
    length = _check(config, prompts, max_new_tokens, prefill_chunk)
    choice = _choice(config, len(prompts), temperature, top_p, seed, eos, vocab_size)
    if attention is None:
        attention = "sparse" if config.has_indexer else "dense"

    room = min(_round_up(length + max_new_tokens, _CACHE_STEP), config.max_position_embeddings)
    chunk = min(prefill_chunk, _round_up(length, _PROMPT_STEP), room)
    cache = init_cache(config, len(prompts), room, model.dtype)
    cache, hidden = _read_prompts(model, cache, prompts, chunk, attention)
    state, first = _start(model, cache, hidden, choice)

    collector = _Collector(len(prompts), choice.ends, on_token)
    collector.take(np.asarray(first)[:, None])
    stride = 1 if on_token else _BLOCK
    while collector.steps < max_new_tokens and not all(collector.ended):
        limit = min(stride, max_new_tokens - collector.steps)
        state, block, count = _decode(model, state, choice, limit, attention=attention)
        collector.take(np.asarray(block)[:, : int(count)])
    return Generation(collector.tokens, collector.ended)


def _read_prompts(
    model: Transformer,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    chunk: int,
    attention: Attention,
) -> tuple[Cache, Float[Array, "B D"]]:
    """Fills the cache; returns it with the hidden state of each row's last token."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((len(prompts), _round_up(longest, chunk)), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        valid[row, : len(prompt)] = True
    hidden = jnp.zeros((len(prompts), model.config.hidden_size), model.dtype)
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        cache, hidden = _prefill(
            model, cache, hidden, tokens[:, part], valid[:, part], attention=attention
        )
    return cache, hidden


@partial(jax.jit, static_argnames="attention", donate_argnames="cache")
def _prefill(
    model: Transformer,
    cache: Cache,
    hidden: Float[Array, "B D"],
    tokens: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    attention: Attention,
) -> tuple[Cache, Float[Array, "B D"]]:
    out = model(tokens, segment_ids=valid.astype(jnp.int32), cache=cache, attention=attention)
    assert out.cache is not None
    count = valid.sum(axis=1)
    last = jnp.take_along_axis(out.hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    # A row whose prompt ended in an earlier chunk keeps that chunk's.
    return out.cache, jnp.where(count[:, None] > 0, last[:, 0], hidden)


@partial(jax.jit, donate_argnames="cache")
def _start(
    model: Transformer, cache: Cache, hidden: Float[Array, "B D"], choice: _Choice
) -> tuple[_State, Int32[Array, " B"]]:
    """The first token of each row."""
    step = jnp.zeros((), jnp.int32)
    token, ended = _choose(model, hidden, choice, step)
    return _State(cache, token, step + 1, ended), token


@partial(jax.jit, static_argnames="attention", donate_argnames="state")
def _decode(
    model: Transformer, state: _State, choice: _Choice, limit: int, *, attention: Attention
) -> tuple[_State, Int32[Array, "B block"], Int32[Array, ""]]:
    """At most `limit` steps; ends early when every row is done.

    Returns:
        The state, the new tokens in the first columns, and the number of these.
    """
    begin = state.step

    def unfinished(carry: tuple[_State, Array]) -> Array:
        state, _ = carry
        return (state.step - begin < limit) & ~state.done.all()

    def step(carry: tuple[_State, Array]) -> tuple[_State, Array]:
        state, block = carry
        out = model(
            state.token[:, None],
            # Rows that are done are padding: no expert works for them.
            segment_ids=(~state.done).astype(jnp.int32)[:, None],
            cache=state.cache,
            attention=attention,
        )
        assert out.cache is not None
        token, ended = _choose(model, out.hidden[:, 0], choice, state.step)
        block = block.at[:, state.step - begin].set(token)
        return _State(out.cache, token, state.step + 1, state.done | ended), block

    block = jnp.zeros((state.token.shape[0], _BLOCK), jnp.int32)
    state, block = jax.lax.while_loop(unfinished, step, (state, block))
    return state, block, state.step - begin


def _choose(
    model: Transformer, hidden: Float[Array, "B D"], choice: _Choice, step: Int32[Array, ""]
) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
    """The next tokens, and whether each ends its row."""
    logits = model.unembed(hidden)
    known = jnp.arange(logits.shape[-1]) < choice.vocab_size
    token = sampling.sample(
        jnp.where(known | jnp.isnan(logits), logits, -jnp.inf),
        choice.seeds,
        jnp.broadcast_to(step, choice.seeds.shape),
        temperature=choice.temperature,
        top_p=choice.top_p,
    )
    ended = (token[:, None] == choice.ends).any(axis=-1) | (token == sampling.BROKEN)
    return token, ended


class _Collector:
    """The host's side: tokens of each row until it ends."""

    def __init__(
        self, rows: int, ends: Int32[Array, " e"], on_token: Callable[[int, int], None] | None
    ):
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows
        self.steps = 0
        self._ends = set(np.asarray(ends).tolist())
        self._on_token = on_token

    def take(self, block: np.ndarray) -> None:
        """Adds columns of tokens; those of rows that have ended are ignored."""
        for column in block.T.tolist():
            for row, token in enumerate(column):
                if self.ended[row]:
                    continue
                if token == sampling.BROKEN:
                    raise FloatingPointError(
                        f"generate: row {row} has NaN logits after {self.steps} tokens; "
                        "are the parameters finite?"
                    )
                if token in self._ends:
                    self.ended[row] = True
                    continue
                self.tokens[row].append(token)
                if self._on_token is not None:
                    self._on_token(row, token)
            self.steps += 1


def _check(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, prefill_chunk: int
) -> int:
    """The length of the longest prompt."""
    if not prompts:
        raise ValueError("generate: prompts is empty; pass at least one list of token ids")
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"generate: {name}={value} must be at least 1")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"generate: prompts[{row}] is empty; begin it with the tokenizer's bos"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"generate: prompts[{row}] holds id {low if low < 0 else high}, outside the "
                f"model's 0..{config.vocab_size - 1}; is this the model's tokenizer?"
            )
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"generate: the longest prompt has {longest} tokens; with "
            f"max_new_tokens={max_new_tokens} it exceeds the model's "
            f"max_position_embeddings={config.max_position_embeddings}; shorten one of them"
        )
    return longest


def _choice(
    config: ModelConfig,
    rows: int,
    temperature: float | Sequence[float],
    top_p: float | Sequence[float],
    seed: int | Sequence[int],
    eos: int | Sequence[int] | None,
    vocab_size: int | None,
) -> _Choice:
    def per_row(name: str, value: float | Sequence[float], rule: str, good: Callable) -> Array:
        numbers = np.asarray(value, np.float32)
        if numbers.shape not in ((), (rows,)):
            raise ValueError(f"generate: {name} has shape {numbers.shape}; give one, or {rows}")
        if not all(math.isfinite(x) and good(x) for x in np.atleast_1d(numbers)):
            raise ValueError(f"generate: {name}={value} must be {rule}")
        return jnp.broadcast_to(jnp.asarray(numbers), (rows,))

    known = config.vocab_size if vocab_size is None else vocab_size
    if not 1 <= known <= config.vocab_size:
        raise ValueError(
            f"generate: vocab_size={known} must lie in 1..{config.vocab_size}, the model's own"
        )
    ends = config.eos_token_id if eos is None else eos
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    return _Choice(
        seeds=sampling.row_seeds(seed, rows),
        temperature=per_row("temperature", temperature, "at least 0", lambda x: x >= 0),
        top_p=per_row("top_p", top_p, "above 0 and at most 1", lambda x: 0 < x <= 1),
        ends=jnp.asarray(_pad_ends(ends), jnp.int32),
        vocab_size=jnp.int32(known),
    )


def _pad_ends(ends: Sequence[int]) -> list[int]:
    """Filled up with ids that do not exist, so that their number does not decide the program."""
    return [*ends, *[-2] * (_round_up(max(len(ends), 1), 8) - len(ends))]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
