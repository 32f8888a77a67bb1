"""Small published checkpoints, written and read without the converter's own code."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.rules import tensors
from dsa_jax import presets
from dsa_jax.config import Fp8Weights, ModelConfig

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def fp8_config(**changes: Any) -> ModelConfig:
    """Widths in whole blocks where FP8 needs them, ragged where it does not; an extra layer."""
    return (
        presets.get("tiny-fp8")
        .replace(
            intermediate_size=256,
            moe_intermediate_size=128,
            v_head_dim=32,
            num_nextn_predict_layers=1,
            fp8_weights=Fp8Weights((128, 128), "ue8m0"),
        )
        .replace(**changes)
    )


def random_tensors(config: ModelConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint; FP8 is random bits, NaN aside, with scales of mixed size."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape, kind in tensors(config):
        if kind == "matrix" and config.fp8_weights is not None:
            bits = rng.integers(0, 0x7F, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
            found[name] = bits.view(DTYPES["F8_E4M3"])
        elif kind == "scale":
            found[name] = 2.0 ** rng.integers(-12, -6, shape).astype(np.float32)
        else:
            dtype = DTYPES["F32" if kind == "fp32" else "BF16"]
            found[name] = rng.standard_normal(shape, np.float32).astype(dtype)
    return found


def write_file(path: Path, content: dict[str, np.ndarray]) -> None:
    """The format by the book: length, header, bytes."""
    header, data = {}, b""
    for name, value in content.items():
        start, data = len(data), data + value.tobytes()
        header[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Likewise."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, item in header.items():
        start, end = (8 + length + at for at in item["data_offsets"])
        value = np.frombuffer(raw[start:end], DTYPES[item["dtype"]])
        found[name] = value.reshape(item["shape"])
    return found


def write_hf(
    folder: Path, config: ModelConfig, content: dict[str, np.ndarray], *, files: int = 3
) -> Path:
    """A folder in which a weight and its scale are never in one file."""
    folder.mkdir()
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(files)]
    for i, name in enumerate(content):
        is_scale = name.endswith("_scale_inv")
        shards[files - 1 if is_scale else i % (files - 1)][name] = content[name]
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        write_file(folder / file, shard)
        index |= dict.fromkeys(shard, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def read_hf(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, found through its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: read_file(folder / file) for file in set(index.values())}
    assert {name for file in files.values() for name in file} == index.keys()
    return {name: files[file][name] for name, file in index.items()}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:5]
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name
