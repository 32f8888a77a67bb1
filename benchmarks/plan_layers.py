"""What the plan says of the steps that `benchmarks.layer_step` measured: memory, operations, time.

    python -m benchmarks.plan_layers --gpu h100 --json FILE LAYER_STEP_RESULTS.json ...

Compiles each step of the results for a GPU that is not there, by the plan's means, and compares
the bytes of that program with the allocator's peak, and the plan's time (operations over its rates,
bytes of the rest over memory bandwidth) with the measured one. Needs JAX's CUDA plugin and no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import layer_step
from pallas_kernels import dispatch
from train.flops import step_work
from train.plan import hlo
from train.plan.hardware import GPUS, Gpu, Rates
from train.plan.worker import OPTIONS, topology
from train.state import skeleton_of


def compiled(case: layer_step.Case, config: Any, gpu: Gpu) -> Any:
    """The layer's step for one such GPU."""
    device = topology(gpu.target, 1, gpu.per_host)[:1]
    place = NamedSharding(Mesh(device, ("one",), axis_types=(AxisType.Auto,)), PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(functools.partial(layer_step.prepare, config)),
    )
    step = jax.jit(layer_step.make_step(config, skeleton_of(config)), donate_argnums=0)
    with dispatch.kernels(case.kernels):
        return step.trace(*shapes).lower(lowering_platforms=("cuda",)).compile(OPTIONS)


def planned(case: layer_step.Case, gpu: Gpu, rates: Rates) -> dict[str, Any]:
    """Bytes, operations and seconds of a step."""
    config = layer_step.train_config(case, layer_step.layer_config())
    program = compiled(case, config, gpu)
    memory, work = program.memory_analysis(), hlo.work(hlo.parse(program.as_text() or ""))
    parts = {part.name: part for part in step_work(config) if part.name != "head"}
    seconds = {name: part.total / getattr(rates, part.kind) / 1e12 for name, part in parts.items()}
    seconds["the rest"] = work.other_bytes / (gpu.hbm_gbps * 1e9 * rates.hbm_share)
    products = sum(part.total for part in parts.values() if part.kind == "matmul")
    return {
        "bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "seconds": sum(seconds.values()),
        "parts": seconds,
        "counted_products": products,
        "dot_flop": work.dot_flop,
        "other_bytes": work.other_bytes,
    }


def measured(path: Path) -> list[dict[str, Any]]:
    """Steps in a file of `layer_step`, each with the GPU it ran on."""
    found = json.loads(path.read_text())
    rows = [row for row in found["rows"] if row["op"] == "layer_step"]
    gpus = [run["environment"]["gpu"] for run in found["runs"]]
    return [{**row, "gpu": gpus[row["run"]]} for row in rows]


def compare(name: str, said: dict[str, Any], row: dict[str, Any]) -> None:
    """Prints planned, measured and difference."""
    pairs = {
        "GB": (said["bytes"] / 1e9, row["peak_gib_of_process"] * 2**30 / 1e9),
        "ms": (1e3 * said["seconds"], row["ms"]),
    }
    for unit, (a, b) in pairs.items():
        print(f"{name:24} {a:9.2f} {b:9.2f} {unit} {a / b - 1:+7.1%}", flush=True)


def main() -> None:
    """Plans the steps in the files given, once each, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--gpu", default="h100", choices=GPUS)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    given = parser.parse_args()
    gpu, cases = GPUS[given.gpu], {case.name: case for case in layer_step.CASES if case.kernels}
    rows = json.loads(given.json.read_text()) if given.json.exists() else {}
    for row in (row for path in given.results for row in measured(path)):
        if row["gpu"] != gpu.name or row["kind"] not in cases:
            continue
        name = f"{row['kind']} {given.gpu}"
        said = planned(cases[row["kind"]], gpu, Rates())
        kept = ("gpu", "ms", "peak_gib_of_process", "ops_ms")
        rows[name] = {"planned": said, "measured": {key: row[key] for key in kept}}
        compare(name, said, row)
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
