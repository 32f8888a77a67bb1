# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Products added to arrays in registers, on the tensor core, with a twin for interpret mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Product(NamedTuple):
    """`accumulators[number] += left @ right`, started.

    `left` is an SMEM ref, or an array in layout `WGMMA`; `right` is an SMEM ref.
    """

    number: int
    left: Any
    right: Any


class Until(NamedTuple):
    """Waits until at most so many of the products started are unfinished."""

    unfinished: int


def multiply_add(
    accumulators: Sequence[jax.Array],
    steps: Sequence[Product | Until | Callable[[], None]],
    interpret: bool,
) -> list[jax.Array]:
    """The accumulators after the products of the steps, all waited for.

    Args:
        accumulators: f32, in layout `WGMMA`.
        steps: products, waits, and what to do in between (it may not touch the accumulators).
        interpret: whether to run the twin: interpret mode has neither accumulators that start
            from a value nor left factors in registers.
    """
    if interpret:
        accumulators = list(accumulators)
        for step in steps:
            if isinstance(step, Product):
                left = step.left if isinstance(step.left, jax.Array) else step.left[...]
                product = jnp.dot(left, step.right[...], preferred_element_type=jnp.float32)
                accumulators[step.number] += product
            elif isinstance(step, Until):
                # wgmma reads through the async proxy, the twin has read as if before this fence.
                plgpu.commit_smem()
            else:
                step()
        plgpu.commit_smem()
        return accumulators

    def run(refs):
        for step in steps:
            if isinstance(step, Product):
                plgpu.wgmma(refs[step.number], step.left, step.right)
            elif isinstance(step, Until):
                plgpu.wgmma_wait(step.unfinished)
            else:
                step()

    return list(pl.run_state(run)([plgpu.ACC.init(acc) for acc in accumulators]))
