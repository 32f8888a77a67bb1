"""Needles: where they lie, which tokens answer, and what counts as right."""

import random
import re

import numpy as np
import pytest

from train import needles
from train.needles import Grid

TEXT = "and he said unto them go up to the mountain and bring wood and build the house. " * 200
GRID = Grid(lengths=(256, 512), depths=(0.1, 0.9), count=3, batch=2)


@pytest.fixture(scope="module")
def made():
    return needles.documents(GRID, TEXT)


def test_names_differ_within_a_row():
    drawn = needles.draw(random.Random(0), 100)
    names = [needle[1:3] for needle in drawn]
    assert len(set(names)) == 100
    assert all(re.fullmatch(r"\[[A-Z]{6}\]", needle) for needle in drawn)


def test_hiding_keeps_the_text():
    hidden = needles.draw(random.Random(1), 4)
    text = needles.hide("the quick brown fox", hidden, random.Random(2))
    for needle in hidden:
        assert text.count(needle) == 1
        text = text.replace(f"{needle} ", "")
    assert text == "the quick brown fox"


def test_documents_ask_for_what_they_hide(made):
    assert len(made) == 2 * 2 * 3
    for document in made:
        row, column = document.cell
        text, length = document.text, GRID.lengths[row]
        assert len(text) == length
        question = text[document.answer - 3 : document.answer + 5]
        assert re.fullmatch(r"\[[A-Z]{6}\]", question)
        assert text.endswith(f"\n{question}")
        first = text.index(question)
        assert first < len(text) - len(question)
        # Half a dozen needles and a word may lie between the wish and the place.
        assert abs(first / length - GRID.depths[column]) < 0.2
        # The name stands nowhere else: the answer cannot be read off another needle.
        assert text.count(question[:3]) == 2


def test_rows_are_documents_side_by_side(made):
    packed = needles.batches(GRID, made)
    seen = []
    for batch, answers in packed:
        assert batch["tokens"].shape == (2, 512)
        for row in range(2):
            segments, positions = batch["segment_ids"][row], batch["positions"][row]
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                assert positions[here].tolist() == list(range(here.sum()))
                (number,) = set(answers[row][here]) - {-1}
                document = made[number]
                assert bytes(batch["tokens"][row][here].astype(np.uint8)).decode() == document.text
                # Four targets, the digits.
                asked = batch["targets"][row][here & (answers[row] >= 0)]
                digits = document.text[document.answer : document.answer + 4]
                assert bytes(asked.astype(np.uint8)).decode() == digits
                seen.append(number)
    assert sorted(seen) == list(range(len(made)))


@pytest.mark.parametrize("wrong", [0, 3])
def test_one_wrong_digit_is_a_wrong_answer(made, monkeypatch, wrong):
    packed = needles.batches(GRID, made)
    victim = next(i for i, document in enumerate(made) if document.cell == (1, 0))

    def hits(model, batch, attention):
        answers = next(a for b, a in packed if b is batch)
        right = np.ones(answers.shape, bool)
        if (answers == victim).any():
            row, place = np.argwhere(answers == victim)[wrong]
            right[row, place] = False
        right[answers < 0] = False  # what is no answer does not count
        return right

    monkeypatch.setattr(needles, "_hits", hits)
    share = needles.evaluate(None, GRID, made, packed, "dense")
    assert share == pytest.approx(np.array([[1, 1], [2 / 3, 1]]))
