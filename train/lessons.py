"""The order in which a model learns to look things up: from random strings to needles far back.

On running text alone a small model does not learn it in minutes: nearly every byte follows from the
few before it, and what has to be found in the row is too rare and too far away to be noticed. So
training begins where looking up is all there is, and close:

    loop    XKQZVXKQZVXKQZV...                       a random string, again and again
    echo    QKZV HTRWP QKZV AOEHTU HTRWP ...         random words, most of them again
    drill   [QFXKZB] [ABTTRE] ... [ABTTRE] [QFXKZB]  needles, and nothing else
    text    ... went up [QFXKZB] to Jerusalem, ...   the rows of `train.corpus`, denser in needles

Rows come in the order of training, each of documents of one lesson.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from train import corpus, needles

_AGAIN = 0.6  # the share of an echo's words that were there before


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Documents of one kind and length, for a part of the training.

    Attributes:
        kind: see above.
        length: bytes of a document; divides the row's.
        begin: when it begins, as a share of the rows for which lessons are planned.
        end: when it ends; 1 and later rows are still taught by what ends at 1.
        weight: how often it is chosen, against the others of the same time.
        spacing: bytes of running text for each needle in it.
    """

    kind: Literal["loop", "echo", "drill", "text"]
    length: int
    begin: float
    end: float
    weight: float = 1.0
    spacing: int = 64


def document(lesson: Lesson, text: str, rng: random.Random) -> str:
    """One document.

    Args:
        lesson: its kind and length.
        text: running text, from which passages are cut.
        rng: chooses.
    """
    length = lesson.length
    if lesson.kind == "loop":
        word = _letters(rng, rng.randint(6, length // 2))
        return (word * (length // len(word) + 1))[:length]
    if lesson.kind == "echo":
        return _echo(length, rng)
    if lesson.kind == "drill":
        return _drill(length, rng)
    count = max(1, length // 2 // (lesson.spacing + needles.SIZE))
    half = length // 2 - count * needles.SIZE
    start = rng.randrange(len(text) - half)
    return corpus.row(text[start : start + half], length, rng, needles.draw(rng, count), share=0.7)


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=count))


def _echo(length: int, rng: random.Random) -> str:
    words: list[str] = []
    parts, done = [], 0
    while done < length:
        if words and rng.random() < _AGAIN:
            parts.append(rng.choice(words))
        else:
            parts.append(_letters(rng, rng.randint(4, 10)))
            words.append(parts[-1])
        done += len(parts[-1]) + 1
    return " ".join(parts).ljust(length)[:length]


def _drill(length: int, rng: random.Random) -> str:
    hidden = needles.draw(rng, max(2, length // 2 // needles.SIZE))
    text = " ".join(hidden) + "\n"
    while len(text) < length:
        rng.shuffle(hidden)
        text += "".join(f"{needle}\n" for needle in hidden)
    return text[:length]


def rows(
    lessons: Sequence[Lesson], text: str, *, length: int, planned: int, count: int, seed: int = 0
) -> Iterator[list[str]]:
    """Rows in the order of training, each as its documents.

    Args:
        lessons: at every time at least one of them.
        text: running text to train on.
        length: bytes a row.
        planned: rows over which the lessons spread.
        count: rows wanted; those beyond `planned` go on as it ended.
        seed: of everything.

    Raises:
        ValueError: a length that does not divide the row's, or a time without a lesson.
    """
    uneven = [lesson.length for lesson in lessons if length % lesson.length]
    if uneven:
        raise ValueError(f"lessons: {uneven} do not divide length={length}; they must fill rows")
    rng = random.Random(seed)
    for number in range(count):
        when = number / planned
        live = [x for x in lessons if x.begin <= when and (when < x.end or x.end == 1.0)]
        if not live:
            raise ValueError(f"lessons: there is none at {when:.3f} of the planned rows; add one")
        (lesson,) = rng.choices(live, [x.weight for x in live])
        yield [document(lesson, text, rng) for _ in range(length // lesson.length)]


def write(
    path: Path,
    lessons: Sequence[Lesson],
    text: str,
    *,
    length: int,
    planned: int,
    count: int,
    seed: int = 0,
) -> Path:
    """Writes `rows` as JSON lines with the field `text`; the file is whole or not there."""
    made = rows(lessons, text, length=length, planned=planned, count=count, seed=seed)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        for row in made:
            out.writelines(json.dumps({"text": document}) + "\n" for document in row)
    os.replace(partial, path)
    return path
