"""Arrays between layouts and dtypes, in NumPy and in stripes, so that scratch memory stays small.

Everything here works on a published tensor, `[out, in]`. The block scales of an FP8 weight are
`[out/a, in/b]` and multiply: w = q * s.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from dsa_jax.config import Fp8Weights
from dsa_jax.quantization import E4M3_MAX

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
# Numbers converted at a time; their fp32 form takes four times as many bytes.
_STRIPE = 2**24


def stripes(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Runs of whole rows of about `_STRIPE` numbers, each but the last a multiple of `multiple`."""
    step = max(1, _STRIPE // max(columns, 1) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def copy(out: np.ndarray, value: np.ndarray) -> None:
    """`out[...] = value`, cast if the dtypes differ.

    `out` may be a transposed view: rows are taken few at a time, so that the columns they become
    stay in the processor's cache.
    """
    if value.ndim < 2:
        out[...] = value.astype(out.dtype)
        return
    if out.dtype == value.dtype:  # bits, so that nothing is quieted or flushed on the way
        bits = np.dtype(f"u{out.dtype.itemsize}")
        out, value = out.view(bits), value.view(bits)
    for i in range(0, value.shape[0], _TILE):
        for j in range(0, value.shape[1], _TILE):
            tile = slice(i, i + _TILE), slice(j, j + _TILE)
            out[tile] = value[tile].astype(out.dtype, copy=False)


_TILE = 256


def put(
    out: np.ndarray,
    out_scale: np.ndarray | None,
    value: np.ndarray,
    scale: np.ndarray | None,
    fp8: Fp8Weights | None,
) -> None:
    """Writes a tensor into `out`, and into `out_scale` if that is to be in FP8.

    Equal dtypes are copied bit by bit, FP8 with its scales.
    """
    if out_scale is not None and scale is not None:
        copy(out, value)
        out_scale[...] = scale
    elif scale is not None:
        assert fp8 is not None
        dequantize(out, value, scale, fp8)
    elif out_scale is not None:
        assert fp8 is not None
        quantize(out, out_scale, value, fp8)
    else:
        copy(out, value)


def dequantize(out: np.ndarray, q: np.ndarray, scale: np.ndarray, fp8: Fp8Weights) -> None:
    """`out[...] = q * scale`, in fp32, rounded once."""
    a, b = fp8.weight_block_size
    for rows in stripes(*q.shape, multiple=a):
        blocks = slice(rows.start // a, -(-rows.stop // a))
        wide = np.repeat(np.repeat(scale[blocks], a, axis=0), b, axis=1)
        part = q[rows].astype(np.float32)
        part *= wide[: part.shape[0], : part.shape[1]]
        copy(out[rows], part)


def quantize(out: np.ndarray, scale: np.ndarray, w: np.ndarray, fp8: Fp8Weights) -> None:
    """Writes `out` (e4m3) and `scale`: the rule of `dsa_jax.quantization.weight_quant`."""
    a, b = fp8.weight_block_size
    for rows in stripes(*w.shape, multiple=a):
        part = w[rows].astype(np.float32)
        height, width = part.shape
        padded = np.pad(np.abs(part), ((0, -height % a), (0, -width % b)))
        amax = padded.reshape(-(-height // a), a, -(-width // b), b).max(axis=(1, 3))
        s = np.where(amax > 0, amax / np.float32(E4M3_MAX), np.float32(1)).astype(np.float32)
        if fp8.scale_format == "ue8m0":
            s = power_of_two_above(s)
        scale[rows.start // a : rows.start // a + len(s)] = s
        part /= np.repeat(np.repeat(s, a, axis=0), b, axis=1)[:height, :width]
        copy(out[rows], np.clip(part, -E4M3_MAX, E4M3_MAX, out=part).astype(E4M3))


def power_of_two_above(s: np.ndarray) -> np.ndarray:
    """The least power of two >= s > 0, on the bits."""
    bits = np.ascontiguousarray(s).view(np.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return (exponent.astype(np.uint32) << 23).view(np.float32)
