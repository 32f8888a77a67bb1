"""Linear maps without bias, in float or with FP8 weights.

Weights are `[in, out]`, so a converter transposes what PyTorch stores as `[out, in]`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from dsa_jax.config import Fp8Weights
from dsa_jax.quantization import E4M3, act_dequant, act_quant, weight_dequant, weight_quant
from pallas_kernels.tiling import vary_like


def float_param_dtype(param_dtype: DTypeLike) -> jnp.dtype:
    """The dtype of what FP8 checkpoints keep in float: bf16 there, else `param_dtype`."""
    return jnp.dtype(jnp.bfloat16 if jnp.dtype(param_dtype) == E4M3 else param_dtype)


def fp8_matmul(
    x: Float[Array, "*B in"],
    weight: Float[Array, "in out"],
    scale: Float32[Array, "in/block out/block"],
    fp8: Fp8Weights,
) -> Float[Array, "*B out"]:
    """`x @ W` with both sides in FP8, as the FP8 checkpoints were trained and served.

    x is quantised per token in blocks as deep as the weight's; products are summed in fp32. The
    values are those of a block-scaled GEMM up to the order of the sum.
    """
    q, s = act_quant(x, fp8.tile[0], fp8.scale_format)
    wide = act_dequant(q, s, jnp.float32)
    w = weight_dequant(weight, scale, fp8.tile, jnp.float32)
    return jnp.matmul(wide, w, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


class Linear(nnx.Module):
    """`x @ weight` in the compute dtype; with an e4m3 `weight` and its `scale`, `fp8_matmul`."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        rngs: nnx.Rngs,
        std: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        fp8: Fp8Weights | None = None,
    ):
        weight = std * jax.random.normal(rngs.params(), (in_width, out_width), jnp.float32)
        self.dtype = jnp.dtype(dtype)
        self.fp8 = None
        if jnp.dtype(param_dtype) == E4M3 and fp8 is not None:
            q, scale = weight_quant(weight, fp8.tile, fp8.scale_format)
            self.fp8 = fp8
            self.weight = nnx.Param(q)
            self.scale = nnx.Param(scale)
        else:
            self.weight = nnx.Param(weight.astype(float_param_dtype(param_dtype)))

    def __call__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        """Maps the last axis."""
        if self.fp8 is not None:
            return fp8_matmul(x.astype(self.dtype), self.weight[...], self.scale[...], self.fp8)
        return x.astype(self.dtype) @ self.weight[...].astype(self.dtype)

    def dequantized(self) -> Float[Array, "in out"]:
        """The weight in the compute dtype, for uses other than `x @ weight`."""
        if self.fp8 is not None:
            return weight_dequant(self.weight[...], self.scale[...], self.fp8.tile, self.dtype)
        return self.weight[...].astype(self.dtype)


def wide_product(
    x: Float[Array, "*B in"], weight: Float[Array, "in out"]
) -> Float32[Array, "*B out"]:
    """`x @ weight` of values in x's dtype, summed and returned in fp32.

    Left to itself, differentiation multiplies its gradient, which is fp32, as such: on no tensor
    core. Like every other product's, it is rounded to x's dtype; the weight's own is not rounded.
    """
    return _wide_product(vary_like(x, weight), vary_like(weight, x))


@jax.custom_vjp
def _wide_product(x: Array, weight: Array) -> Array:
    return _summed_in_fp32("...i,io->...o", x, weight.astype(x.dtype))


def _wide_product_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = residuals
    g = g.astype(x.dtype)
    dx = _summed_in_fp32("...o,io->...i", g, weight.astype(x.dtype))
    dweight = _summed_in_fp32("...i,...o->io", x, g)
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


_wide_product.defvjp(lambda *x: (_wide_product(*x), x), _wide_product_backward)


def _summed_in_fp32(dimensions: str, x: Array, y: Array) -> Array:
    return jnp.einsum(
        dimensions, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
