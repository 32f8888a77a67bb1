"""Needles: random words, hidden in running text, and asked for again by their first two letters.

    ... and he went up [QFXKZB] to Jerusalem, and ...   <- hidden, among others
    [QFXKZB]                                            <- asked for: XKZB is the answer

Two letters do not say which four follow; nothing but the place where the word was hidden does. So
a model that answers has looked it up, however far back it is. No two words of a text begin with
the same two letters. `documents` makes the usual grid of how long the text is and how deep in it
the needle lies; each text hides a needle at every depth and asks for all of them at its end.
`evaluate` tells which answers are right in every letter, by the indexer's keys or by a control's.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.controls import Mode, selector
from train.data import NO_TARGET, Batch

if TYPE_CHECKING:
    from dsa_jax.transformer import Transformer

SPACING = 128
"""Bytes of a row for each needle in it."""
SIZE = 9
"""Bytes of a needle in running text, with the space after it."""
_ANSWER = 4
_NAMES = [a + b for a in string.ascii_uppercase for b in string.ascii_uppercase]


def draw(rng: random.Random, count: int) -> list[str]:
    """`count` needles of different names (no more than there are names)."""
    names = rng.sample(_NAMES, min(count, len(_NAMES)))
    return [f"[{name}{''.join(rng.choices(string.ascii_uppercase, k=_ANSWER))}]" for name in names]


def hide(passage: str, needles: Sequence[str], rng: random.Random) -> str:
    """The passage with each needle before a word of its own choosing, and a space after it."""
    places = [m.start() for m in re.finditer(r"\w+", passage)] or [0]
    return insert(passage, sorted((rng.choice(places), needle) for needle in needles))


def insert(passage: str, needles: Sequence[tuple[int, str]]) -> str:
    """The passage with needles at these places, which ascend."""
    parts, last = [], 0
    for place, needle in needles:
        parts += [passage[last:place], needle, " "]
        last = place
    return "".join([*parts, passage[last:]])


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is asked.

    Attributes:
        lengths: tokens of a document; each divides the longest.
        depths: where the needles lie, as shares of the text before the questions.
        count: documents of each length.
        batch: rows, of the longest length, in a forward pass.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    count: int
    batch: int


class Document(NamedTuple):
    """A text that ends in questions and their answers.

    Attributes:
        text: ASCII.
        answers: index of the first letter of each depth's answer.
        row: of the grid: which length.
    """

    text: str
    answers: tuple[int, ...]
    row: int


def documents(grid: Grid, text: str, seed: int = 0) -> list[Document]:
    """The documents of the grid, from the longest to the shortest.

    Args:
        grid: what is asked.
        text: running text, from which passages are cut.
        seed: of passages, needles, the order of the questions and the places of those needles
            that are not asked for.
    """
    rng = random.Random(seed)
    return [
        _document(text, length, row, grid.depths, rng)
        for row, length in sorted(enumerate(grid.lengths), key=lambda x: -x[1])
        for _ in range(grid.count)
    ]


def _document(
    text: str, length: int, row: int, depths: Sequence[float], rng: random.Random
) -> Document:
    drawn = draw(rng, max(len(depths), length // SPACING))
    asked, others = drawn[: len(depths)], drawn[len(depths) :]
    order = rng.sample(range(len(depths)), len(depths))
    questions = "".join(f"\n{asked[i]}" for i in order)
    room = length - len(questions) - SIZE * len(drawn)
    start = rng.randrange(max(1, len(text) - room))
    passage = text[start : start + room]
    places = [m.start() for m in re.finditer(r"\w+", passage)] or [0]
    hidden = [(rng.choice(places), needle) for needle in others]
    for depth, needle in zip(depths, asked, strict=True):
        hidden.append((min(places, key=lambda place: abs(place - depth * room)), needle))
    whole = insert(passage, sorted(hidden))
    first = len(whole) + len("\n[QF")
    answers = tuple(first + SIZE * order.index(i) for i in range(len(depths)))
    return Document(whole + questions, answers, row)


def batches(grid: Grid, made: Sequence[Document]) -> list[tuple[Batch, np.ndarray]]:
    """Documents packed into rows of the longest length.

    Returns:
        Batches, and `[B, T]` which answer the *next* token belongs to, counted through the depths
        of one document after the other's; -1: none.
    """
    longest = max(grid.lengths)
    rows: list[list[int]] = [[]]
    used = 0
    for number, document in enumerate(made):
        if used + len(document.text) > longest:
            rows.append([])
            used = 0
        rows[-1].append(number)
        used += len(document.text)
    rows += [[] for _ in range(-len(rows) % grid.batch)]
    packed = [_row(longest, [(number, made[number]) for number in row]) for row in rows]
    out = []
    for first in range(0, len(packed), grid.batch):
        part = packed[first : first + grid.batch]
        batch = {name: np.stack([row[name] for row in part]) for name in part[0]}
        out.append((batch, batch.pop("answers")))
    return out


def _row(length: int, placed: Sequence[tuple[int, Document]]) -> dict[str, Any]:
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "segment_ids", "positions")}
    row |= {name: np.full(length, NO_TARGET, np.int32) for name in ("targets", "answers")}
    start = 0
    for segment, (number, document) in enumerate(placed, start=1):
        size = len(document.text)
        here = slice(start, start + size)
        row["tokens"][here] = np.frombuffer(document.text.encode("ascii"), np.uint8)
        row["segment_ids"][here] = segment
        row["positions"][here] = np.arange(size)
        row["targets"][start : start + size - 1] = row["tokens"][start + 1 : start + size]
        for depth, first in enumerate(document.answers):
            answer = start + first - 1
            row["answers"][answer : answer + _ANSWER] = number * len(document.answers) + depth
        start += size
    return row


def evaluate(
    model: Transformer,
    grid: Grid,
    made: Sequence[Document],
    packed: Sequence[tuple[Batch, np.ndarray]],
    mode: Mode,
) -> np.ndarray:
    """Which answers are right, greedy: every letter the likeliest.

    Args:
        model: its parameters are not changed.
        grid: what is asked.
        made: from `documents`.
        packed: from `batches`.
        mode: what chooses the keys.

    Returns:
        `[lengths, count, depths]` booleans, the documents of a length in the order of `made`.
    """
    right = np.ones((len(made), len(grid.depths)), bool)
    for batch, answers in packed:
        hits = np.asarray(_run(model, batch, mode))
        right.reshape(-1)[answers[(answers >= 0) & ~hits]] = False
    rows = np.array([document.row for document in made])
    return np.stack([right[rows == row] for row in range(len(grid.lengths))])


def _run(model: Transformer, batch: Batch, mode: Mode) -> jax.Array:
    way = mode.way(model.config.index_topk, batch["tokens"].shape[1])
    return _hits(model, batch, way.attention, way.which, np.int32(mode.seed), keys=way.keys)


@functools.partial(jax.jit, static_argnames=("attention", "keys"))
def _hits(
    model: Transformer,
    batch: Batch,
    attention: Literal["dense", "sparse"],
    which: jax.Array | None,
    seed: jax.Array,
    *,
    keys: int,
) -> jax.Array:
    out = model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        attention=attention,
        selector=None if which is None else selector(which, topk=keys, seed=seed),
    )
    return jnp.argmax(out.logits, axis=-1) == batch["targets"]
