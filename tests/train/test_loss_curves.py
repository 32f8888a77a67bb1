"""When curves count as equal: measured against what one rounding of the weights does."""

import json

import numpy as np
import pytest

from benchmarks import loss_curves
from benchmarks.loss_curves import LIMIT, STAGES, compare
from train import corpus


def curves(kernels, moved):
    steps = np.linspace(5, 3, 40)
    sign = np.where(np.arange(40) % 2, 1, -1)  # above and below by turns, as drifting runs are
    far = {"xla": 0.0, "moved": moved, "kernels": kernels}
    return {
        name: {stage.value: (steps + x * sign).tolist() for stage in STAGES}
        for name, x in far.items()
    }


def test_within_the_noise_is_equal_and_beyond_it_is_not():
    found = compare(curves(kernels=0.9 * LIMIT * 0.01, moved=0.01))
    assert all(stage["equal"] for stage in found.values())
    assert found["dense"]["moved"] == pytest.approx(0.01)
    found = compare(curves(kernels=1.1 * LIMIT * 0.01, moved=0.01))
    assert not any(stage["equal"] for stage in found.values())


def test_the_curves_are_drawn(tmp_path):
    found = curves(kernels=0.01, moved=0.01)
    path = tmp_path / "curves.png"
    loss_curves.draw({"curves": found, "distances": compare(found)}, path)
    assert path.stat().st_size > 10_000


def test_every_stage_has_rows_of_its_own(tmp_path, monkeypatch):
    source = tmp_path / "kjv.jsonl"
    verse = "and he said unto them go up to the mountain and bring wood and build the house. "
    books = {book: verse * 40 for book in (*corpus.HELD_OUT, "Genesis")}
    lines = [json.dumps({"book": book, "text": text}) for book, text in books.items()]
    source.write_text("\n".join(lines))
    monkeypatch.setattr(corpus, "locate", lambda: source)
    texts = list(loss_curves.batches(tmp_path / "text"))
    assert len(texts) == len(STAGES)
    shape = (loss_curves.STEPS, loss_curves.ROWS, loss_curves.LENGTH)
    rows = {row.tobytes() for text in texts for row in text["tokens"].reshape(-1, shape[-1])}
    assert all(values.shape == shape for text in texts for values in text.values())
    assert len(rows) == len(STAGES) * loss_curves.STEPS * loss_curves.ROWS


def test_the_stages_are_the_demos():
    for stage in STAGES:
        config = loss_curves.config(stage)
        assert config.stage is stage
        assert config.model.index_topk * 4 <= config.sequence_length
