"""Runs one stage from its config to its last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from dsa_jax import checkpoint as model_files
from dsa_jax.sharding import batch_spec, make_mesh
from dsa_jax.transformer import Transformer
from train import cluster, data, diagnose, summary
from train.checkpoints import Checkpoints, RunRecord
from train.config import TrainConfig, flat_dict, to_dict
from train.data import Batch, DataPosition
from train.lock import Lock
from train.overlap import compiler_options
from train.signals import StopRequest
from train.sources import Corpus, open_corpus
from train.start import Plan, Start, plan, start
from train.step import StepMetrics, make_step
from train.tracker import ConsoleTracker, JsonlTracker, TensorBoardTracker, Tracker, Trackers
from train.utilization import Profiler, Utilization, peak_memory

EvaluateHook = Callable[[Transformer, int], Mapping[str, Any]]
"""`(model, step) -> metrics`, logged as one `eval` record. The model's arrays are given up to the
next step: a hook must not keep them."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished (or politely interrupted) stage leaves.

    Attributes:
        model: the model with the trained parameters.
        config: the config with every default filled in.
        step: optimizer steps done.
        metrics: the last training record; empty if no step was left to do.
        metrics_path: `metrics.jsonl`.
        checkpoint_dir: the folder of the steps, for a resume or as the next stage's `init_from`.
        model_dir: the exported model, for `dsa_jax.load`; None if interrupted.
        interrupted: SIGTERM or SIGINT ended the stage early, after a save.
    """

    model: Transformer = field(repr=False)
    config: TrainConfig
    step: int
    metrics: Mapping[str, Any]
    metrics_path: Path
    checkpoint_dir: Path
    model_dir: Path | None
    interrupted: bool


def jit_step(run: Plan) -> Any:
    """The stage's step, jitted: the state is given up to it and comes back where it was."""
    return jax.jit(
        make_step(run.config, run.skeleton, run.optimizer),
        donate_argnums=0,
        compiler_options=compiler_options(run.mesh),
        # Metrics are whole on every process, so that one can read them alone.
        out_shardings=(
            jax.tree.map(lambda x: x.sharding, run.state),
            NamedSharding(run.mesh, PartitionSpec()),
        ),
    )


def trace_step(run: Plan) -> Any:
    """The same, traced for batches of the run's size, of which there need not be one."""
    shape = (run.config.batch_size, run.config.sequence_length)
    place = NamedSharding(run.mesh, batch_spec(run.config.rules))
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
    return jit_step(run).trace(run.state, batch)


def compile_step(config: TrainConfig) -> Any:
    """The stage's step, compiled before there is anything to run it on, for `train(step=...)`."""
    config = config.resolved()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return trace_step(plan(config, mesh)).lower().compile()


def train(
    config: TrainConfig,
    *,
    step: Any = None,
    evaluate: EvaluateHook | None = None,
    evaluate_every: int = 0,
    console: Console | None = None,
) -> TrainResult:
    """Trains one stage, resuming it if its folder already holds a checkpoint.

    Args:
        config: the run.
        step: its step, from `compile_step`; None: compiled here.
        evaluate: called after the last step, and as often as `evaluate_every` says.
        evaluate_every: steps between two calls of `evaluate`; 0: only after the last one.
        console: where tables and the progress bar are drawn; None makes one on stderr.

    Returns:
        The trained model and where everything lies.

    Raises:
        ValueError: a config that contradicts itself, the data, the mesh, or the run in `output`;
            another run at work in `output`. In a run of several processes an `AgreedError`.
        NonFiniteError: the loss or a gradient became NaN or infinite.
        SaveError: a checkpoint could not be written.
        CheckpointError: a checkpoint could not be read.
        LockLostError: another run took `output` over while this one was suspended.
    """
    console = console or Console(stderr=True)
    if not cluster.is_primary():
        console = Console(quiet=True)
    with ExitStack() as stack:
        with cluster.together():
            config = config.resolved()
        cluster.require_same("settings", _settings(config))
        with cluster.together():
            mesh = make_mesh(config.mesh)
            run_plan = plan(config, mesh)
            lock = _lock(config, console, stack)
        corpus = _corpus(config)
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(
            closing(
                Checkpoints(
                    config.output / "checkpoints",
                    config.model,
                    config.checkpoint.keep,
                    timeout=config.checkpoint.timeout,
                    before_save=lock.check if lock else lambda: None,
                )
            )
        )
        begun = start(run_plan, checkpoints)
        numbers = summary.show(console, config, begun.state, mesh, begun.origin, begun.notes)
        first = int(begun.state.step)
        log = stack.enter_context(closing(_trackers(config, console, first)))
        log.log("start", first, {"origin": begun.origin, **numbers})
        stop = stack.enter_context(StopRequest())
        step = step or jit_step(run_plan)
        run = _Run(run_plan, begun, corpus, step, checkpoints, log, evaluate, evaluate_every)
        interrupted = run.steps(stop)
        return run.result(interrupted)


def _lock(config: TrainConfig, console: Console, stack: ExitStack) -> Lock | None:
    """Keeps other runs out of the folder; one process does it for all."""
    if not cluster.is_primary():
        return None
    what = f"output={str(config.output)!r}"
    return stack.enter_context(Lock(config.output, what, lambda text: console.print(text)))


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What all processes of a run must have in common."""
    fields = flat_dict(to_dict(config)).items()
    same = {name: value for name, value in fields if not name.startswith("cluster.")}
    return {**same, "jax": jax.__version__, "platform": jax.default_backend()}


def _corpus(config: TrainConfig) -> Corpus:
    """The same data in every process; text is tokenised once, by the first, where they share a
    file system."""

    def read() -> Corpus:
        cache = config.data.token_cache or config.output / "tokens"
        return open_corpus(config.data, config.model.vocab_size, cache)

    corpus = None
    with cluster.together():
        if cluster.is_primary():
            corpus = read()
    with cluster.together():
        corpus = corpus or read()
    cluster.require_same("data (data.sources)", corpus.files)
    return corpus


def _trackers(config: TrainConfig, console: Console, first: int) -> Tracker:
    if not cluster.is_primary():
        return Trackers([])
    name = config.stage.value
    trackers: list[Tracker] = [
        JsonlTracker(config.output / "metrics.jsonl", {"stage": name}),
        ConsoleTracker(console, name, total=config.steps or 0, start=first),
    ]
    if config.log.tensorboard:
        trackers.append(TensorBoardTracker(config.output / "tensorboard", first))
    return Trackers(trackers)


class _Pending(NamedTuple):
    """A step whose numbers are still on the device: read one step late, so nothing waits."""

    step: int
    metrics: StepMetrics
    batch: Batch
    data_seconds: float


class _Run:
    """The loop's moving parts."""

    def __init__(
        self,
        run: Plan,
        begun: Start,
        corpus: Corpus,
        step: Any,
        checkpoints: Checkpoints,
        log: Tracker,
        evaluate: EvaluateHook | None,
        evaluate_every: int,
    ):
        config = run.config
        assert config.batch_size is not None
        assert config.sequence_length is not None
        self.config, self.plan, self.begun, self.corpus = config, run, begun, corpus
        self.checkpoints, self.log, self.evaluate = checkpoints, log, evaluate
        self.evaluate_every = evaluate_every
        self.batch_size, self.length = config.batch_size, config.sequence_length
        self.state = begun.state
        self.first = int(begun.state.step)
        self.first_row = 0
        if begun.position is not None:
            begun.position.check(corpus)
            self.first_row = begun.position.rows_at(self.length)
        self.batch_sharding = NamedSharding(run.mesh, batch_spec(config.rules))
        self.step = step
        self.utilization = Utilization(config, run.mesh.size)
        self.profiler = Profiler(config.log, config.output)
        self.pending: _Pending | None = None
        self.last: dict[str, Any] = {}
        self.clock = time.perf_counter()
        self.saving = 0.0

    def steps(self, stop: StopRequest) -> bool:
        """Runs to the last step, or to a request to stop; returns whether it was the latter."""
        with closing(self.profiler):
            return self._steps(stop)

    def _steps(self, stop: StopRequest) -> bool:
        total, every = self.config.steps or 0, self.evaluate_every
        batches = self._batches()
        for step in range(self.first + 1, total + 1):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            self.profiler.before(step)
            self.state, metrics = self.step(self.state, batch)
            self.profiler.after(step, metrics)
            self._report()
            self.pending = _Pending(step, metrics, batch, waited)
            stopping = stop.after(step, self.checkpoints.manager)
            if stopping or step == total or step % self.config.checkpoint.interval == 0:
                self._report()  # before saving: a state that went wrong is not kept
                self._save(step)
            if step == total or (every and step % every == 0):
                self._report()
                self._evaluate(step)
            self.checkpoints.check()
            if stopping and step < total:
                self.checkpoints.wait()
                self.log.log("interrupted", step, {"checkpoint": str(self.checkpoints.folder)})
                return True
        self.checkpoints.wait()
        return False

    def result(self, interrupted: bool) -> TrainResult:
        """Exports the model of a finished stage and says where everything is."""
        config, model_dir = self.config, None
        model = self.plan.skeleton.model(self.state.params)
        if not interrupted:
            model_dir = config.output / "model"
            if not model_dir.exists():
                model_files.save(model, model_dir)
        return TrainResult(
            model=model,
            config=config,
            step=int(self.state.step),
            metrics=self.last,
            metrics_path=config.output / "metrics.jsonl",
            checkpoint_dir=self.checkpoints.folder,
            model_dir=model_dir,
            interrupted=interrupted,
        )

    def _batches(self) -> Iterator[Batch]:
        shape = (self.batch_size, self.length)
        local = data.batches(
            self.corpus,
            self.config.data,
            length=self.length,
            batch_size=self.batch_size,
            seed=self.config.seed,
            first_row=self.first_row,
            part=data.process_rows(self.batch_sharding, shape),
        )
        return (data.place(batch, self.batch_sharding, self.batch_size) for batch in local)

    def _save(self, step: int) -> None:
        began = time.perf_counter()
        row = self.first_row + (step - self.first) * self.batch_size
        position = DataPosition(row, self.length, self.corpus.files)
        record = RunRecord(to_dict(self.config), position, self.begun.rng)
        self.checkpoints.save(step, self.state, record)
        self.clock = time.perf_counter()
        self.saving = self.clock - began

    def _report(self) -> None:
        """Reads and logs the step that is pending, if one is."""
        if self.pending is None:
            return
        step, on_device, batch, waited = self.pending
        self.pending = None
        values = {name: _plain(value) for name, value in jax.device_get(on_device).items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        values |= {
            "tokens_per_second": self.batch_size * self.length / seconds,
            "seconds": seconds,
            "data_seconds": waited,
            "checkpoint_seconds": self.saving,  # what the save after the step before held up
            **self.utilization.of(seconds),
            **peak_memory(),
        }
        self.saving = 0.0
        if not values.pop("ok"):
            self._explain(step, values, batch)
        self.last = {"step": step, **values}
        if step % self.config.log.interval == 0 or step == self.config.steps:
            self.log.log("train", step, values)

    def _explain(self, step: int, values: dict[str, Any], batch: Batch) -> None:
        self.log.log("train", step, values)
        place = diagnose.locate(self.config, self.plan.skeleton, self.state, batch)
        self.log.log("non_finite", step, {"place": place})
        self.checkpoints.wait()
        latest = self.checkpoints.latest
        good = (
            f"the last good checkpoint is {self.checkpoints.folder / str(latest)}"
            if latest is not None
            else "no checkpoint was saved yet"
        )
        raise diagnose.NonFiniteError(
            f"step {step}: loss {values['loss']}. The first thing that is not finite is {place}. "
            f"Nothing of this step was kept; {good}"
        )

    def _evaluate(self, step: int) -> None:
        if self.evaluate is None:
            return
        found = self.evaluate(self.plan.skeleton.model(self.state.params), step)
        self.log.log("eval", step, dict(found))
        self.clock = time.perf_counter()  # not part of the next step's time


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
