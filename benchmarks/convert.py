"""`python -m benchmarks.convert`: memory and speed of the converters, beside a plain copy.

Makes a checkpoint of one dense and one mixture-of-experts layer in DeepSeek-V3.2-Exp's own sizes,
in FP8, weights and their scales in different files: about 16 GB, with the largest leaf that the
whole model has. Copies it, converts it there and back, compares every bit, removes everything.

Reports as JSON, for each direction: bytes a second and their share of a plain copy's on the same
disk (both with nothing cached, and until all is on the disk), and by how much the resident memory
grew, which is to be at most 2 GiB more than the largest leaf takes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from convert import weights
from convert.huggingface import INDEX, SHARD_BYTES, HuggingFaceFolder, write_json
from convert.rules import entries, tensors
from convert.safetensors import SafetensorsWriter, shard
from convert.source import Tensor
from dsa_jax import presets
from dsa_jax.config import ModelConfig


@dataclass(frozen=True)
class Arguments:
    """What to measure, and where."""

    folder: Path
    """On the disk to measure; about 50 GB must be free. Made here, and removed in the end."""
    layers: int = 2
    """Layers of the model; the first is dense, each other one takes 11.5 GB."""
    small: bool = False
    """A model of a few MB, to try this script."""


def main(args: Arguments) -> int:
    """Measures and prints."""
    args.folder.mkdir(parents=True)
    try:
        report = measure(args)
    finally:
        shutil.rmtree(args.folder)
    print(json.dumps(report, indent=1))
    return 0 if report["passed"] else 1


def measure(args: Arguments) -> dict:
    """The report."""
    source, ours, back = (args.folder / name for name in ("source", "ours", "back"))
    config = model(args)
    write_source(source, config)
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    leaf = largest_leaf(config)
    report: dict = {"bytes": nbytes, "largest_leaf_bytes": leaf, "copy": []}
    report["copy"].append(copy_seconds(source, args.folder / "copy"))
    for name, command, start, end in (
        ("hf-to-orbax", "hf_to_orbax", source, ours),
        ("orbax-to-hf", "orbax_to_hf", ours, back),
    ):
        forget(start)
        began = time.perf_counter()
        child = [sys.executable, "-m", "benchmarks.convert", "--child", command, start, end]
        out = subprocess.run([*map(str, child)], check=True, stdout=subprocess.PIPE, text=True)
        os.sync()
        seconds = time.perf_counter() - began
        report[name] = {"seconds": seconds, **json.loads(out.stdout.splitlines()[-1])}
    differences(source, back)
    shutil.rmtree(ours)
    shutil.rmtree(back)
    report["copy"].append(copy_seconds(source, args.folder / "copy"))
    copy = sum(report["copy"]) / 2  # before and after: other work on the machine meets both
    report["copy_bytes_per_second"] = nbytes / copy
    report["passed"] = True
    for name in ("hf-to-orbax", "orbax-to-hf"):
        found = report[name]
        found["bytes_per_second"] = nbytes / found["seconds"]
        found["share_of_copy"] = copy / found["seconds"]
        found["beyond_largest_leaf"] = found["grown_bytes"] - leaf
        fits = found["beyond_largest_leaf"] <= 2**31 and found["share_of_copy"] >= 0.6
        report["passed"] &= fits
    return report


def model(args: Arguments) -> ModelConfig:
    """The config of the synthetic checkpoint."""
    config = presets.get("deepseek-v3.2-exp").replace(
        num_hidden_layers=args.layers, first_k_dense_replace=1, num_nextn_predict_layers=0
    )
    if not args.small:
        return config
    return config.replace(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=16,
        num_attention_heads=4,
        q_lora_rank=256,
        index_n_heads=4,
    )


def write_source(folder: Path, config: ModelConfig) -> None:
    """A checkpoint of random bits; all weights first, then all scales, so that files differ."""
    folder.mkdir()
    kinds = {"matrix": weights.E4M3, "scale": weights.F32, "fp32": weights.F32}
    listed = list(tensors(config))
    listed.sort(key=lambda item: item[2] == "scale")
    found = {name: Tensor(kinds.get(kind, weights.BF16), shape) for name, shape, kind in listed}
    shards = shard(found, SHARD_BYTES // (1000 if config.vocab_size < 1000 else 2))
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 0x38, 2**24 + 4099, np.uint8)  # no NaN in any of the types
    index = {}
    for i, content in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file = SafetensorsWriter(folder / name, content)
        for tensor, (dtype, shape) in content.items():
            columns = int(np.prod(shape[1:]))
            for rows in weights.stripes(range(shape[0]), columns, 1):
                size = (rows.stop - rows.start) * columns * dtype.itemsize
                at = int(rng.integers(0, 4096))
                part = np.resize(noise[at:], size).view(dtype)
                file.write(tensor, rows.start, part.reshape(-1, *shape[1:]))
            index[tensor] = name
        file.close()
    write_json(folder / INDEX, {"weight_map": index})
    write_json(folder / "config.json", config.to_hf())


def largest_leaf(config: ModelConfig) -> int:
    """Bytes of the largest leaf, as the checkpoint stores it."""
    sizes = {"matrix": 1, "float": 2, "fp32": 4}
    return max(int(np.prod(entry.shape)) * sizes[entry.kind] for entry in entries(config))


def forget(folder: Path) -> None:
    """Drops a folder's files from the system's cache, so that they are read from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, destination: Path) -> float:
    """Of a plain copy, read from the disk and written to it."""
    forget(source)
    began = time.perf_counter()
    destination.mkdir()
    buffer = bytearray(2**24)
    for path in sorted(source.iterdir()):
        with open(path, "rb", buffering=0) as old, open(destination / path.name, "wb") as new:
            while count := old.readinto(buffer):
                new.write(memoryview(buffer)[:count])
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(destination)
    return seconds


def differences(first: Path, second: Path) -> None:
    """Raises AssertionError unless both hold the same tensors, bit by bit."""
    a, b = HuggingFaceFolder(first), HuggingFaceFolder(second)
    assert a.tensors == b.tensors
    for name, tensor in a.tensors.items():
        columns = int(np.prod(tensor.shape[1:]))
        for rows in weights.stripes(range(tensor.shape[0]), columns, 1):
            x, y = a.read(name, rows), b.read(name, rows)
            assert np.array_equal(x.view(np.uint8), y.view(np.uint8)), name


def child(command: str, source: str, destination: str) -> None:
    """One conversion in a process of its own, as the command-line program does it."""
    import convert
    from convert.__main__ import _on_the_cpu

    _on_the_cpu()
    import jax

    jax.devices()
    entries(dataclasses.replace(presets.get("tiny")))
    before = peak_bytes()
    getattr(convert, command)(source, destination)
    after = peak_bytes()
    print(json.dumps({"grown_bytes": after - before, "peak_bytes": after}))


def peak_bytes() -> int:
    """The most memory this program has had resident (`ru_maxrss` may be that of its parent)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024  # pyright: ignore


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main(tyro.cli(Arguments, description=__doc__)))
