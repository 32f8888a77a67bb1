"""Which run a process belongs to, from flags and from what its launcher left in the environment.

`python -m train run ...` is the same line on one host and under Slurm, Open MPI or Kubernetes. What
is only half there is an error, for a process that waits for others who never come looks like one
that works. Nothing here touches JAX: `train.cluster` joins the run.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple


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
