"""Processes on this machine that stand for hosts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_pair(program: str, *arguments: object, seconds: float) -> list[str]:
    """What two processes print that run a program with their rank, a port, and the arguments.

    Raises:
        AssertionError: one of them failed; with the end of what it said.
    """
    return run_group(program, *arguments, processes=2, seconds=seconds)


def run_group(program: str, *arguments: object, processes: int, seconds: float) -> list[str]:
    """`run_pair` with any number of processes."""
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(port), *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for rank in range(processes)
    ]
    try:
        outputs = [worker.communicate(timeout=seconds) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, said) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, said[-3000:]
    return [printed for printed, _ in outputs]
