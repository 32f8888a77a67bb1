"""Needles: random words, hidden in running text, and asked for again by their first two letters.

    ... and he went up [QFXKZB] to Jerusalem, and ...   <- hidden, among others
    [QFXKZB]                                            <- asked for: XKZB is the answer

Two letters do not say which four follow; nothing but the place where the word was hidden does. So
a model that answers has looked it up, however far back it is. No two words of a text begin with
the same two letters. `documents` makes the usual grid of how long the text is and how deep in it
the needle lies, and `evaluate` the share of answers that are right in every letter.
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

from train.data import NO_TARGET, Batch

if TYPE_CHECKING:
    from dsa_jax.transformer import Transformer

Attention = Literal["dense", "sparse"]

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
        depths: where the needle lies, as a share of the text before the question.
        count: documents of each length and depth.
        batch: rows, of the longest length, in a forward pass.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    count: int
    batch: int


class Document(NamedTuple):
    """A text that ends in a question and its answer.

    Attributes:
        text: ASCII.
        answer: index of the answer's first letter.
        cell: row and column of the grid.
    """

    text: str
    answer: int
    cell: tuple[int, int]


def documents(grid: Grid, text: str, seed: int = 0) -> list[Document]:
    """The documents of the grid, from the longest to the shortest.

    Args:
        grid: what is asked.
        text: running text, from which passages are cut.
        seed: of passages, needles and the places of those that are not asked for.
    """
    rng = random.Random(seed)
    made = []
    for row, length in sorted(enumerate(grid.lengths), key=lambda x: -x[1]):
        for column, depth in enumerate(grid.depths):
            for _ in range(grid.count):
                made.append(_document(text, length, depth, (row, column), rng))
    return made


def _document(
    text: str, length: int, depth: float, cell: tuple[int, int], rng: random.Random
) -> Document:
    asked, *others = draw(rng, max(1, length // SPACING))
    question = f"\n{asked}"
    room = length - len(question) - (len(asked) + 1) * (1 + len(others))
    start = rng.randrange(max(1, len(text) - room))
    passage = text[start : start + room]
    places = [m.start() for m in re.finditer(r"\w+", passage)] or [0]
    wanted = min(places, key=lambda place: abs(place - depth * room))
    hidden = [(wanted, asked), *((rng.choice(places), needle) for needle in others)]
    whole = insert(passage, sorted(hidden)) + question
    return Document(whole, len(whole) - 1 - _ANSWER, cell)


def batches(grid: Grid, made: Sequence[Document]) -> list[tuple[Batch, np.ndarray]]:
    """Documents packed into rows of the longest length.

    Returns:
        Batches, and `[B, T]` which document's answer the *next* token belongs to; -1: none's.
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
        answer = start + document.answer - 1
        row["answers"][answer : answer + _ANSWER] = number
        start += size
    return row


def evaluate(
    model: Transformer,
    grid: Grid,
    made: Sequence[Document],
    packed: Sequence[tuple[Batch, np.ndarray]],
    attention: Attention,
) -> list[list[float]]:
    """The share of right answers of each length and depth, greedy: every letter the likeliest.

    Args:
        model: its parameters are not changed.
        grid: what is asked.
        made: from `documents`.
        packed: from `batches`.
        attention: dense, or the indexer's selection.
    """
    right = np.ones(len(made), bool)
    for batch, answers in packed:
        hits = np.asarray(_hits(model, batch, attention))
        right[answers[(answers >= 0) & ~hits]] = False
    shares = np.zeros((len(grid.lengths), len(grid.depths)))
    for document, hit in zip(made, right, strict=True):
        shares[document.cell] += hit / grid.count
    return shares.tolist()


@functools.partial(jax.jit, static_argnames="attention")
def _hits(model: Transformer, batch: Batch, attention: Attention) -> jax.Array:
    out = model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        attention=attention,
    )
    return jnp.argmax(out.logits, axis=-1) == batch["targets"]
