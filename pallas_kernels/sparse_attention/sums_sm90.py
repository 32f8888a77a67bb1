# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Part of sparse attention's backward on Hopper: rows added up by key, with nothing beside.

Four warpgroups of `hopper.add_rows` a CTA, 128 registers a thread.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.add_rows import Adder
from pallas_kernels.sparse_attention.backward_shares import share_columns

_WARPGROUPS = 4
_DEPTH = 24  # rows that a warp has on their way


def adder_of(rows: int, width: int, sms: int, interpret=None) -> Adder:
    """What adds so many rows up."""
    return Adder(
        rows=rows,
        width=width,
        share=share_columns(width),
        ctas=_WARPGROUPS * sms,
        depth=_DEPTH,
        interpret=interpret is not None,
    )


def sum_rows(added, pairs, keys, bounds, sums, *, sms, interpret=None) -> None:
    """Adds listed rows to sums.

    Args:
        added: a `jax.Ref`, bf16 `[shares, rows, columns]`.
        pairs: i32, rows by key.
        keys: i32, their keys.
        bounds: i32, the ranges of `adder_of`.
        sums: a `jax.Ref`, f32 `[keys, C + R]`.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
    """
    adder = adder_of(added.shape[1], sums.shape[-1], sms, interpret)

    def sparse_attention_sums(*refs):  # its name is the kernel's
        number = lax.axis_index("sm") * _WARPGROUPS + lax.axis_index("warpgroup")
        adder.add(number.astype(jnp.int32), *refs)

    plgpu.kernel(
        sparse_attention_sums,
        grid=(sms,),
        grid_names=("sm",),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(added, pairs, keys, bounds, sums)
