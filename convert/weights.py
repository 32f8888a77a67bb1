"""Numbers from one dtype and order to another, a few rows at a time.

Everything here is in the published layout: weights `[out, in]`, the block scales of an FP8 weight
`[out/a, in/b]`; they multiply, w = q * s.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np

from dsa_jax.config import Fp8Weights
from dsa_jax.quantization import E4M3_MAX

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
# Numbers converted at a time; their fp32 form takes 64 MiB.
_STRIPE = 2**24


def stripes(rows: range, columns: int, tile: int) -> Iterator[slice]:
    """Runs of rows of about `_STRIPE` numbers; all but the last have a multiple of `tile` rows."""
    step = max(1, _STRIPE // max(columns, 1) // tile) * tile
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def copy(out: np.ndarray, value: np.ndarray) -> None:
    """`out[...] = value` for equal dtypes, fast where one of them is a transposed view."""
    # As integers: moving a NaN as a float may change its bits.
    bits = np.dtype(f"u{out.dtype.itemsize}")
    out, value = out.view(bits), value.view(bits)
    if value.ndim == 2:
        if out.strides[0] < out.strides[1]:
            out, value = out.T, value.T
        if value.strides[0] < value.strides[1]:
            # XLA puts the numbers in order several times faster than NumPy.
            value = np.asarray(jax.device_put(value, jax.local_devices(backend="cpu")[0]))
    out[...] = value


def convert(
    value: np.ndarray, scale: np.ndarray | None, wanted: np.dtype, fp8: Fp8Weights | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Some rows of a tensor in another dtype; equal dtypes keep their bits.

    Args:
        value: rows of a vector or matrix, whole tiles of them if it is or becomes FP8.
        scale: their block scales if `value` is in FP8.
        wanted: the dtype.
        fp8: the tiles' size.

    Returns:
        The rows, and their block scales if `wanted` is FP8.
    """
    if value.dtype == wanted:
        return value, scale
    if scale is not None:
        assert fp8 is not None
        value = dequantize(value, scale, fp8)
    if wanted == E4M3:
        assert fp8 is not None
        return quantize(value, fp8)
    return value.astype(wanted), None


def dequantize(q: np.ndarray, scale: np.ndarray, fp8: Fp8Weights) -> np.ndarray:
    """`q * s` in fp32."""
    return q.astype(np.float32) * _spread(scale, fp8, q.shape)


def quantize(w: np.ndarray, fp8: Fp8Weights) -> tuple[np.ndarray, np.ndarray]:
    """FP8 and scales, by the rule of `dsa_jax.quantization.weight_quant`."""
    a, b = fp8.weight_block_size
    w = w.astype(np.float32)
    rows, columns = w.shape
    padded = np.pad(np.abs(w), ((0, -rows % a), (0, -columns % b)))
    amax = padded.reshape(-(-rows // a), a, -(-columns // b), b).max(axis=(1, 3))
    scale = np.where(amax > 0, amax / np.float32(E4M3_MAX), np.float32(1))
    if fp8.scale_format == "ue8m0":
        scale = power_of_two_above(scale)
    q = w / _spread(scale, fp8, w.shape)
    return np.clip(q, -E4M3_MAX, E4M3_MAX).astype(E4M3), scale


def power_of_two_above(s: np.ndarray) -> np.ndarray:
    """The least power of two >= s > 0, on the bits."""
    bits = np.ascontiguousarray(s, np.float32).view(np.uint32)
    exponent = (bits >> np.uint32(23)) + ((bits & np.uint32(0x7FFFFF)) != 0)
    return (exponent.astype(np.uint32) << np.uint32(23)).view(np.float32)


def _spread(scale: np.ndarray, fp8: Fp8Weights, shape: tuple[int, ...]) -> np.ndarray:
    """Each tile's scale at each of its numbers."""
    a, b = fp8.weight_block_size
    return np.repeat(np.repeat(scale, a, axis=0), b, axis=1)[: shape[0], : shape[1]]
