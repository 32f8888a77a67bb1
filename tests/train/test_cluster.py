"""What a launcher's environment means: a run of several processes, of one, or a clear error."""

import subprocess
import sys

import jax
import pytest

from tests.processes import ROOT
from train import cluster, launch
from train.launch import ClusterConfig, ClusterError, Launch, detect

SLURM = {
    "SLURM_JOB_ID": "7123",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
NAMED = {"JAX_COORDINATOR_ADDRESS": "run-0:1234", "JAX_NUM_PROCESSES": "4"}


def without(environ: dict, *names: str) -> dict:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.fixture(autouse=True)
def no_packages(monkeypatch):
    """Neither `kubernetes` nor `mpi4py`, wherever this runs."""
    monkeypatch.setattr(launch, "_has", lambda module: False)


def seen(environ, **flags):
    return detect(ClusterConfig(**flags), {"CUDA_VISIBLE_DEVICES": "", **environ})


def test_one_process_never_waits():
    assert seen({}) is None
    assert seen({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # any pod has that
    assert seen(SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert seen({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert seen(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}) is None
    for environ in (SLURM, OPEN_MPI, POD, NAMED):
        assert seen(environ, launcher="none") is None
    assert seen({}, coordinator="a:1", num_processes=1, process_id=0) is None


def test_launchers_are_handed_to_jax():
    assert seen(SLURM) == Launch("Slurm job 7123", "slurm", None, 16, 11, None)
    assert seen(OPEN_MPI) == Launch("Open MPI", "ompi", None, 4, 1, None)
    assert seen(SLURM | OPEN_MPI) == Launch("Open MPI", "ompi", None, 4, 1, None)
    assert seen(POD | NAMED) == Launch("Kubernetes", "deactivate", "run-0:1234", 4, 2, None)
    flags = {"coordinator": "a:1", "num_processes": 2, "process_id": 1}
    assert seen({}, **flags) == Launch("flags", "deactivate", "a:1", 2, 1, None)
    assert seen(SLURM, **flags) == Launch("flags", "deactivate", "a:1", 2, 1, None)
    # One flag changes one thing.
    assert seen(SLURM, coordinator="a:1") == Launch("Slurm job 7123", "slurm", "a:1", 16, 11, None)


def test_jax_reads_its_own_pod_where_it_can(monkeypatch):
    monkeypatch.setattr(launch, "_has", lambda module: module == "kubernetes")
    assert seen(POD) == Launch("Kubernetes", None, None, None, 2, None)


def test_jax_knows_the_methods_by_these_names():
    from jax._src.clusters import ClusterEnv  # no public list of them

    assert {"slurm", "ompi"} <= {env.name for env in ClusterEnv._cluster_types}


GPUS = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("changed", "devices"),
    [
        ({"CUDA_VISIBLE_DEVICES": GPUS}, (3,)),  # one a process
        ({"CUDA_VISIBLE_DEVICES": "3"}, (0,)),  # dealt out by Slurm: the only one it sees
        ({"CUDA_VISIBLE_DEVICES": GPUS, "SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, tuple(range(8))),
        ({"CUDA_VISIBLE_DEVICES": GPUS, "SLURM_STEP_TASKS_PER_NODE": "8,4"}, (6, 7)),
        ({"CUDA_VISIBLE_DEVICES": GPUS, "JAX_LOCAL_DEVICE_IDS": "5"}, None),
    ],
)
def test_share_of_the_hosts_gpus(changed, devices):
    if "SLURM_STEP_TASKS_PER_NODE" in changed and "(x16)" in changed["SLURM_STEP_TASKS_PER_NODE"]:
        changed = changed | {"SLURM_LOCALID": "0", "SLURM_NODEID": "11"}
    found = seen(SLURM | changed)
    assert found is not None
    assert found.devices == devices


HALF = {
    "no srun": (without(SLURM, "SLURM_STEP_NODELIST"), {}, "16 tasks, but srun did not start"),
    "mixed steps": (SLURM | {"SLURM_NTASKS": "32"}, {}, r"SLURM_NTASKS=32.*STEP_NUM_TASKS=16"),
    "odd share": (
        SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"},
        {},
        "8 processes on this host see 3 GPUs",
    ),
    "not Slurm": ({}, {"launcher": "slurm"}, "srun did not start this process"),
    "half of Open MPI": (
        without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"),
        {},
        "not OMPI_COMM_WORLD_RANK: start it by `mpirun",
    ),
    "Open MPI 5": (without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), {}, "pip install mpi4py"),
    "pod of a job": (POD, {}, "index 2 of an indexed job"),
    "not a job": ({"KUBERNETES_SERVICE_HOST": "x"}, {"launcher": "kubernetes"}, "no JOB_COMPLE"),
    "address only": ({}, {"coordinator": "a:1"}, "not --cluster.num-processes .*nor --cluster.pro"),
    "rank only": ({"JAX_PROCESS_ID": "0"}, {}, "not --cluster.coordinator"),
    "rank too high": (
        {},
        {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
        "process_id=2 .*from 0 to num_processes - 1",
    ),
    "no port": (
        {},
        {"coordinator": "a", "num_processes": 2, "process_id": 0},
        "coordinator='a': must be host:port",
    ),
    "no number": ({"JAX_NUM_PROCESSES": "two"}, {}, "JAX_NUM_PROCESSES='two'.*not a number"),
}


@pytest.mark.parametrize("case", HALF)
def test_half_an_environment_is_an_error(case):
    environ, flags, message = HALF[case]
    with pytest.raises(ClusterError, match=message):
        seen(environ, **flags)


SUPERVISED = """
import os, signal, time
from train.supervise import LOST, supervise

def on_request(worker):
    got = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    os.kill(os.getppid(), signal.SIGTERM)
    while not got:
        time.sleep(0.01)
    return 75

def aborts(worker):
    worker.joined()
    os.abort()

def fails(worker):
    raise OSError("no such thing")

ends = [
    supervise("process 1 of 2", 5, on_request),
    supervise("process 1 of 2", 5, fails),
    supervise("process 1 of 2", 5, aborts),
    supervise("process 1 of 2", 5, lambda worker: os.abort()),
    supervise("process 1 of 2", 5, lambda worker: os.kill(os.getpid(), signal.SIGKILL)),
]
assert ends == [75, 1, LOST, LOST, 137], ends
"""


def test_supervisor_passes_signals_on_and_explains_the_end():
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "OSError: no such thing" in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "another process of the run is lost" in said[0]
    assert "did not all come together within 5 s" in said[1]
    assert "memory runs out" in said[2]
    assert all("process 1 of 2 on " in line for line in said)


def test_signs_of_a_lost_process():
    error = RuntimeError("could not save")
    error.__cause__ = jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: ...")
    assert cluster.tells_of_loss(error)
    assert not cluster.tells_of_loss(ValueError("batch_size=3"))
