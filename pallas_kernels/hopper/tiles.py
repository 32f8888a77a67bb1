# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false
"""What all kernels for bf16 have in common: how a tile lies in shared memory, and base 2."""

import math

from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
"""Columns of bf16 that a 128-byte swizzle spans."""

SWIZZLED = (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))
"""Of an SMEM tile in bf16: 8 rows of 64 columns (1 KB) at a time, 16-byte pieces permuted."""

LOG2E = math.log2(math.e)
"""exp(x) = 2**(LOG2E x): the hardware's exponential has base 2."""
