"""AdamW in two branches: the main model and the indexers, each with its own clip, rate and decay.

The two gradients are disjoint, and under Adam the size of a loss alone changes nothing. It is a
*shared* global-norm clip that would couple them: a large KL gradient would shrink the language
model's update. Hence two clips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import optax

from train.config import BranchConfig, TrainConfig
from train.stages import Group, group_of


def schedule(config: TrainConfig, branch: BranchConfig) -> optax.Schedule:
    """Learning rate by step: linear from 0 to the peak, then constant or a cosine.

    Args:
        config: a resolved config: `steps` and the optimizer's shape fields.
        branch: whose peak.
    """
    options = config.optimizer
    peak, steps = branch.learning_rate, config.steps
    assert peak is not None
    assert steps is not None
    # Step 0 already learns something, step ramp - 1 runs at the peak.
    ramp = max(1, round(steps * (options.warmup_fraction or 0)))
    linear = optax.linear_schedule(peak / ramp, peak, max(ramp - 1, 1))
    if options.schedule == "constant":
        rest = optax.constant_schedule(peak)
    else:
        rest = optax.cosine_decay_schedule(peak, max(steps - ramp, 1), options.final_fraction)
    return optax.join_schedules([linear, rest], [ramp])


def decays(path: str) -> bool:
    """Whether weight decay applies to a parameter.

    Not to norms' scales and biases, which have no size to keep small, nor to the indexer's
    `weights_proj`: decay would pull its heads towards equal, zero weights.
    """
    names = path.split("/")
    return not any(
        "norm" in name or name in ("bias", "weights_proj") or name.endswith("_bias")
        for name in names
    )


def _branch(config: TrainConfig, branch: BranchConfig) -> optax.GradientTransformation:
    def mask(params: Mapping[str, object]) -> dict[str, bool]:
        return {path: decays(path) for path in params}

    options = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(branch.clip),
        optax.adamw(
            schedule(config, branch),
            b1=options.beta1,
            b2=options.beta2,
            eps=options.epsilon,
            mu_dtype=jnp.dtype(options.moment_dtype),
            weight_decay=branch.weight_decay,
            mask=mask,
        ),
    )


def branches(config: TrainConfig) -> dict[str, BranchConfig]:
    """The branches that the stage trains, by name."""
    named = {
        Group.MAIN.value: config.optimizer.main,
        Group.INDEXER.value: config.optimizer.indexer,
    }
    return {group.value: named[group.value] for group in config.trainable}


def labels(params: Mapping[str, object] | Sequence[str]) -> dict[str, str]:
    """Each parameter's branch."""
    return {path: group_of(path).value for path in params}


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The stage's optimizer over its *trainable* parameters only, a flat dict by path.

    What is frozen is never passed to it, so it owns no state for it.

    Args:
        config: a resolved config.
    """
    by_name: dict[str, Callable | optax.GradientTransformation] = {
        name: _branch(config, branch) for name, branch in branches(config).items()
    }
    return optax.partition(by_name, labels)  # pyright: ignore[reportArgumentType]
