"""Stages and configs: what derives from a stage, what is refused, what a resume may change."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from small_runs import MODEL, config

from dsa_jax import presets
from train import __main__
from train.__main__ import parse
from train.config import (
    BranchConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    differences,
    to_dict,
)  # fmt: skip
from train.stages import Group, Stage, group_of, split
from train.state import skeleton_of


def test_everything_derives_from_the_stage():
    said = {
        stage: (stage.attention, stage.indexer_loss, stage.lm_loss, stage.trainable)
        for stage in Stage
    }
    assert said == {
        Stage.DENSE: ("dense", None, True, (Group.MAIN,)),
        Stage.WARMUP: ("dense", "dense", False, (Group.INDEXER,)),
        Stage.SPARSE: ("sparse", "sparse", True, (Group.MAIN, Group.INDEXER)),
    }
    assert [s for s in Stage if s.balances_experts] == [Stage.DENSE, Stage.SPARSE]


@pytest.mark.parametrize(
    ("stage", "rate", "steps", "batch", "tokens"),
    [(Stage.WARMUP, 1e-3, 1000, 16, 2.1e9), (Stage.SPARSE, 7.3e-6, 15_000, 480, 943.7e9)],
)
def test_published_numbers_are_the_defaults(stage, rate, steps, batch, tokens):
    run = TrainConfig(stage=stage, model=presets.get("deepseek-v3.2-exp")).resolved()
    assert run.optimizer.main.learning_rate == run.optimizer.indexer.learning_rate == rate
    assert (run.steps, run.batch_size, run.sequence_length) == (steps, batch, 131_072)
    # The report rounds to 2.1 B and 943.7 B.
    assert run.steps * run.batch_size * run.sequence_length == pytest.approx(tokens, rel=2e-3)
    assert run.model.index_topk == 2048
    assert (run.optimizer.beta1, run.optimizer.beta2) == (0.9, 0.95)


def test_groups_of_a_real_model():
    for model, indexers in ((MODEL, 5), (MODEL.without_indexer(), 0)):
        shapes = skeleton_of(config(Stage.DENSE, model=model)).shapes
        counts = {g: sum(group_of(path) is g for path in shapes) for g in Group}
        assert counts[Group.INDEXER] == indexers
        assert counts[Group.BALANCE] == 1
        chosen, rest = split(shapes, (Group.INDEXER,))
        assert all("/indexer/" in path for path in chosen)
        assert {**chosen, **rest} == shapes


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        (Stage.SPARSE, {"micro_batches": 3}, r"micro_batches=3: must divide batch_size=8"),
        (Stage.WARMUP, {"bias_update_speed": 0.1}, r"bias_update_speed=0\.1: stage=warmup freezes"),
        (Stage.SPARSE, {"steps": 0}, r"steps=0: must be at least 1"),
        (Stage.SPARSE, {"kl_coefficient": -1.0}, r"kl_coefficient=-1\.0: must be above 0"),
        (Stage.WARMUP, {"kl_coefficient": 0.0}, r"kl_coefficient=0\.0: must be above 0"),
        (Stage.SPARSE, {"checkpoint": CheckpointConfig(keep=0)}, r"checkpoint\.keep=0"),
        (Stage.SPARSE, {"sequence_length": 600}, r"sequence_length=600.*max_position_embeddings"),
        (Stage.DENSE, {"remat": "some"}, r"remat='some'"),
        (Stage.DENSE, {"seed": -1}, r"seed=-1: must lie in \[0, 2\*\*32\)"),
        (Stage.DENSE, {"seed": 2**32}, r"seed=4294967296"),
        (Stage.DENSE, {"data": DataConfig(threads=-1)}, r"data\.threads=-1: must be at least 0"),
        (Stage.DENSE, {"data": DataConfig(prefetch=0)}, r"data\.prefetch=0: must be at least 1"),
        (Stage.WARMUP, {"model": MODEL.without_indexer()}, r"stage='warmup': trains indexers"),
    ],
)
def test_contradictions_are_named(stage, fields, message):
    with pytest.raises(ValueError, match=message):
        config(stage, **fields)


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "wrong", "fine"),
    [
        ("main.learning_rate", (-1e-3, NAN, float("inf")), (0.0, 1e30)),
        ("indexer.weight_decay", (-0.1, NAN), (0.0,)),
        ("main.clip", (0.0, -1.0, NAN), (float("inf"),)),
        ("beta1", (1.0, -0.1, NAN), (0.0,)),
        ("beta2", (2.0, NAN), (0.999,)),
        ("epsilon", (0.0, -1e-8, NAN), (10.0,)),
        ("warmup_fraction", (3.0, -0.1, NAN), (0.0, 1.0)),
        ("final_fraction", (7.0, NAN), (0.0, 1.0)),
    ],
)
def test_numbers_that_adam_cannot_take_are_refused(field, wrong, fine):
    def run(value):
        branch, _, name = field.rpartition(".")
        change = {name: value}
        if branch:
            change = {branch: BranchConfig(**change)}
        return config(Stage.SPARSE, optimizer=OptimizerConfig(**change))

    for value in wrong:
        with pytest.raises(ValueError, match=rf"optimizer\.{re.escape(field)}={value!r}: "):
            run(value)
    for value in fine:
        run(value)


def test_differences_leave_out_what_a_resume_may_change():
    a = config(Stage.SPARSE)
    b = dataclasses.replace(
        a,
        output=Path("elsewhere"),
        checkpoint=CheckpointConfig(interval=7),
        seed=1,
        model=a.model.replace(index_topk=9),
    )
    assert differences(to_dict(a), to_dict(b)) == {"model.index_topk": (8, 9), "seed": (0, 1)}


def test_command_line():
    line = (
        "--stage sparse --model tiny --model.index-topk 4 --steps 3 --mesh.fsdp 2 "
        "--optimizer.indexer.learning-rate 1e-3 --data.sources a.txt b.txt --output out"
    )
    run = parse(line.split())
    assert run.stage is Stage.SPARSE
    assert run.model == presets.get("tiny").replace(index_topk=4)
    assert (run.steps, run.mesh.fsdp, run.output) == (3, 2, Path("out"))
    assert run.optimizer.indexer.learning_rate == 1e-3
    assert run.optimizer.main.learning_rate is None
    assert run.data.sources == ("a.txt", "b.txt")
    with pytest.raises(ValueError, match=r"--model nonesuch.*deepseek-v3\.2-exp"):
        parse(["--model", "nonesuch"])


def test_a_file_that_the_system_refuses_is_named_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__main__._COMMANDS, "run", lambda _: (tmp_path / "no" / "such").mkdir())
    assert __main__.main(["run"]) == 1
    assert "no/such" in "".join(capsys.readouterr().err.split())
    monkeypatch.setitem(__main__._COMMANDS, "run", lambda _: os.kill(os.getpid(), 99999))
    with pytest.raises(OSError, match="Invalid argument"):  # names no file: not for the user
        __main__.main(["run"])


def test_every_field_has_help(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    # The model's own fields are explained where they are defined.
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    flags = [i for i, line in enumerate(lines) if re.match(r"--(?!model\.)[a-z]", line)]
    assert len(flags) > 40
    silent = [lines[i] for i in flags if lines[i + 1].startswith(("(default", "--", "─"))]
    assert not silent
