"""`python -m train run` as two processes of this machine that stand for two hosts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from small_runs import LENGTH, MODEL

from dsa_jax.config import ModelConfig
from tests.processes import ROOT, free_port
from train.tracker import read_metrics

HEARTBEAT = 10  # the least that JAX's coordination service keeps to
START = 60  # seconds in which both must have started, on a busy machine
BOUND = HEARTBEAT + 15  # seconds in which who is left must have ended, once both had started


def flags(
    folder: Path, tokens: Path, output: str, model: ModelConfig = MODEL, **fields: object
) -> list[str]:
    """A run of the smallest model that saves every step."""
    (folder / "model.json").write_text(json.dumps(model.to_hf()))
    given = {
        "model": folder / "model.json",
        "stage": "sparse",
        "output": folder / output,
        "data.sources": tokens,
        "data.document-end": 1,
        "mesh.fsdp": 2,
        "steps": 8,
        "batch-size": 4,
        "sequence-length": LENGTH,
        "compute-dtype": "float32",
        "loss-chunk": 10,
        "remat": "none",
        "checkpoint.interval": 1,
        "checkpoint.keep": 2,
        **fields,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


class Group:
    """Processes of one run, each with its standard error in a file.

    Args:
        folder: for the files, and for compiled programs.
        arguments: of `python -m train run`.
        last: more of them, for the last process only.
        count: processes.
        devices: of each.
    """

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        last: tuple[str, ...] = (),
        count: int = 2,
        devices: int = 1,
    ):
        port = free_port()
        self.logs = [folder / f"{rank}.log" for rank in range(count)]
        self.workers = []
        for rank, log in enumerate(self.logs):
            env = os.environ | {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "XLA_FLAGS": "--xla_backend_optimization_level=0 "
                "--xla_cpu_multi_thread_eigen=false",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(rank),
            }
            command = [sys.executable, "-m", "train", "run", *arguments]
            command += ["--cluster.heartbeat-timeout", str(HEARTBEAT)]
            command += ["--cluster.start-timeout", str(START)]
            command += last if rank == count - 1 else ()
            with log.open("wb") as file:
                self.workers.append(
                    subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=file)
                )

    def wait(self, seconds: float) -> list[int]:
        """The exit statuses.

        Raises:
            AssertionError: one is still there after `seconds`; with what it said.
        """
        until = time.monotonic() + seconds
        try:
            return [w.wait(timeout=max(until - time.monotonic(), 0.01)) for w in self.workers]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended in {seconds} s:\n{self.said()}") from None
        finally:
            self.kill()

    def wait_for(self, rank: int, seconds: float) -> int:
        """The exit status of one of them; the others are killed then.

        Raises:
            AssertionError: it is still there after `seconds`.
        """
        try:
            return self.workers[rank].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended in {seconds} s:\n{self.said()}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends all that are left."""
        for worker in self.workers:
            worker.kill()
            worker.wait()

    def said(self) -> str:
        """The ends of the logs."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)

    def until_step(self, metrics: Path, step: int) -> None:
        """Returns when a step is in the metrics, or a process has ended."""
        while all(worker.poll() is None for worker in self.workers):
            records = read_metrics(metrics, "train") if metrics.exists() else []
            if any(record["step"] >= step for record in records):
                return
            time.sleep(0.02)
