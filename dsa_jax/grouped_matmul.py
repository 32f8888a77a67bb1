"""One matrix product per group of consecutive rows: the experts' matmul.

`grouped_matmul` is the one place where a back end chooses how. On a Hopper GPU kernels serve bf16.
`jax.lax.ragged_dot` serves by default; on a CPU, where XLA expands it into a product with every
group's matrix, tiles of rows do five to seven times better at the sizes a CPU is used for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose
from pallas_kernels.grouped_matmul import sm90
from pallas_kernels.tiling import vary_like

# The CPU form copies one weight matrix per tile of rows; above this it gives way to ragged_dot.
_TILED_WEIGHT_BYTES = 256 * 2**20


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """`out[m] = x[m] @ w[e]`, e the group that row m lies in.

    Args:
        x: rows sorted by group.
        w: one matrix a group.
        group_sizes: rows of each group; zero is allowed. Rows after the last group must be finite,
            and what stands in their place in the result, and in the gradient of x, is undefined.
    """
    if _kernel_serves(x, w):
        return vary_like(sm90.multiply(x, w, group_sizes), (x, w))  # kernels do not say so
    return jax.lax.platform_dependent(x, w, group_sizes, cpu=_on_cpu, default=jax.lax.ragged_dot)


def _kernel_serves(x: Array, w: Array) -> bool:
    return choose("grouped_matmul", None, sm90.unsupported(x, w)) == "mosaic"


def _forward(x, w, group_sizes):
    return grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _backward(residuals, g):
    x, w, group_sizes = residuals
    if _kernel_serves(x, w):
        dx, dw = sm90.gradients(x, w, group_sizes, g.astype(x.dtype))
        return *vary_like((dx, dw), residuals), None

    # Written out so that no back end keeps another one's residuals.
    def gradient(form):
        def run(x, w, group_sizes, g):
            return jax.vjp(lambda x, w: form(x, w, group_sizes), x, w)[1](g)

        return run

    dx, dw = jax.lax.platform_dependent(
        *residuals, g, cpu=gradient(_on_cpu), default=gradient(jax.lax.ragged_dot)
    )
    return dx, dw, None


grouped_matmul.defvjp(_forward, _backward)


def _on_cpu(x: Array, w: Array, group_sizes: Array) -> Array:
    rows, groups = x.shape[0], w.shape[0]
    group_sizes = group_sizes.at[-1].add(rows - group_sizes.sum())  # whole tiles of all rows
    tile = min(max(8, 1 << max(rows // groups - 1, 0).bit_length()), 128)
    tiles = rows // tile + groups  # each group wastes less than one
    if tiles * w[0].size * w.dtype.itemsize > _TILED_WEIGHT_BYTES:
        return jax.lax.ragged_dot(x, w, group_sizes)
    return _tiled(x, w, group_sizes, tile, tiles)


def _tiled(x: Array, w: Array, group_sizes: Array, tile: int, tiles: int) -> Array:
    """Pads every group to whole tiles of rows and multiplies tile by tile."""
    rows, groups = x.shape[0], w.shape[0]
    tiles_of = -(-group_sizes // tile)
    upto = jnp.tri(groups, dtype=group_sizes.dtype)  # sums of the groups so far, by a product
    end, tile_end = upto @ group_sizes, upto @ tiles_of
    group = (jnp.arange(rows)[:, None] >= end).sum(1)
    owner = (jnp.arange(tiles)[:, None] >= tile_end).sum(1)
    slot = jnp.arange(rows) + ((tile_end - tiles_of) * tile - (end - group_sizes))[group]
    padded = jnp.zeros((tiles * tile, x.shape[1]), x.dtype).at[slot].set(x, unique_indices=True)
    out = jnp.einsum(
        "tmK,tKN->tmN",
        padded.reshape(tiles, tile, -1),
        w[jnp.minimum(owner, groups - 1)],  # the last tiles may be nobody's
        preferred_element_type=jnp.float32,
    )
    return out.reshape(tiles * tile, -1)[slot].astype(x.dtype)
