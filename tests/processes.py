"""Two processes on this machine that stand for two hosts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_pair(program: str, *arguments: object, seconds: float) -> list[str]:
    """What two processes print that run a program with their rank, a port, and the arguments.

    Raises:
        AssertionError: one of them failed; with the end of what it said.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(port), *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=seconds) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, said) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, said[-3000:]
    return [printed for printed, _ in outputs]
