"""What a layer more costs a warm-up step in memory, by the compiler's own account.

    python -m benchmarks.warmup_memory --layers 2 3 5 --json FILE

Whole steps at 128K tokens, embedding with them, of models of so many layers of
`benchmarks.layer_step`, by kernels, compiled for an H100. Needs JAX's CUDA plugin and no GPU. With
one layer XLA has no loop to compile, so what is compared starts at two.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import layer_step
from benchmarks.ops import Results
from pallas_kernels import dispatch
from train.config import TrainConfig
from train.optimizer import make_optimizer
from train.plan.hardware import GPUS
from train.plan.worker import OPTIONS, topology
from train.stages import Group, Stage, split
from train.state import new_state, skeleton_of
from train.step import make_step

TOKENS = 131_072


def compiled(config: TrainConfig) -> Any:
    """The step for one H100 that is not there."""
    gpu = GPUS["h100"]
    device = topology(gpu.target, 1, gpu.per_host)[:1]
    place = NamedSharding(Mesh(device, ("one",), axis_types=(AxisType.Auto,)), PartitionSpec())
    skeleton, optimizer = skeleton_of(config), make_optimizer(config)
    state = jax.eval_shape(
        functools.partial(new_state, config, optimizer=optimizer), skeleton.shapes
    )
    row = jax.ShapeDtypeStruct((1, config.sequence_length or 0), jnp.int32)
    batch = dict.fromkeys(("tokens", "segment_ids", "positions", "targets"), row)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, batch)
    )
    step = jax.jit(make_step(config, skeleton, optimizer), donate_argnums=0)
    with dispatch.kernels(True):
        return step.trace(*placed).lower(lowering_platforms=("cuda",)).compile(OPTIONS)


def row(layers: int) -> dict[str, Any]:
    """Memory of a step with so many layers, and what a layer's gradients and input would be."""
    model = layer_step.layer_config().replace(num_hidden_layers=layers)
    config = layer_step.train_config(layer_step.Case(Stage.WARMUP, TOKENS), model)
    shapes = skeleton_of(config).shapes
    parts = {group: split(shapes, (group,))[0] for group in (Group.INDEXER, Group.MAIN)}
    gradient = {
        group.value: 4 * sum(leaf.size for path, leaf in part.items() if "blocks/" in path)
        for group, part in parts.items()
    }
    return {
        "op": "warmup_memory",
        "kind": f"{layers} layers",
        "keys": TOKENS,
        **layer_step.memory(compiled(config)),
        "indexer_gradient_gib_a_layer": round(gradient["indexer"] / layers / 2**30, 3),
        "backbone_gradient_gib_a_layer": round(gradient["main"] / layers / 2**30, 2),
        "input_gib_a_layer": round(4 * TOKENS * model.hidden_size / 2**30, 2),
    }


def main() -> None:
    """Compiles one step after another."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=(2, 3, 5))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    results = Results(options.json)
    results.runs.append({"environment": {"target": "H100", "jax": jax.__version__}})
    for layers in options.layers:
        results.add(row(layers))
        print(results.rows[-1], flush=True)


if __name__ == "__main__":
    main()
