"""Both stages of training on two GPUs of one host, against one: losses, speed, communication.

    python -m benchmarks.two_gpus --json FILE
    python -m benchmarks.two_gpus --tiny --json FILE       # the same on two CPU devices
    python -m benchmarks.two_gpus --needs --json FILE      # memory of the large models, without GPU

Six parts:

- `exact`: a tiny model in fp32, whose losses are equal but for the order of sums.
- `small`: a model that one GPU holds too, by fsdp 2, expert 2 and context 2. The losses of the
  first steps are compared with those of one GPU, and so is the speed: scaling efficiency is the
  time of a step on one GPU over twice that on two.
- `checkpoint`: a state saved on two GPUs and resumed on one; both take one more step.
- `large`: for each stage a model that one GPU cannot train. `--needs` compiles it for one GPU and
  for two, and says what each needs. Losses of the meshes are compared with those of the first.
- `overlap`: the small model's sparse stage on two GPUs under options of the compiler that let
  collectives run beside computation: fsdp 2 under all of them, other meshes under some.
- `rows`: the small model's sparse stage by expert 2, and other ways of the rows to their experts.

Each row of the result has the wall time of a step, and what CUPTI saw of one: the time in NCCL's
kernels and in all others, a GPU's mean. Communication is exposed where a step takes longer than
the other kernels do; launch gaps count as exposed too, and so they do in the row of one GPU.

Every case is a process of its own (`benchmarks.mesh_case`): all compile side by side, without
autotuning, and one after the other has its turn, in which no other computes. A case that hangs is
asked where, and killed. A machine without a GPU can compile them beforehand, by `--prepare FOLDER`;
`--programs FOLDER` runs what it finds there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Autotuning takes longer than all runs together.
FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")
MESHES = ("fsdp 2", "expert 2", "context 2")
STAGES = ("sparse", "warmup")
PARTS = ("exact", "small", "checkpoint", "large", "overlap", "rows")


@dataclass(frozen=True)
class Case:
    """One program, or with a mesh `resumed` two: what is saved on two GPUs goes on on one.

    Attributes:
        model: `exact`, `small`, `large` or `tiny`.
        stage: of training.
        mesh: a key of `MESHES`.
        options: of the compiler, as `XLA_FLAGS` names them.
        label: of the options.
        ragged: whether rows travel to their experts by `ragged_all_to_all`.
        room: `expert_parallel.ROOM`.
        variables: of the process's environment.
        steps: to run, the first untimed.
        programs: folder with programs that `--prepare` has compiled.
    """

    model: str
    stage: str
    mesh: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    ragged: bool = False
    room: float = 2.0
    variables: dict[str, str] = field(default_factory=dict)
    steps: int = 4
    programs: str = ""

    @property
    def meshes(self) -> tuple[str, ...]:
        """Of its programs."""
        return ("fsdp 2", "one") if self.mesh == "resumed" else (self.mesh,)

    @property
    def name(self) -> str:
        """`small sparse fsdp 2`."""
        return " ".join(filter(None, (self.model, self.stage, self.mesh, self.label)))


def environment_of(case: Case) -> dict[str, str]:
    """What JAX reads when it starts."""
    if case.model == "tiny":
        flags = "--xla_force_host_platform_device_count=2"
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    options = [f"--{name}={_text(value)}" for name, value in case.options.items()]
    flags = " ".join((*FLAGS, *options, os.environ.get("XLA_FLAGS", "")))
    precise = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"} if case.model == "exact" else {}
    return {
        "XLA_FLAGS": flags,
        # Other cases wait on the same GPUs: memory is taken as it is needed. What is taken doubles
        # each time, so that the large model needs the limit raised.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        **precise,
        **case.variables,
    }


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_PIPELINED = {
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
}
_DOUBLE = {"xla_gpu_enable_while_loop_double_buffering": True}


def _combined(size: int) -> dict[str, int]:
    ops = ("all_gather", "reduce_scatter", "all_reduce")
    return {f"xla_gpu_{op}_combine_threshold_bytes": size for op in ops}


# Label -> options beside or instead of those that training sets (`train.overlap`).
OVERLAP: dict[str, dict[str, Any]] = {
    "as train": {},
    "no scheduler": {"xla_gpu_enable_latency_hiding_scheduler": False},
    "nothing async": {"xla_gpu_disable_async_collectives": "ALLCOLLECTIVES"},
    "pipelined": _PIPELINED,
    "double buffering": _DOUBLE,
    "pipelined, double buffering": _PIPELINED | _DOUBLE,
    "not combined": _combined(0),
    "combined to 1 GB": _combined(2**30),
}
# What meshes other than fsdp 2 are compiled with, beside what they have in part `small`.
OVERLAP_ELSEWHERE = ("nothing async", "pipelined, double buffering", "not combined")

# Label -> fields of a case. With two devices and room for two there is one round always; with less
# room there are more, of fewer rows.
ROWS: dict[str, dict[str, Any]] = {
    "room 1.1": {"room": 1.1},
    "room 0.6": {"room": 0.6},
    "ragged": {"ragged": True},
    "ragged, kernels loaded at once": {
        "ragged": True,
        "variables": {"CUDA_MODULE_LOADING": "EAGER"},
    },
}


def cases(
    parts: Sequence[str], stages: Sequence[str], meshes: Sequence[str], tiny: bool, steps: int
):
    """What is run, in this order."""
    small, large = ("tiny", "tiny") if tiny else ("small", "large")
    todo: list[Case] = []
    for part, model in (("exact", "exact"), ("small", small)):
        if part in parts and (model, tiny) != ("exact", True):
            todo += [
                Case(model, stage, mesh, steps=steps)
                for stage in stages
                for mesh in ("one", *meshes)
            ]
    if "checkpoint" in parts:
        todo.append(Case(small, "warmup", "resumed"))
    for stage in stages:
        if "large" in parts:
            todo += [
                Case(large, stage, mesh, label="large" if tiny else "", steps=steps)
                for mesh in meshes
            ]
    if "overlap" in parts:
        todo += [
            Case(small, stages[0], mesh, options, label, steps=steps)
            for mesh in meshes
            for label, options in OVERLAP.items()
            if mesh == MESHES[0] or label in OVERLAP_ELSEWHERE
        ]
    if "rows" in parts:
        todo += [
            Case(small, stages[0], "expert 2", label=label, steps=steps, **fields)
            for label, fields in ROWS.items()
        ]
    return todo


PROGRAM = (sys.executable, "-m", "benchmarks.mesh_case")


class Worker:
    """A case's process, and what it says.

    Args:
        case: what it runs.
        log: where its standard error goes.
        program: the process.
    """

    def __init__(self, case: Case, log: Path, program: Sequence[str] = PROGRAM):
        self.case, self.log = case, log
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*program, json.dumps(dataclasses.asdict(case))],
                env=os.environ | environment_of(case),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.said.put(json.loads(line))
        status = self.process.wait()
        self.said.put({"row": {"failed": f"ended with status {status}: {self._tail()}"}})

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next thing it says; a failure if that takes longer."""
        try:
            return self.said.get(timeout=max(0.1, seconds))
        except queue.Empty:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(1)
            self.process.kill()
            return {"row": {"failed": f"silent for {seconds:.0f} s: {self._tail()}"}}

    def turn(self, seconds: float) -> dict[str, Any]:
        """Its row."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.hear(seconds)["row"]

    def end(self) -> None:
        """Ends its process."""
        self.process.kill()
        self.process.wait()

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


class Report:
    """Rows as they come, on stdout and on disk: a run that is cut off leaves what it had."""

    def __init__(self, path: Path | None, environment: dict[str, Any]):
        self.path, self.began = path, time.perf_counter()
        self.rows: dict[str, Any] = {"environment": environment, "cases": {}}

    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.began

    def say(self, text: str) -> None:
        """A line with its time."""
        print(f"{self.seconds():6.1f} s  {text}", flush=True)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Adds a row."""
        self.rows["cases"][name] = row
        self.say(f"{name}: {json.dumps(row)}")
        self.write()

    def write(self) -> None:
        """Replaces the file by what is known now."""
        if self.path is not None:
            draft = self.path.with_suffix(".part")
            draft.write_text(json.dumps(self.rows, indent=1) + "\n")
            draft.replace(self.path)


def compare(row: dict[str, Any], other: dict[str, Any], base: str = "one") -> dict[str, Any]:
    """A row on two devices beside that on the mesh `base`."""
    differences = [abs(a / b - 1) for a, b in zip(row["losses"], other["losses"], strict=True)]
    row = row | {"loss_differences": differences, "loss_differences_from": base}
    if base == "one":
        row["scaling_efficiency"] = other["step_ms"] / (2 * row["step_ms"])
    return row


def prepare(todo: Sequence[Case], folder: Path) -> int:
    """Compiles all cases, one after the other, without a GPU."""
    for case in todo:
        if case.mesh == "resumed":  # the programs of others
            continue
        command = [*PROGRAM, json.dumps(dataclasses.asdict(case)), "--prepare", str(folder)]
        env = os.environ | environment_of(case) | {"JAX_PLATFORMS": "cpu"}
        subprocess.run(command, env=env, check=True)
        print(case.name, flush=True)
    return 0


def report_needs(stages: Sequence[str], meshes: Sequence[str], tiny: bool, report: Report) -> None:
    """What the large models need of each GPU, on one and on two."""
    report.rows["environment"] = {"jax": version("jax")}
    for stage in stages:
        for mesh in ("one", *meshes):
            case = Case("tiny" if tiny else "large", stage, mesh)
            env = os.environ | environment_of(case) | {"JAX_PLATFORMS": "cpu"}
            command = [*PROGRAM, json.dumps(dataclasses.asdict(case)), "--needs"]
            said = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            report.add(case.name, json.loads(said.stdout.splitlines()[-1]))


def quiet(seconds: float) -> None:
    """Waits until nobody uses the GPUs, or so long."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    until, idle = time.perf_counter() + seconds, 0
    while idle < 3 and time.perf_counter() < until:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        idle = idle + 1 if all(float(line) < 3 for line in said.split()) else 0
        time.sleep(0.5)


def run(
    todo: Sequence[Case],
    folder: Path,
    report: Report,
    limits: tuple[float, float, float],
    patience: float = 0,
) -> None:
    """Compiles all cases at once and runs them one after the other, as they become ready.

    Args:
        todo: the cases.
        folder: for their logs.
        report: where rows go.
        limits: seconds for compiling, from now, and for each turn; after which none begins.
        patience: seconds to wait for the GPUs to be idle before the first turn.
    """
    waiting = [Worker(case, folder / f"{case.name.replace(' ', '-')}.log") for case in todo]
    until = time.perf_counter() + limits[0]
    while waiting:
        worker = next_ready(waiting, until)
        waiting.remove(worker)
        case = worker.case
        heard = worker.hear(0)
        if "row" in heard:
            report.add(case.name, heard["row"])
        elif report.seconds() > limits[2]:
            report.add(case.name, {"skipped": "out of time"})
        else:
            report.say(f"{case.name}: ready after {heard['ready']:.1f} s")
            if patience:
                quiet(patience)
                patience = 0
            report.add(case.name, worker.turn(limits[1]))
        worker.end()
    add_comparisons(report)


def next_ready(waiting: Sequence[Worker], until: float) -> Worker:
    """The first of those that wait for their turn; after `until` the first of all."""
    while time.perf_counter() < until:
        for worker in waiting:
            if not worker.said.empty():
                return worker
        time.sleep(0.05)
    return waiting[0]


def add_comparisons(report: Report) -> None:
    """Compares with one GPU, and meshes of a model that needs two with each other."""
    rows = report.rows["cases"]
    for name, row in rows.items():
        if "losses" not in row:
            continue
        case = row["case"]
        base = "one" if case["model"] != "large" else MESHES[0]
        other = rows.get(f"{case['model']} {case['stage']} {base}", {})
        if "losses" in other and case["mesh"] != base:
            rows[name] = compare(row, other, base)
    report.write()


def _environment() -> dict[str, Any]:
    """Versions and hardware, asked in another process: this one stays off the GPUs."""
    program = (
        "import json; from benchmarks.timing import environment; print(json.dumps(environment()))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return json.loads(found.stdout) if found.returncode == 0 else {"unknown": found.stderr[-500:]}


def main() -> int:
    """Runs the parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_gpus", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="two CPU devices, tiny models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:4])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--meshes", nargs="+", choices=MESHES, default=MESHES)
    parser.add_argument("--steps", type=int, default=4, help="of each case, the first untimed")
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the cases' logs")
    parser.add_argument("--needs", action="store_true", help="memory of the large models")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--programs", type=Path, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=600, help="begin no turn after these")
    parser.add_argument("--compile-seconds", type=float, default=300)
    parser.add_argument("--turn-seconds", type=float, default=60)
    parser.add_argument("--quiet-seconds", type=float, default=0, help="to wait for idle GPUs")
    options = parser.parse_args()
    options.logs.mkdir(parents=True, exist_ok=True)
    todo = cases(options.parts, options.stages, options.meshes, options.tiny, options.steps)
    if options.prepare:
        return prepare(todo, options.prepare)
    if options.programs:
        todo = [dataclasses.replace(case, programs=str(options.programs)) for case in todo]
    report = Report(options.json, {})
    if options.needs:
        report_needs(options.stages, options.meshes, options.tiny, report)
        return 0
    # A CPU compiles one case at a time.
    groups = [[case] for case in todo] if options.tiny else [todo]
    asked = threading.Thread(target=lambda: report.rows.update(environment=_environment()))
    asked.start()
    for group in groups:
        limits = options.compile_seconds, options.turn_seconds, options.seconds
        run(group, options.logs, report, limits, options.quiet_seconds)
    asked.join()
    report.add("seconds", {"total": report.seconds()})
    return int(any("failed" in row for row in report.rows["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())
