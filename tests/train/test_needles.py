"""Needles: where they lie, which tokens answer, and what counts as right."""

import random
import re
import types
from typing import Any, ClassVar

import jax
import numpy as np
import pytest

from train import needles
from train.controls import Mode
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
    assert [document.row for document in made] == [1, 1, 1, 0, 0, 0]
    orders = set()
    for document in made:
        text, length = document.text, GRID.lengths[document.row]
        assert len(text) == length
        for depth, answer in zip(GRID.depths, document.answers, strict=True):
            question = text[answer - 3 : answer + 5]
            assert re.fullmatch(r"\[[A-Z]{6}\]", question)
            assert text[answer - 4] == "\n"
            first = text.index(question)
            assert first < answer - 3
            # Half a dozen needles and a word may lie between the wish and the place.
            assert abs(first / length - depth) < 0.2
            # The name stands nowhere else: the answer cannot be read off another needle.
            assert text.count(question[:3]) == 2
        # Nothing but questions behind the text, and every one of them counts.
        assert sorted(document.answers) == [length - 14, length - 5]
        orders.add(document.answers[0] < document.answers[1])
    assert orders == {True, False}


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
                numbers = sorted(set(answers[row][here]) - {-1})
                document = made[numbers[0] // 2]
                assert bytes(batch["tokens"][row][here].astype(np.uint8)).decode() == document.text
                for number, first in zip(numbers, document.answers, strict=True):
                    # Four targets: the letters that are not in the question.
                    asked = batch["targets"][row][here & (answers[row] == number)]
                    letters = document.text[first : first + 4]
                    assert bytes(asked.astype(np.uint8)).decode() == letters
                seen += numbers
    assert sorted(seen) == list(range(2 * len(made)))


@pytest.mark.parametrize("wrong", [0, 3])
def test_one_wrong_letter_is_a_wrong_answer(made, monkeypatch, wrong):
    packed = needles.batches(GRID, made)
    victim = 2 * 1 + 1  # the second of the longer documents, the deeper needle

    def run(model, batch, mode):
        answers = next(a for b, a in packed if b is batch)
        right = answers >= 0  # what is no answer does not count
        if (answers == victim).any():
            row, place = np.argwhere(answers == victim)[wrong]
            right[row, place] = False
        return right

    monkeypatch.setattr(needles, "_run", run)
    unused: Any = None
    right = needles.evaluate(unused, GRID, made, packed, Mode("dense", 8))
    assert right.shape == (2, 3, 2)
    assert np.argwhere(~right).tolist() == [[1, 1, 1]]


def test_a_control_takes_the_place_of_the_indexer(made):
    """One program serves them all, and none stands between the indexer and its model."""

    class Model:
        config = types.SimpleNamespace(index_topk=8)
        asked: ClassVar[list] = []

        def __call__(self, tokens, positions, segment_ids, attention, selector):
            self.asked.append((attention, selector is None))
            return types.SimpleNamespace(logits=jax.nn.one_hot(tokens, 256))

    jax.tree_util.register_static(Model)
    model: Any = Model()
    packed = needles.batches(GRID, made)[:1]
    for control in ("dense", "indexer", "random", "recent", "oracle"):
        needles.evaluate(model, GRID, made, packed, Mode(control, 8))
    assert Model.asked == [("dense", True), ("sparse", True), ("sparse", False)]
