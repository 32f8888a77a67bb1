"""The demo from its command to its report, at the smallest size that still selects keys."""

import dataclasses
import io
import json
import os
import signal
from concurrent.futures import BrokenExecutor
from contextlib import closing

import jax
import numpy as np
import pytest
from rich.console import Console

from dsa_jax import presets
from train import corpus, demo, demo_presets, demo_seed, examiners, report
from train.__main__ import main
from train.checkpoints import Checkpoints
from train.cost import LayerShape
from train.demo_evaluation import Exam
from train.demo_presets import PRESETS, StagePlan
from train.demo_seed import Seed, changed_arrays
from train.ladder import ASKED, LADDER, LONG, SWEEP
from train.laps import Laps
from train.lessons import Lesson
from train.load import load_model, starting_model
from train.needles import Grid
from train.stages import Stage
from train.tracker import read_metrics


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name):
    preset = PRESETS[name]()
    topk = preset.model.index_topk
    assert topk * 4 <= preset.length < preset.long_length
    assert preset.long_length <= preset.model.max_position_embeddings
    assert preset.buckets[0] == topk
    assert preset.buckets[-1] == preset.long_length
    assert preset.length in preset.buckets
    assert list(preset.buckets) == sorted(set(preset.buckets))
    assert topk not in preset.sweep
    assert not any(preset.length % lesson.length for lesson in preset.lessons)
    if preset.needles is not None:
        assert preset.length in preset.needles.lengths
        assert max(preset.needles.lengths) <= preset.model.max_position_embeddings
    assert max(preset.cost_positions) > 2 * preset.cost_shape.topk > 2 * min(preset.cost_positions)
    # The published layer does 17 operations of dense attention for each of the indexer.
    assert preset.cost_shape.mqa_flop / preset.cost_shape.indexer_flop == 17


@pytest.mark.parametrize(("hopper", "chosen"), [(True, "gpu"), (False, "cpu")])
def test_the_machine_decides_unless_told(monkeypatch, hopper, chosen):
    monkeypatch.setattr(demo.dispatch, "hopper_is_default", lambda: hopper)
    assert demo.preset_name(demo.DemoConfig()) == chosen
    assert demo.preset_name(demo.DemoConfig(preset="cpu")) == "cpu"
    assert demo.preset_name(demo.DemoConfig(smoke=True)) == "smoke"


# --- folders --------------------------------------------------------------------------------------


def test_a_fresh_folder_is_claimed_and_an_unfinished_one_continued(tmp_path):
    settings = {"preset": "cpu", "sizes": [1, 2], "seeds": 1}
    first = demo.claim_folder(tmp_path / "demo", settings)
    assert first == tmp_path / "demo"
    (first / "seed-0").mkdir()
    assert demo.claim_folder(tmp_path / "demo", settings) == first


def test_another_or_a_finished_demo_is_left_alone(tmp_path):
    first = demo.claim_folder(tmp_path / "demo", {"seeds": 1})
    second = demo.claim_folder(tmp_path / "demo", {"seeds": 3})
    assert second == tmp_path / "demo-2"
    (first / "report.md").write_text("done")
    assert demo.claim_folder(tmp_path / "demo", {"seeds": 1}) == tmp_path / "demo-3"
    assert json.loads((first / "settings.json").read_text()) == {"seeds": 1}
    assert (first / "report.md").read_text() == "done"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("precious")
    assert demo.claim_folder(tmp_path / "demo", {}) == tmp_path / "demo-2"


def test_no_seed_is_refused(tmp_path, capsys):
    output = str(tmp_path / "demo")
    assert main(["demo", "--seeds", "0", "--output", output]) == 1
    assert "seeds=0" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


# --- the whole ------------------------------------------------------------------------------------


def tiny_preset():
    smoke = demo_presets._smoke()
    model = presets.get("tiny").replace(
        vocab_size=264, num_hidden_layers=2, first_k_dense_replace=0, index_topk=4
    )
    return dataclasses.replace(
        smoke,
        model=model,
        length=64,
        long_length=96,
        batch_size=4,
        dense=StagePlan(4, rate=1e-2, indexer_rate=0.0),
        warmup=StagePlan(3, rate=0.0, indexer_rate=1e-2),
        sparse=StagePlan(3, rate=1e-3, indexer_rate=1e-3),
        scored_rows=4,
        score_batch=2,
        sweep=(8,),
        local=4,
        buckets=(4, 32, 64, 96),
        lessons=(
            Lesson("loop", 16, 0.0, 0.3),
            Lesson("echo", 32, 0.2, 0.5),
            Lesson("drill", 32, 0.3, 0.8),
            Lesson("text", 64, 0.6, 1.0),
        ),
        needles=Grid((64, 96), (0.2, 0.8), 2, 2),
        sample_length=72,
        picture_length=48,
        compile_ahead=True,
        cost_shape=LayerShape(
            heads=2, latent=16, rotary=8, indexer_heads=2, indexer_width=4, topk=8
        ),
        cost_positions=(8, 32),
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A little Bible of seven books."""
    rng = np.random.default_rng(0)
    words = ["and", "the", "king", "of", "Israel", "went", "up", "to", "house", "David"]
    verses = [
        {"book": book, "text": " ".join(rng.choice(words, 12)) + "."}
        for book in (*corpus.HELD_OUT, "Genesis", "Exodus")
        for _ in range(12)
    ]
    path = tmp_path_factory.mktemp("source") / "kjv.jsonl"
    path.write_text("".join(json.dumps(verse) + "\n" for verse in verses))
    return path


def run_demo(source, output):
    """The tiny demo; returns its folder and what the terminal showed."""
    console = Console(record=True, width=120, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "locate", lambda: source)
        patch.setitem(demo_presets.PRESETS, "smoke", tiny_preset)
        folder = demo.run(demo.DemoConfig(output=output, smoke=True), console)
    return folder, console.export_text()


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A finished demo's folder, and what the terminal showed."""
    return run_demo(source, tmp_path_factory.mktemp("demo") / "run")


def test_the_results_have_every_rung(finished):
    folder, _ = finished
    (run,) = json.loads((folder / "results.json").read_text())["runs"]
    assert list(run["ladder"]) == [rung.name for rung in LADDER]
    assert set(run["long_ladder"]) == set(LONG)
    assert set(run["sweep"]) == {"4", "8"}
    assert all(set(losses) == set(SWEEP) for losses in run["sweep"].values())
    for numbers in run["ladder"].values():
        assert 0 < numbers["cross_entropy"] < 20
        assert 0 < numbers["quoted_loss"] < 20
    grid = tiny_preset().needles
    asked = run["needles"]
    assert set(asked["accuracy"]) == set(asked["documents"]) == set(ASKED)
    assert np.shape(asked["accuracy"]["sparse"]) == (len(grid.lengths), len(grid.depths))
    assert np.shape(asked["documents"]["sparse"]) == (len(grid.lengths), grid.count)


def test_the_stages_are_what_they_claim(finished):
    folder, _ = finished
    (run,) = json.loads((folder / "results.json").read_text())["runs"]
    assert run["checks"]["changed_frozen_arrays"] == 0
    # fp32 rounding of the dense and the sparse path.
    assert run["checks"]["all_keys_difference"] < 1e-4
    assert run["checks"]["all_keys_differing_rows"] == 0
    # Warm-up leaves the main model alone: dense attention on both is one and the same.
    ladder = run["ladder"]
    assert ladder["warmed_all"]["cross_entropy"] == pytest.approx(
        ladder["dense"]["cross_entropy"], abs=1e-5
    )
    # ... and does change the indexer, while the other two stages change the model.
    assert ladder["warmed_all"]["layers"]["kl"] != ladder["dense"]["layers"]["kl"]
    losses = {ladder[rung]["cross_entropy"] for rung in ("dense", "sparse_all", "control")}
    assert len(losses) == 3


def test_sparse_training_and_its_control_see_the_same_tokens(finished):
    folder, _ = finished
    (run,) = json.loads((folder / "results.json").read_text())["runs"]
    stages = run["stages"]
    losses, positions = [], []
    for name in ("sparse", "control"):
        losses.append(
            [r["lm_loss"] for r in read_metrics(folder / stages[name]["metrics"], "train")]
        )
        with closing(
            Checkpoints(folder / stages[name]["checkpoint"], tiny_preset().model)
        ) as checkpoints:
            record = checkpoints.record(3)
        positions.append((record.position, record.config["data"], record.config["seed"]))
    # Same weights, same tokens, another attention.
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[0][0] != losses[1][0]
    assert positions[0] == positions[1]


def test_everything_is_on_disk(finished):
    folder, text = finished
    assert "do not hold" in (folder / "report.md").read_text() or "All of them hold" in text
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 4 + 3 + 3 + 3
    assert {record["run"] for record in steps} == {"dense", "warmup", "sparse", "control"}
    assert sum(record["kind"] == "ladder" for record in records) == len(LADDER)
    for name in ("dense", "warmup", "sparse", "control"):
        checkpoint = folder / "seed-0" / name / "checkpoints"
        assert checkpoint.is_dir()
        assert str(checkpoint) in text.replace("\n", "")
    assert "Held-out text" in text
    assert "Claims" in text


def test_a_demo_that_was_stopped_goes_on(finished, source):
    """After the last stage, before the report: no step is taken again, and all numbers agree."""
    folder, _ = finished
    old = json.loads((folder / "results.json").read_text())
    for name in ("report.md", "results.json", "metrics.jsonl"):
        (folder / name).unlink()
    again, text = run_demo(source, folder)
    assert again == folder
    assert "resumed" in text
    new = json.loads((folder / "results.json").read_text())
    for key in ("ladder", "long_ladder", "sweep", "checks", "stages", "sample"):
        assert new["runs"][0][key] == old["runs"][0][key], key


class Excerpt(Exam):
    """Two questions about one model."""

    def questions(self):
        for q in super().questions():
            if q.rung.name == "sparse" and q.kind in ("ladder", "needles"):
                yield q


def seed_of(folder, source, preset):
    """The one seed of a finished demo in `folder`, to be run again."""
    text = corpus.write(
        folder / "text", length=64, held_out_lengths=preset.held_out_lengths, hide=True,
        source=source,
    )  # fmt: skip
    text = text._replace(train=folder / "text" / "lessons.jsonl")
    return Seed(preset, folder, text, 0, Console(quiet=True), Laps())


def test_examiners_answer_as_the_demo_itself_does(finished, source):
    """... until one dies: then it says so, of what it was asked before and is asked after."""
    folder, _ = finished
    (run,) = json.loads((folder / "results.json").read_text())["runs"]
    preset = tiny_preset()
    seed = seed_of(folder, source, preset)
    config = seed.config("control", Stage.DENSE, preset.sparse, None)
    trained = dataclasses.replace(config, init_from=folder / "seed-0" / "sparse" / "checkpoints")
    exam = Excerpt(preset, seed.text, root=folder, seed=0)
    with examiners.Examiners(exam, config, count=1) as asked:
        asked.hand_in("sparse", trained)
        steps, found = (asked.answer(q) for q in exam.questions())
        os.kill(asked._processes[0].result(), signal.SIGKILL)
        with pytest.raises(BrokenExecutor):
            asked._pools[0].submit(os.getpid).result(timeout=30)
        asked.hand_in("sparse", trained)
        for q in exam.questions():
            with pytest.raises(BrokenExecutor):
                asked.answer(q)
    wanted = run["ladder"]["sparse"]
    assert steps.cross_entropy == pytest.approx(wanted["cross_entropy"], rel=1e-6)
    assert steps.summary()["mass_recall"] == pytest.approx(wanted["mass_recall"], rel=1e-6)
    assert found.mean(axis=2).tolist() == run["needles"]["documents"]["sparse"]


class Examiner(examiners.Examiners):
    """In this process, from what was handed in; it dies at the first question about needles."""

    def __init__(self, exam, config, *, kernels):
        self.exam, self.handed_in, self.answered, self.alive = exam, {}, 0, True

    def hand_in(self, name, config):
        self.handed_in[name] = config

    def answer(self, q):
        self.alive = self.alive and q.kind != "needles"
        if not self.alive:
            raise BrokenExecutor("died")
        self.answered += 1
        return self.exam.answer(q, starting_model(self.handed_in[q.rung.weights]))

    def __exit__(self, *error):
        if error[0] is None:
            assert self.answered > 1
            assert not self.alive


def test_a_run_with_examiners_finds_the_same(finished, source, monkeypatch):
    """Whether they answer, from checkpoints, or die and the demo does, from the models it has."""
    folder, _ = finished
    (old,) = json.loads((folder / "results.json").read_text())["runs"]
    monkeypatch.setattr(demo_seed, "Examiners", Examiner)
    preset = dataclasses.replace(tiny_preset(), examiners=True, compile_ahead=False)
    with demo._quick_compiles():
        new = json.loads(json.dumps(seed_of(folder, source, preset).run()))
    for key in ("ladder", "long_ladder", "sweep", "needles", "checks"):
        assert new[key] == old[key], key


def test_the_report_can_be_written_again(finished):
    folder, _ = finished
    before = (folder / "report.md").read_text()
    assert report.write(folder).read_text() == before


def test_changed_arrays_sees_one_bit(finished):
    folder, _ = finished
    model = load_model(folder / "seed-0" / "warmup")
    assert changed_arrays(model, model) == 0
    leaves, tree = jax.tree.flatten(model)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.flatten_with_path(model)[0]]
    main = next(i for i, path in enumerate(paths) if "indexer" not in path)
    indexer = next(i for i, path in enumerate(paths) if "indexer" in path)
    for place, expected in ((main, 1), (indexer, 0)):
        changed = list(leaves)
        flat = np.array(changed[place]).reshape(-1)
        flat[-1] = np.nextafter(flat[-1], np.inf)
        changed[place] = flat.reshape(leaves[place].shape)
        assert changed_arrays(model, jax.tree.unflatten(tree, changed)) == expected


def test_a_model_is_found_in_whatever_a_run_left(finished):
    folder, _ = finished
    stage = folder / "seed-0" / "sparse"
    export = load_model(stage / "model", compute_dtype="float32")
    for place in (stage, stage / "checkpoints" / "3"):
        other = load_model(place, compute_dtype="float32")
        assert other.config == export.config
        assert other.dtype == export.dtype
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(export), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not load_model(folder / "seed-0" / "dense").config.has_indexer
    with pytest.raises(FileNotFoundError, match="holds no model"):
        load_model(folder / "text")


def test_the_evaluate_command_agrees_with_the_demo(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal wraps the headings
    folder, _ = finished
    run = folder / "seed-0" / "sparse"
    output = folder / "evaluation.json"
    arguments = ["evaluate", str(run), "--controls", "indexer", "--output", str(output)]
    arguments += ["--sequence-length", "64", "--rows", "4", "--batch-size", "2", "--local", "4"]
    arguments += ["--compute-dtype", "float32", "--data.no-mark-start", "--data.no-mark-end"]
    arguments += ["--data.sources", str(folder / "text" / "held-out-64.jsonl")]
    assert main(arguments) == 0
    assert "nats/token" in capsys.readouterr().out
    found = json.loads(output.read_text())["indexer"]
    (seed,) = json.loads((folder / "results.json").read_text())["runs"]
    wanted = seed["ladder"]["sparse"]
    assert found["cross_entropy"] == pytest.approx(wanted["cross_entropy"], abs=1e-5)
    assert found["layers"]["mass_recall"] == pytest.approx(wanted["layers"]["mass_recall"], 1e-4)
