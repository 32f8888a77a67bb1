"""Whether rows may travel to their experts by `ragged_all_to_all`: does it return, and how fast?

    python -m benchmarks.ragged --json FILE        # two GPUs of one host
    python -m benchmarks.ragged --tiny             # two CPU devices, which have no ragged one

Each variant, a set of XLA's options or another way to start, is a process of its own that computes
ever more of what expert parallelism needs, with `expert_parallel.RAGGED` and without, and compares:

- `rows`: one exchange of rows in bf16; `numbers`: one of a number a row, in fp32;
- `three`: three exchanges of one program that do not wait for each other;
- `routed`: value and gradient of routed experts in a scan over layers, beside a sum over devices.

All variants run side by side; one that says nothing for `--silence` seconds is killed, and what it
was at is its result. Those that came through are then timed, one after the other.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("rows", "numbers", "three", "routed")
AXES = ("expert",)


@dataclass(frozen=True)
class Variant:
    """How a process is started.

    Attributes:
        flags: of XLA.
        variables: of the environment.
        processes: 1, or one a GPU.
        alone_first: whether each device exchanges rows with itself first, which loads all kernels.
    """

    flags: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    alone_first: bool = False


_FALLBACK = (
    "--xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel=false",
    "--xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback=true",
)
VARIANTS: dict[str, Variant] = {
    "as it is": Variant(),
    "kernels loaded at once": Variant(variables={"CUDA_MODULE_LOADING": "EAGER"}),
    "alone first": Variant(alone_first=True),
    "no command buffers": Variant(("--xla_gpu_enable_command_buffer=",)),
    "not asynchronous": Variant(("--xla_gpu_disable_async_collectives=RAGGEDALLTOALL",)),
    "send and receive": Variant(_FALLBACK),
    "two processes": Variant(processes=2),
    "two processes, send and receive": Variant(_FALLBACK, processes=2),
}


# --- the process of a variant --------------------------------------------------------------------


def _exchanges(rows: int, width: int) -> dict[str, tuple[Callable, tuple]]:
    """Programs of a device that only exchange rows, and what they are given."""
    import jax.numpy as jnp
    import numpy as np

    from dsa_jax import expert_parallel

    rng = np.random.default_rng(0)
    to_first = rng.integers(rows // 3, rows // 2, 2)
    send = np.stack([to_first, rows - to_first - rows // 8], 1)  # [from, to]; not all rows travel
    first = np.cumsum(send, axis=1) - send
    there = np.cumsum(send, axis=0) - send  # behind one another on the other side
    runs = [x.reshape(-1).astype(np.int32) for x in (first, send, there, send.T)]
    numbers = np.resize(rng.standard_normal(10007), 2 * rows).astype(np.float32)
    x = np.resize(numbers, (2 * rows, width)).astype(jnp.bfloat16)

    def swap(x, *runs):
        into = jnp.zeros((2 * rows, *x.shape[1:]), x.dtype)
        return expert_parallel.exchange(x, into, *runs, axes=AXES, quota=rows)

    def three(x, numbers, *runs):
        return swap(x, *runs), swap(numbers, *runs), swap(x * 2, *runs)

    return {
        "rows": (swap, (x, *runs)),
        "numbers": (swap, (numbers, *runs)),
        "three": (three, (x, numbers, *runs)),
    }


def _routed(tokens: int, width: int) -> tuple[Callable, tuple]:
    """Routed experts in a scan over layers, and their gradient."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from dsa_jax import expert_parallel
    from dsa_jax.moe import Routing, dispatch

    rng = np.random.default_rng(0)
    k, experts, layers = 2, 8, 3
    x = rng.standard_normal((2 * tokens, width)).astype(jnp.bfloat16)
    chosen = np.stack([rng.permutation(experts)[:k] for _ in x]).astype(np.int32)
    weights = rng.random((2 * tokens, k)).astype(np.float32)
    matrices = rng.standard_normal((layers, experts, width, width)) / width**0.5

    def apply(w, x, group_sizes, live):
        y = jnp.tanh(lax.ragged_dot(x, w.astype(x.dtype), group_sizes))
        return jnp.where(live[:, None], y, 0)

    def routed(x, matrices, chosen, weights):
        order = dispatch(Routing(chosen, weights), experts)

        def layer(x, w):
            y = expert_parallel.routed(apply, w, x, order, weights, AXES)
            mean = lax.pmean(y.mean(), AXES)
            return (x + y - mean).astype(x.dtype), None

        def loss(x, matrices):
            out, _ = lax.scan(jax.checkpoint(layer), x, matrices)
            return (out.astype(jnp.float32) ** 2).mean()

        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(x, matrices)
        return value[None], *grads

    return routed, (x, matrices.astype(np.float32), chosen, weights)


def _compiled(function: Callable, arguments: tuple, ragged: bool) -> Callable:
    """The function on every device, with its arguments; only weights of layers are stacked."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from dsa_jax import expert_parallel
    from dsa_jax.sharding import MeshConfig, make_mesh

    def fresh(*x):  # traced with this value of the switch, whatever was traced before
        expert_parallel.RAGGED = ragged
        return function(*x)

    def spec(x: Any) -> P:
        return P(None, AXES) if x.ndim == 4 else P(AXES)

    mesh = make_mesh(MeshConfig(expert=2))
    specs = tuple(spec(x) for x in arguments)
    results = (P(AXES), P(AXES), P(None, AXES)) if function.__name__ == "routed" else P(AXES)
    run = jax.jit(jax.shard_map(fresh, mesh=mesh, in_specs=specs, out_specs=results))
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs, strict=True)
    ]
    return functools.partial(run.lower(*placed).compile(), *placed)


def _alone(dtype: Any, rank: int) -> None:
    """Each device exchanges rows with itself: nobody waits, and what it takes is loaded."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    def local(x, one):
        zero = jnp.zeros_like(one)
        into = jnp.zeros_like(x)
        groups = [[0], [1]]
        return lax.ragged_all_to_all(
            x, into, zero, one, zero, one, axis_name=AXES, axis_index_groups=groups
        )

    x = np.ones((2, 8)[:rank], dtype)
    jax.block_until_ready(_compiled(local, (x, np.ones(2, np.int32)), True)())


def work(variant: Variant, number: int, port: int, given: dict[str, Any]) -> None:
    """Says `{"at": ...}` before and `{"done": ...}` after each thing."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    if variant.processes > 1:
        jax.distributed.initialize(
            f"localhost:{port}", variant.processes, number, local_device_ids=[number]
        )

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    say(at="introduction")
    from benchmarks.mesh_case import introduce
    from dsa_jax.sharding import MeshConfig, make_mesh

    introduce(make_mesh(MeshConfig(expert=2)))
    if variant.alone_first:
        say(at="alone")
        _alone(jnp.bfloat16, 2)
        _alone(jnp.float32, 1)
    programs = _exchanges(given["rows"], given["width"])
    programs["routed"] = _routed(64, 16)
    for kind in given["kinds"]:
        say(at=f"compiling {kind}")
        function, arguments = programs[kind]
        padded, ragged = (_compiled(function, arguments, way) for way in (False, True))
        want = got = jax.block_until_ready(padded())
        say(at=kind)
        for _ in range(3):
            got = jax.block_until_ready(ragged())
        difference = max(
            float(np.abs(np.asarray(a.data, np.float32) - np.asarray(b.data, np.float32)).max())
            for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True)
            for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
        )
        say(done=kind, difference=difference)
    if given["timed"]:
        function, arguments = programs["rows"]
        for way, name in ((False, "padded_ms"), (True, "ragged_ms")):
            say(at=name)
            say(**{name: _milliseconds(_compiled(function, arguments, way))})


def _milliseconds(run: Callable) -> float:
    """Of one of twenty that follow each other."""
    import jax

    jax.block_until_ready([run() for _ in range(3)])
    began = time.perf_counter()
    jax.block_until_ready([run() for _ in range(20)])
    return 1e3 * (time.perf_counter() - began) / 20


# --- the parent ----------------------------------------------------------------------------------


def _start(name: str, number: int, port: int, given: dict[str, Any], log: Path) -> subprocess.Popen:
    variant = VARIANTS[name]
    tiny = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    if variant.processes == 1:
        tiny["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    flags = " ".join(("--xla_gpu_autotune_level=0", *variant.flags))
    env = {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **variant.variables}
    command = [sys.executable, "-m", "benchmarks.ragged", "--process", name, str(number), str(port)]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, json.dumps(given)],
            env=os.environ | (tiny if given["tiny"] else env),
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )


def watch(name: str, given: dict[str, Any], silence: float, logs: Path) -> dict[str, Any]:
    """Runs a variant; returns what it said, and where it stopped."""
    from tests.processes import free_port

    variant, port = VARIANTS[name], free_port()
    files = [logs / f"{name.replace(' ', '-')}-{n}.log" for n in range(variant.processes)]
    processes = [_start(name, n, port, given, file) for n, file in enumerate(files)]
    said: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line.startswith("{"):
                said.put(json.loads(line))
        said.put(None)

    threading.Thread(target=listen, daemon=True).start()
    row: dict[str, Any] = {"difference": {}}
    at = "start"
    while True:
        try:
            heard = said.get(timeout=silence)
        except queue.Empty:
            row |= {"stopped_at": at, "why": f"silent for {silence:.0f} s"}
            break
        if heard is None:
            if status := processes[0].wait():
                lines = files[0].read_text(errors="replace").splitlines()
                errors = [line for line in lines if "Error: " in line] or lines[-3:] or [""]
                row |= {"stopped_at": at, "why": f"status {status}: {errors[0][:600]}"}
            break
        at = heard.get("at", at)
        if "done" in heard:
            row["difference"][heard["done"]] = heard["difference"]
        row |= {key: heard[key] for key in heard if key.endswith("_ms")}
    for process in processes:
        process.kill()
        process.wait()
    return row


def main() -> int:
    """Runs all variants, or is one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ragged", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--silence", type=float, default=30, help="seconds")
    parser.add_argument("--logs", type=Path, default=Path("."))
    parser.add_argument("--process", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        name, number, port, given = options.process
        work(VARIANTS[name], int(number), int(port), json.loads(given))
        return 0
    options.logs.mkdir(parents=True, exist_ok=True)
    tested: dict[str, Any] = {"rows": 64, "width": 8, "kinds": KINDS, "timed": False}
    timed: dict[str, Any] = {"rows": 32768, "width": 4096, "kinds": (), "timed": True}
    if options.tiny:
        timed |= {"rows": 64, "width": 8}
    tested["tiny"] = timed["tiny"] = options.tiny
    results: dict[str, Any] = {}

    def one(name: str, given: dict[str, Any]) -> None:
        results[name] = results.get(name, {}) | {
            key: value
            for key, value in watch(name, given, options.silence, options.logs).items()
            if value != {}
        }
        print(name, json.dumps(results[name]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    threads = [threading.Thread(target=one, args=(name, tested)) for name in options.variants]
    for thread in threads:
        thread.start()
        if options.tiny:
            thread.join()
    for thread in threads:
        thread.join()
    for name in options.variants:
        if "why" not in results[name]:
            one(name, timed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
