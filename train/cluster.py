"""How the processes of one run find each other, and how they agree before the first step.

`python -m train run ...` is the same line on one host and under a launcher: `detect` reads the
launcher's environment, `join` hands it to `jax.distributed`. What is only half there is an error,
for a process that waits for others who never come looks like one that works.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils


class ClusterError(RuntimeError):
    """The processes of a run do not come together; the message says what is missing."""


@dataclass(frozen=True)
class ClusterConfig:
    """How the processes of one run find each other. On one host, or where a launcher says it
    (Slurm, Open MPI, Kubernetes), leave this alone."""

    # What started the processes. `auto`: seen from its environment variables; without any, the run
    # is one process. `none`: one process, whatever the environment says.
    launcher: Literal["auto", "none", "slurm", "openmpi", "kubernetes"] = "auto"
    # `host:port` of process 0, which the others can reach. None: JAX_COORDINATOR_ADDRESS, else as
    # the launcher says.
    coordinator: str | None = None
    # Processes of the run. None: JAX_NUM_PROCESSES, else as the launcher says.
    num_processes: int | None = None
    # This process's number, from 0. None: JAX_PROCESS_ID, else as the launcher says.
    process_id: int | None = None
    # Seconds in which all processes must have started.
    start_timeout: int = 300
    # Seconds without a sign of life after which a process counts as lost and the others end.
    heartbeat_timeout: int = 60


class Launch(NamedTuple):
    """What a process knows of its run before it has joined it.

    Attributes:
        how: the launcher, for messages.
        method: `cluster_detection_method` of `jax.distributed.initialize`; None: whatever it finds.
        coordinator: address of process 0; None: `method` finds it.
        num_processes: likewise.
        process_id: likewise.
        devices: GPUs of this host that are this process's; None: as JAX decides.
    """

    how: str
    method: str | None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    devices: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """This process, for messages."""
        of = f" of {self.num_processes}" if self.num_processes else ""
        return f"process {'?' if self.process_id is None else self.process_id}{of}"


# --- before joining: from flags and environment only ----------------------------------------------


def detect(config: ClusterConfig, environ: Mapping[str, str]) -> Launch | None:
    """The run that this process belongs to; None if it is the only process of it.

    Flags win over `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, these over
    the launcher.

    Raises:
        ClusterError: the environment is half there, or contradicts itself.
    """
    if config.launcher == "none":
        return None
    given = Launch(
        "flags",
        "deactivate",
        config.coordinator or environ.get("JAX_COORDINATOR_ADDRESS"),
        _or(config.num_processes, _number(environ, "JAX_NUM_PROCESSES")),
        _or(config.process_id, _number(environ, "JAX_PROCESS_ID")),
    )
    whole = None not in given[2:5]
    launcher = config.launcher
    if launcher == "auto" and not whole:
        launcher = next((name for name, seen in _SEEN.items() if seen(environ)), "auto")
    found = _LAUNCHERS[launcher](environ, given) if launcher != "auto" else None
    if found is None:
        if launcher == "auto" and not whole and any(x is not None for x in given[2:5]):
            raise _half_given(given)
        found = given if whole else None
    if found is None or found.num_processes == 1:
        return None
    _check(found)
    return found


def _slurm(environ: Mapping[str, str], given: Launch) -> Launch | None:
    job, tasks = environ.get("SLURM_JOB_ID"), _number(environ, "SLURM_NTASKS")
    step = [name for name in _SLURM_STEP if name not in environ]
    if job is None or step:
        if (tasks or 1) == 1 and job is not None:
            return None  # a batch script or a shell of one task
        raise ClusterError(
            f"Slurm job {job} has {tasks} tasks, but srun did not start this process (no "
            f"{', '.join(step) or 'SLURM_JOB_ID'}): write `srun python -m train run ...`, or pass "
            "--cluster.launcher none to run it as one process"
        )
    of_step = _number(environ, "SLURM_STEP_NUM_TASKS")
    if of_step is not None and tasks is not None and of_step != tasks:
        raise ClusterError(
            f"SLURM_NTASKS={tasks}, but this job step has SLURM_STEP_NUM_TASKS={of_step}: the "
            "variables of two steps are mixed; start the run by one srun, without nesting"
        )
    rank, local = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    node = _number(environ, "SLURM_NODEID")
    layout = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    here = layout[node] if node is not None and node < len(layout) else None
    return Launch(
        f"Slurm job {job}",
        "slurm",
        given.coordinator,
        _or(given.num_processes, tasks),
        _or(given.process_id, rank),
        _my_devices(environ, local, here),
    )


def _open_mpi(environ: Mapping[str, str], given: Launch) -> Launch | None:
    missing = [name for name in _OPEN_MPI if name not in environ]
    if missing:
        raise ClusterError(
            f"this process has {', '.join(sorted(set(_OPEN_MPI) & set(environ))) or 'nothing'} of "
            f"Open MPI, but not {', '.join(missing)}: start it by `mpirun python -m train run ...`"
        )
    size = _or(given.num_processes, _number(environ, "OMPI_COMM_WORLD_SIZE"))
    old = "OMPI_MCA_orte_hnp_uri" in environ
    if not old and size != 1 and given.coordinator is None and not _has("mpi4py"):
        raise ClusterError(
            "this Open MPI does not tell its processes where process 0 is (5 and newer need mpi4py "
            "for that): pip install mpi4py, or name it by --cluster.coordinator HOST:PORT"
        )
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    here = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    return Launch(
        "Open MPI",
        "ompi",
        given.coordinator,
        size,
        _or(given.process_id, _number(environ, "OMPI_COMM_WORLD_RANK")),
        _my_devices(environ, local, here),
    )


def _kubernetes(environ: Mapping[str, str], given: Launch) -> Launch | None:
    index = _number(environ, "JOB_COMPLETION_INDEX")
    rank = _or(given.process_id, index)
    if given.coordinator is not None and given.num_processes is not None and rank is not None:
        return given._replace(how="Kubernetes", process_id=rank)
    if index is None or not _has("kubernetes"):
        what = "no JOB_COMPLETION_INDEX" if index is None else f"index {index} of an indexed job"
        raise ClusterError(
            f"Kubernetes ({what}) does not say which pods train together: set "
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES in the pod (docs/cluster.md has an "
            "example), or pip install 'jax[k8s]' and let the pod read its job, or pass "
            "--cluster.launcher none to run it as one process"
        )
    # JAX has no name for this method of its own.
    return Launch("Kubernetes", None, given.coordinator, given.num_processes, rank)


_SLURM_STEP = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
_LAUNCHERS: dict[str, Callable[[Mapping[str, str], Launch], Launch | None]] = {
    "openmpi": _open_mpi,
    "slurm": _slurm,
    "kubernetes": _kubernetes,
}
# Open MPI first: mpirun within a Slurm job leaves both kinds of variables.
_SEEN: dict[str, Callable[[Mapping[str, str]], bool]] = {
    "openmpi": lambda env: any(name in env for name in _OPEN_MPI),
    "slurm": lambda env: "SLURM_JOB_ID" in env,
    "kubernetes": lambda env: "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env,
}


def _check(launch: Launch) -> None:
    count, rank, address = launch.num_processes, launch.process_id, launch.coordinator
    if count is not None and count < 1:
        raise ClusterError(f"cluster.num_processes={count} ({launch.how}): must be at least 1")
    if rank is not None and (rank < 0 or (count is not None and rank >= count)):
        raise ClusterError(
            f"cluster.process_id={rank} ({launch.how}): must be from 0 to num_processes - 1, and "
            f"num_processes is {count}"
        )
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise ClusterError(
            f"cluster.coordinator={address!r}: must be host:port, for example node001:12345"
        )


def _half_given(given: Launch) -> ClusterError:
    names = {
        "--cluster.coordinator (JAX_COORDINATOR_ADDRESS)": given.coordinator,
        "--cluster.num-processes (JAX_NUM_PROCESSES)": given.num_processes,
        "--cluster.process-id (JAX_PROCESS_ID)": given.process_id,
    }
    there = [f"{name}={value}" for name, value in names.items() if value is not None]
    missing = [name for name, value in names.items() if value is None]
    return ClusterError(
        f"{' and '.join(there)} given, but not {' nor '.join(missing)}, and no launcher is there "
        "to fill it in: give all three, or none for a run of one process"
    )


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as `[2, 2, 2, 1]`."""
    counts: list[int] = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(repeats or 1)
    return counts


def _my_devices(
    environ: Mapping[str, str], local: int | None, here: int | None
) -> tuple[int, ...] | None:
    """This process's share of the GPUs it sees: all if it is alone on its host, or sees just one
    because the launcher has dealt them out.

    JAX would take the GPU with the process's local number: one of eight where the process is alone
    on its host, and one that is not there where each process sees only its own.
    """
    gpus = _visible_gpus(environ)
    if gpus == 0 or local is None or environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    if gpus == 1 or here == 1:
        return tuple(range(gpus))
    if here is None:
        return None
    if gpus % here:
        raise ClusterError(
            f"{here} processes on this host see {gpus} GPUs: start one process a GPU or one a host "
            "(or set JAX_LOCAL_DEVICE_IDS in each)"
        )
    share = gpus // here
    return tuple(range(local * share, (local + 1) * share))


def _visible_gpus(environ: Mapping[str, str]) -> int:
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return len([part for part in named.split(",") if part.strip() not in ("", "-1", "NoDevFiles")])


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not text.strip().isdigit():
        raise ClusterError(
            f"{name}={text!r} in the environment is not a number: unset or repair it"
        )
    return int(text)


def _or[T](value: T | None, default: T | None) -> T | None:
    return default if value is None else value


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# --- joining --------------------------------------------------------------------------------------


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


class AgreedError(ValueError):
    """A process cannot go on, and all processes know: each raises it with the same text."""


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
