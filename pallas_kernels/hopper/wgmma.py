"""Products added to arrays in registers, on the tensor core, with a twin for interpret mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def multiply_add(
    accs: Sequence[jax.Array], terms: Sequence[tuple[int, Any, Any]], interpret: bool, nearly=None
) -> list[jax.Array]:
    """`accs[i] + a @ b` summed over the terms `(i, a, b)`, waited for.

    Args:
        accs: f32, in layout `WGMMA`.
        terms: the number of an accumulator, its left factor (an SMEM ref, or an array in layout
            `WGMMA`) and its right factor (an SMEM ref).
        interpret: whether to run the twin: interpret mode has neither accumulators that start
            from a value nor left factors in registers.
    """
    if interpret:
        accs = list(accs)
        for number, a, b in terms:
            a = a if isinstance(a, jax.Array) else a[...]
            accs[number] += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        if nearly is not None:
            nearly()
        plgpu.commit_smem()  # wgmma's reads go through the async proxy, as if after this fence
        return accs

    def issue(refs):
        for number, a, b in terms:
            plgpu.wgmma(refs[number], a, b)
        if nearly is not None:
            plgpu.wgmma_wait(1)
            nearly()

    return list(pl.run_state(issue)([plgpu.ACC.init(acc) for acc in accs]))
