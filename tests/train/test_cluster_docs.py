"""What docs/cluster.md prints is accepted: scripts by their parsers, commands by ours."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from small_runs import MODEL

import train
from train.__main__ import parse
from train.launch import ClusterConfig, Launch, detect

DOC = Path(train.__file__).parents[1] / "docs" / "cluster.md"


def blocks(language):
    text = DOC.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def shared(tmp_path):
    """Stands in for the shared file system."""
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL.to_hf()))
    return str(tmp_path)


def commands(script):
    """The arguments of every `python -m train run` in a shell script."""
    joined = script.replace("\\\n", " ")
    for line in joined.splitlines():
        found = re.search(r"python -m train run (.*)", line)
        if found and not line.lstrip().startswith("#"):
            yield shlex.split(found.group(1))


def test_shell_scripts(shared):
    scripts = blocks("bash")
    seen = []
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        for arguments in commands(script):
            seen.append(parse([a.replace("/shared", shared) for a in arguments]))
    assert len(seen) == 3
    slurm = next(script for script in scripts if "#SBATCH" in script)
    options = dict(re.findall(r"#SBATCH --([a-z-]+)=(\S+)", slurm))
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert seen[1].mesh.fsdp == tasks  # one GPU each
    assert seen[2].cluster == ClusterConfig("auto", "node001:12345", 2, 0)
    for number in ("0 | 1 | 2", "75", "*"):
        assert f"{number})" in slurm


def test_jobset(shared):
    (text,) = blocks("yaml")
    job = yaml.safe_load(text)
    assert (job["kind"], job["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    (workers,) = job["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == 4
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "train", "run"]
    config = parse([a.replace("/shared", shared) for a in container["args"]])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert config.mesh.fsdp == spec["parallelism"] * gpus
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    environ |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    name = job["metadata"]["name"]
    first = f"{name}-{workers['name']}-0-0.{name}:12345"
    wanted = Launch("Kubernetes", "deactivate", first, 4, 3)
    assert detect(config.cluster, environ) == wanted
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_numbers_in_the_text_are_the_defaults():
    text = DOC.read_text(encoding="utf-8")
    assert f"`--cluster.heartbeat-timeout` ({ClusterConfig.heartbeat_timeout} s" in text
    assert f"`--cluster.start-timeout`\n({ClusterConfig.start_timeout} s)" in text
    assert os.path.exists(DOC.parents[1] / "tests" / "train" / "kill_pairs.py")
