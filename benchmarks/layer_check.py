"""Gradients of a sparse step of one real-shaped layer, by kernels and by XLA.

    python -m benchmarks.layer_check --tokens 8192 --json FILE

The layer of `benchmarks.layer_step`; both sides get the same numbers, and XLA the keys that the
kernels selected. What is left of choices are the experts: a few tokens score two of them all but
the same, and rounding decides. Those are counted, and in a second run get no gradient from above,
so that what is compared is arithmetic. XLA multiplies every row with every expert in memory, tokens
x experts of a token x experts x 14 KB: beyond 8K tokens take fewer experts.
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
from benchmarks.timing import environment, wait_for
from dsa_jax.config import ModelConfig
from pallas_kernels import Selection, dispatch
from train.stages import Stage
from train.state import Params, skeleton_of

BOUND = 1e-2
"""Largest relative difference (Frobenius norms) of any gradient between kernels and XLA. Both round
each result of an op to bf16 (2**-9 of its value), at other places; the ops' own errors to fp32 are
2e-3 to 3e-3, and a gradient passes some ten of them."""

MOVED = 5e-2
"""From what difference of its update on a token counts as one that went to another expert: one of
eight replaced makes 0.2, rounding 0.005."""

MOST_MOVED = 1 / 200
"""Share of the tokens that may."""


def leaf(path: str) -> str:
    """A parameter's name inside the layer: `self_attn/q_b_proj`."""
    names = path.split("/")
    return "/".join(names[names.index("blocks") + 2 :]).removesuffix("/weight")


def check(tokens: int, model: ModelConfig, pool: Executor) -> Callable[..., dict[str, Any]]:
    """Gradients of one sparse step by kernels and by XLA on the same numbers and keys.

    Returns:
        What runs it, once its two programs are compiled in `pool`; takes the file of `wait_for`.
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

    def finish(lock: Path | None = None) -> dict[str, Any]:
        programs = ours.result(), theirs.result()
        wait_for(lock)
        params, h, above = jax.jit(inputs)()

        def both(above: jax.Array) -> tuple[Any, Any]:
            found, outcome = programs[0](params, h, above)
            say(f"check {tokens}: by kernels, KL {outcome.kl}")
            wanted, reference = programs[1](params, h, above, outcome.selection)
            say(f"check {tokens}: by XLA, KL {reference.kl}")
            return (found, wanted), (outcome, reference)

        _, outcomes = both(above)
        moved = by_token(*(x.hidden for x in outcomes), h) > MOVED
        del outcomes
        above = jnp.where(moved[..., None], jnp.zeros_like(above), above)
        found, outcomes = both(above)
        errors = differences(*found, h, above, moved, *outcomes)
        return checked_row(tokens, config.model, errors, moved, outcomes)

    return finish


def checked_row(
    tokens: int, model: ModelConfig, errors: Any, moved: jax.Array, outcomes: Any
) -> dict[str, Any]:
    """The check as a row of the results."""
    good = all(error <= BOUND for error in errors.values())
    return {
        "op": "layer_check",
        "keys": tokens,
        "topk": min(model.index_topk or 0, tokens),
        "groups": model.n_routed_experts,
        "experts_of_a_token": model.num_experts_per_tok,
        "bound": BOUND,
        "within": good and int(moved.sum()) <= MOST_MOVED * moved.size,
        "errors": {name: float(f"{error:.2e}") for name, error in errors.items()},
        "tokens_moved": int(moved.sum()),
        "kl": [round(float(x.kl), 6) for x in outcomes],
    }


@jax.jit
def by_token(found: jax.Array, wanted: jax.Array, passed: jax.Array) -> jax.Array:
    """Relative difference of each token's update."""
    error, whole = jnp.square(found - wanted), jnp.square(wanted - passed)
    return jnp.sqrt(error.sum(axis=-1) / whole.sum(axis=-1))


@jax.jit
def _squares(a: jax.Array, b: jax.Array, passed: jax.Array | float) -> jax.Array:
    """Sums of squares of a - b and of b, less what passed through."""
    wide = (jnp.float32(x) for x in (a, b, passed))
    a, b, passed = wide
    return jnp.stack([jnp.sum((a - b) ** 2), jnp.sum((b - passed) ** 2)])


def differences(found: Params, wanted: Params, *layers: Any) -> dict[str, float]:
    """Relative difference of each parameter's gradient, of the layer's update and of what it sends
    down; what merely passes through the layer is left out of both.

    Args:
        found: gradients by kernels.
        wanted: gradients by XLA.
        layers: the layer's input, the gradient from above, which tokens do not count in the
            update, both outcomes.
    """
    h, above, moved, ours, theirs = layers
    pairs = {leaf(p): (found[p], wanted[p], 0.0) for p in found if "blocks/" in p}
    found_hidden, hidden = (jnp.where(moved[..., None], h, x.hidden) for x in (ours, theirs))
    pairs["output"] = found_hidden, hidden, h
    pairs["input"] = ours.below, theirs.below, above
    # One after the other: all at once would not fit.
    sums = {name: jax.device_get(_squares(*pair)) for name, pair in pairs.items()}
    return {name: float((d / w) ** 0.5) if d else 0.0 for name, (d, w) in sums.items()}


def main() -> None:
    """Runs one check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--experts-of-a-token", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="of all processes on the GPU")
    options = parser.parse_args()
    model = layer_config(options.experts, options.experts_of_a_token)
    results = Results(options.json)
    results.runs.append({"environment": environment()})
    with ThreadPoolExecutor() as pool:
        finish = check(options.tokens, model, pool)
        results.add(finish(options.lock))
    print(json.dumps(results.rows[-1]), flush=True)


if __name__ == "__main__":
    main()
