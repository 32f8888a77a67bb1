"""The processes of one run: they come together, agree before the first step, and notice a loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.launch import ClusterConfig, ClusterError, Launch


class AgreedError(ValueError):
    """A process cannot go on, and all processes know: each raises it with the same text."""


def join(launch: Launch, config: ClusterConfig) -> None:
    """Waits until all processes are there and makes their devices one list.

    A process that does not come within `start_timeout`, or is lost later for `heartbeat_timeout`,
    makes JAX abort the others (SIGABRT), also in the middle of a collective; `train.supervise`
    turns that into a sentence.

    Raises:
        ClusterError: the launcher's information could not be read.
    """
    try:
        jax.distributed.initialize(
            coordinator_address=launch.coordinator,
            num_processes=launch.num_processes,
            process_id=launch.process_id,
            local_device_ids=launch.devices,
            cluster_detection_method=launch.method,
            initialization_timeout=config.start_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            # At the end all leave together; who waits for the last must not be taken for lost.
            shutdown_timeout_seconds=config.start_timeout,
        )
    except Exception as error:
        raise ClusterError(f"{launch.how}: could not join the run: {error}") from error


def tells_of_loss(error: BaseException) -> bool:
    """Whether an error, or what caused it, is how the runtime reports that another process is gone:
    a broken connection of a collective, or a barrier that somebody missed."""
    chain: BaseException | None = error
    while chain is not None:
        text = str(chain)
        if any(sign in text for sign in _LOSS) and not isinstance(
            chain, ClusterError | AgreedError
        ):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def last_line(error: BaseException) -> str:
    """An error in a short line."""
    return " ".join(str(error).split())[-200:]


# What Gloo, NCCL, gRPC and the coordination service say; on GPUs most losses end in an abort.
_LOSS = (
    "Gloo",
    "NCCL operation",
    "Connection closed by peer",
    "Connection reset by peer",
    "CoordinationServiceError",
    "stopped sending heartbeats",
    "Barrier timed out",
    "Socket closed",
)


# --- together -------------------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[None]:
    """A block that every process leaves in the same way: if one fails, all do, and say why.

    Without it the others would wait for the failed one in their next collective. The block itself
    must hold no collective. In a run of one process, errors pass as they are.

    Raises:
        AgreedError: one of several processes failed.
    """
    if jax.process_count() == 1:
        yield
        return
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    said = _gather("" if problem is None else str(problem) or type(problem).__name__)
    failed = [number for number, text in enumerate(said) if text]
    if failed:
        everywhere = len(set(said)) == 1
        whose = "" if everywhere else f"process {failed[0]} cannot start: "
        raise AgreedError(whose + said[failed[0]]) from problem


def require_same(what: str, values: Mapping[str, object]) -> None:
    """Refuses to start processes that were given different things.

    Args:
        what: they are, for the message.
        values: this process's, by name; compared as text.

    Raises:
        AgreedError: names the first process that differs from process 0, and each value that does.
    """
    if jax.process_count() == 1:
        return
    mine = {name: str(value) for name, value in values.items()}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    digests = _gather(digest)
    other = next((i for i, found in enumerate(digests) if found != digests[0]), None)
    if other is None:
        return
    # Only now the values themselves, in pieces: of many files they may be long.
    first, second = _gather_long(json.dumps(mine), (0, other))
    a, b = json.loads(first), json.loads(second)
    changed = [n for n in sorted({*a, *b}) if a.get(n) != b.get(n)]
    told = "; ".join(f"{n} is {b.get(n)} there and {a.get(n)} in process 0" for n in changed[:6])
    more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
    raise AgreedError(
        f"process {other} has other {what} than process 0: {told}{more}. All processes need the "
        "same flags, files and versions"
    )


_TEXT_BYTES = 2048


def _gather(text: str) -> list[str]:
    """The texts of all processes, cut to 2 KiB."""
    data = text.encode()[:_TEXT_BYTES]
    padded = np.zeros(_TEXT_BYTES, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def _gather_long(text: str, numbers: Sequence[int]) -> list[str]:
    """The texts of some processes, whole; every process must call this."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data))))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(rows[n][: sizes[n]]).decode() for n in numbers]


def is_primary() -> bool:
    """Whether this process writes what is written once: metrics, tables, the lock."""
    return jax.process_index() == 0
