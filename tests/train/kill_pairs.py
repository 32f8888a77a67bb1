"""Kills one of two processes at random moments; what is resumed ends bit-equal to a run left alone.

    PYTHONPATH=. python tests/train/kill_pairs.py --rounds 20

A round starts both processes, waits for a random number of steps and then for a random part of a
second, and kills one: its worker, or the parent that a launcher sees. The other one must end by
itself, with a sentence, within `pair_runs.BOUND` seconds; `START` more if one was killed before
both had come together. Checkpoints are written at every step, so most kills fall into a save. Every
round starts where the last kill has left the folder.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from pair_runs import BOUND, START, Group, flags
from small_runs import token_file

from dsa_jax.layer_tree import flatten
from train.supervise import LOST
from train.tracker import read_metrics


def child_of(pid: int) -> int | None:
    """The worker that a supervisor has forked; None if there is none yet."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def kill_round(
    group: Group,
    metrics: Path,
    steps: int,
    pause: float,
    victim: int,
    worker: bool,
    how: signal.Signals = signal.SIGKILL,
) -> str:
    """Kills one process of the group some steps from now; returns what happened, in words.

    Args:
        group: just started.
        metrics: of its run.
        steps: after how many steps; 0: while it starts.
        pause: seconds after that.
        victim: which process.
        worker: the one that computes, not its parent.
        how: SIGSTOP leaves all its connections open, as a frozen host does: only its missing
            heartbeat tells.

    Raises:
        AssertionError: the other one did not end by itself, or without a sentence.
    """
    done = max((r["step"] for r in _records(metrics)), default=0)
    if steps:
        group.until_step(metrics, done + steps)
    time.sleep(pause)
    process = group.workers[victim]
    target = (child_of(process.pid) if worker and process.poll() is None else None) or process.pid
    if process.poll() is None:
        os.kill(target, how)
    began = time.monotonic()
    other = 1 - victim
    code = group.wait_for(other, BOUND if steps else START + BOUND)
    seconds = time.monotonic() - began
    if code == 0:
        return "both had finished"
    assert code == LOST, f"{code}\n{group.said()}"
    said = group.logs[other].read_text()
    assert "another process of the run is lost" in said or "come together" in said, said[-2000:]
    return f"{how.name} to process {victim}, the other ended {seconds:.1f} s later"


def kill_rounds(folder: Path, rounds: int, seed: int, **fields: object) -> list[str]:
    """All of it; returns a line a round.

    Raises:
        AssertionError: a round went wrong, or the end differs from a run left alone.
    """
    rng = random.Random(seed)
    tokens = token_file(folder)
    whole = Group(folder, flags(folder, tokens, "whole", **fields))
    assert whole.wait(300) == [0, 0], whole.said()
    metrics = folder / "cut" / "metrics.jsonl"
    lines = []
    for number in range(rounds):
        group = Group(folder, flags(folder, tokens, "cut", **fields))
        steps, pause = rng.choice([0, 1, 1, 2, 3]), rng.uniform(0, 0.5)
        if steps == 0:
            pause = rng.uniform(5, 15)  # while it starts
        lines.append(
            f"round {number + 1}: "
            + kill_round(
                group,
                metrics,
                steps,
                pause,
                victim=rng.randrange(2),
                worker=rng.random() < 0.5,
            )
        )
        print(lines[-1], checkpoints(folder / "cut"), flush=True)
    last = Group(folder, flags(folder, tokens, "cut", **fields))
    assert last.wait(300) == [0, 0], last.said()
    compare(folder / "whole", folder / "cut")
    starts = read_metrics(metrics, "start")
    lines.append(f"started from steps {[r['step'] for r in starts]}; all bit-equal at the end")
    return lines


def checkpoints(run: Path) -> list[str]:
    """What lies in the folder of checkpoints, drafts included."""
    folder = run / "checkpoints"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def compare(one: Path, other: Path) -> None:
    """Raises AssertionError unless model and metrics of two runs are equal, bit for bit."""
    from dsa_jax import checkpoint

    ours, theirs = (flatten(checkpoint.load(run / "model")) for run in (one, other))
    assert set(ours) == set(theirs)
    for path, leaf in ours.items():
        assert bytes(memoryview(leaf)) == bytes(memoryview(theirs[path])), path
    losses = [
        [(r["step"], r["loss"], r["gradient_norm_indexer"]) for r in _records(run)]
        for run in (one / "metrics.jsonl", other / "metrics.jsonl")
    ]
    assert losses[0] == losses[1]


def _records(metrics: Path) -> list[dict]:
    return read_metrics(metrics, "train") if metrics.exists() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        print(kill_rounds(Path(folder), given.rounds, given.seed, steps=given.steps)[-1])
