"""Gradients of a sparse step of one real-shaped layer, by kernels and by XLA.

    python -m benchmarks.layer_check --tokens 8192 --json FILE

The layer of `benchmarks.layer_step`; both sides get the same numbers, and XLA the keys that the
kernels selected. XLA multiplies every row with every expert in memory, tokens x experts of a token
x experts x 14 KB: beyond 8K tokens take fewer experts.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.layer_step import (
    Case,
    compile_,
    draw,
    gradients,
    layer_config,
    say,
    train_config,
)
from benchmarks.ops import Results
from benchmarks.timing import environment, exclusive
from dsa_jax.config import ModelConfig
from pallas_kernels import Selection, dispatch
from train.stages import Group, Stage, group_of
from train.state import Params, skeleton_of

BOUND = 2e-2
"""Largest relative difference (Frobenius norms) of any gradient between kernels and XLA. Both round
each result of an op to bf16 (2**-9 of its value), at other places; the ops' own errors to fp32 are
2e-3 to 3e-3, and a gradient passes some ten of them."""


def group(path: str) -> str:
    """The group of parameters whose gradient is compared as one."""
    if group_of(path) is Group.INDEXER:
        return "indexer"
    names = path.split("/")
    return "experts" if "mlp" in names else "attention" if "self_attn" in names else "norms"


def check(tokens: int, model: ModelConfig, pool: Executor) -> Callable[[], dict[str, Any]]:
    """Gradients of one sparse step by kernels and by XLA on the same numbers and keys.

    Returns:
        What runs it, once its two programs are compiled in `pool`.
    """
    config = train_config(Case(Stage.SPARSE, tokens), model)
    run = functools.partial(gradients, config, skeleton_of(config))
    inputs = functools.partial(draw, config, 1)
    params, h, above = jax.eval_shape(inputs)
    topk = min(config.model.index_topk or 0, tokens)
    keys = Selection(jax.ShapeDtypeStruct((1, tokens, topk), jnp.int32))  # pyright: ignore[reportArgumentType]
    with dispatch.kernels(True):
        ours = pool.submit(compile_, jax.jit(lambda *x: run(*x)).lower(params, h, above))
    with dispatch.kernels(False):
        lowered = jax.jit(lambda *x: run(*x)).lower(params, h, above, keys)
        theirs = pool.submit(compile_, lowered)

    def finish() -> dict[str, Any]:
        params, h, above = jax.jit(inputs)()
        found, outcome = ours.result()(params, h, above)
        say(f"check {tokens}: by kernels, KL {outcome.kl}")
        wanted, reference = theirs.result()(params, h, above, outcome.selection)
        say(f"check {tokens}: by XLA, KL {reference.kl}")
        errors = differences(found, wanted, h, above, outcome, reference)
        return checked_row(tokens, config.model, errors, (outcome, reference))

    return finish


def checked_row(tokens: int, model: ModelConfig, errors: Any, outcomes: Any) -> dict[str, Any]:
    """The check as a row of the results."""
    return {
        "op": "layer_check",
        "keys": tokens,
        "topk": min(model.index_topk or 0, tokens),
        "groups": model.n_routed_experts,
        "experts_of_a_token": model.num_experts_per_tok,
        "bound": BOUND,
        "within": bool(max(errors.values()) <= BOUND),
        "errors": {name: float(f"{error:.2e}") for name, error in errors.items()},
        "kl": [round(float(x.kl), 6) for x in outcomes],
    }


@jax.jit
def _squares(a: jax.Array, b: jax.Array, passed: jax.Array | float) -> jax.Array:
    """Sums of squares of a - b and of b, less what passed through."""
    wide = (jnp.float32(x) for x in (a, b, passed))
    a, b, passed = wide
    return jnp.stack([jnp.sum((a - b) ** 2), jnp.sum((b - passed) ** 2)])


def differences(found: Params, wanted: Params, *layers: Any) -> dict[str, float]:
    """Relative difference of each group's gradient, of the layer's update and of what it sends
    down; what merely passes through the layer is left out of both.

    Args:
        found: gradients by kernels.
        wanted: gradients by XLA.
        layers: the layer's input, the gradient from above, both outcomes.
    """
    h, above, ours, theirs = layers
    pairs = [(group(path), found[path], wanted[path], 0.0) for path in found if "stacks/" in path]
    pairs.append(("output", ours.hidden, theirs.hidden, h))
    pairs.append(("input", ours.below, theirs.below, above))
    sums: dict[str, Any] = {}
    for name, *pair in pairs:  # one after the other: all at once would not fit
        sums[name] = sums.get(name, 0.0) + jax.device_get(_squares(*pair))
    return {name: float((part / whole) ** 0.5) for name, (part, whole) in sums.items()}


def main() -> None:
    """Runs one check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--experts-of-a-token", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="of all processes on the GPU")
    options = parser.parse_args()
    model = layer_config(options.experts, num_experts_per_tok=options.experts_of_a_token)
    results = Results(options.json)
    results.runs.append({"environment": environment()})
    with ThreadPoolExecutor() as pool:
        finish = check(options.tokens, model, pool)
        with exclusive(options.lock):
            results.add(finish())
    print(json.dumps(results.rows[-1]), flush=True)


if __name__ == "__main__":
    main()
