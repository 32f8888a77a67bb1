"""What each lesson asks for, and when."""

import itertools
import json
import random
import re

import pytest

from train import corpus, demo_presets, lessons
from train.lessons import Lesson

TEXT = "and he said unto them go up to the mountain and bring wood and build the house. " * 200
PLAN = (
    Lesson("loop", 32, 0.0, 0.5),
    Lesson("drill", 64, 0.25, 0.75),
    Lesson("text", 128, 0.5, 1.0, spacing=16),
)


def document(kind, length, seed=0, **options):
    return lessons.document(Lesson(kind, length, 0, 1, **options), TEXT, random.Random(seed))


def test_a_loop_repeats_itself_and_not_always_at_one_distance():
    periods = set()
    for seed in range(20):
        text = document("loop", 64, seed)
        assert len(text) == 64
        period = next(n for n in range(1, 64) if text[n:] == text[:-n])
        assert 6 <= period <= 32
        periods.add(period)
    assert len(periods) > 5


def test_an_echo_says_words_again_in_another_order():
    text = document("echo", 256)
    assert len(text) == 256
    words = text.split()[:-1]
    assert len(set(words)) < 0.7 * len(words)
    after = {}
    for word, following in itertools.pairwise(words):
        after.setdefault(word, set()).add(following)
    assert any(len(following) > 1 for following in after.values())


def test_a_drill_asks_for_all_it_has_shown_in_another_order():
    text = document("drill", 128)
    assert len(text) == 128
    shown, *rounds = text.split("\n")
    hidden = shown.split(" ")
    assert len(hidden) == 128 // 2 // 9
    assert sorted(rounds[: len(hidden)]) == sorted(hidden)
    assert rounds[: len(hidden)] != hidden


def test_running_text_hides_needles_and_asks_for_them():
    text = document("text", 512, spacing=32)
    assert len(text) == 512
    passage, _, rest = text.partition("\n")
    needle = re.compile(r"\[[A-Z]{6}\]")
    hidden = needle.findall(passage)
    assert len(hidden) == 512 // 2 // (32 + 9)
    assert re.sub(r"\[[A-Z]{6}\] ", "", passage) in TEXT
    asked = needle.findall(rest)
    assert len(asked) > rest.count(corpus.QUOTE) / 2, "more questions than quotations"
    assert set(asked) <= set(hidden)


def rows(count=40, **options):
    return list(lessons.rows(PLAN, TEXT, length=128, planned=40, count=count, **options))


def test_lessons_come_in_their_time_and_fill_rows():
    made = rows()
    assert all(sum(map(len, row)) == 128 for row in made)
    sizes = [len(row[0]) for row in made]
    assert set(sizes[:10]) == {32}
    assert set(sizes[10:20]) == {32, 64}
    assert set(sizes[20:30]) == {64, 128}
    assert set(sizes[30:]) == {128}


def test_rows_beyond_the_plan_go_on_as_it_ended():
    longer = rows(count=50)
    assert longer[:40] == rows()
    assert {len(row) for row in longer[40:]} == {1}


def test_the_seed_decides():
    assert rows() == rows()
    assert rows(seed=1) != rows()


def test_weights_decide_between_lessons_of_one_time():
    plan = (Lesson("loop", 32, 0, 1, weight=9.0), Lesson("loop", 64, 0, 1, weight=1.0))
    made = list(lessons.rows(plan, TEXT, length=64, planned=200, count=200))
    often = sum(len(row) == 2 for row in made)
    assert 160 <= often < 200


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match=r"\[48\] do not divide length=128"):
        next(lessons.rows([Lesson("loop", 48, 0, 1)], TEXT, length=128, planned=1, count=1))
    with pytest.raises(ValueError, match=r"none at 0\.500"):
        list(lessons.rows([Lesson("loop", 32, 0, 0.5)], TEXT, length=128, planned=4, count=4))


def test_the_file_holds_the_rows_in_their_order(tmp_path):
    path = lessons.write(
        tmp_path / "rows.jsonl", PLAN, TEXT, length=128, planned=40, count=40, seed=1
    )
    read = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert read == [document for row in rows(seed=1) for document in row]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_gpu_preset_has_a_lesson_at_every_time():
    preset = demo_presets.PRESETS["gpu"]()
    assert preset.lessons
    made = lessons.rows(preset.lessons, TEXT, length=preset.length, planned=60, count=70)
    for row in made:
        assert sum(map(len, row)) == preset.length
        assert "".join(row).isascii()
