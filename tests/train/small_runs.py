"""The smallest models, batches and runs that the training tests share."""

import functools
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from dsa_jax import presets
from dsa_jax.config import ModelConfig
from train.config import CheckpointConfig, DataConfig, TrainConfig
from train.stages import Stage
from train.state import Skeleton

# These tests compile far longer than they run: LLVM need not try hard.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Two MoE layers in one stack: half of what `tiny` takes to compile. topk 8 is far below T.
MODEL: ModelConfig = presets.get("tiny").replace(first_k_dense_replace=0, num_hidden_layers=2)
LENGTH = 24


def config(stage: Stage, **fields) -> TrainConfig:
    given = {
        "stage": stage,
        "model": MODEL,
        "steps": 4,
        "batch_size": 8,
        "sequence_length": LENGTH,
        "compute_dtype": "float32",
        "loss_chunk": 10,
        "remat": "none",
        **fields,
    }
    return TrainConfig(**given).resolved()


def loud_params(skeleton: Skeleton, seed: int = 0) -> dict[str, jax.Array]:
    """Parameters with which attention is not uniform, indexer weights have both signs and no
    gradient is tiny; drawn by NumPy, which needs no compilation."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, shape in skeleton.shapes.items():
        fan_in = shape.shape[-2] if len(shape.shape) > 1 else 1
        scale = 0.1 if "norm" in path or "bias" in path else 1.2 * fan_in**-0.5
        leaf = scale * rng.normal(size=shape.shape) + (path.endswith("norm/weight"))
        params[path] = jnp.asarray(leaf, shape.dtype)
    return params


def packed(documents, batch: int, length: int, layout) -> dict[str, np.ndarray]:
    """A batch by hand: `layout` lists, for each row, the numbers of the documents in it."""
    arrays = {name: np.zeros((batch, length), np.int32) for name in ("tokens", "segment_ids")}
    arrays["positions"] = np.zeros((batch, length), np.int32)
    arrays["targets"] = np.full((batch, length), -1, np.int32)
    for row, numbers in enumerate(layout):
        at = 0
        for segment, number in enumerate(numbers, 1):
            ids = documents[number]
            place = slice(at, at + len(ids))
            arrays["tokens"][row, place] = ids
            arrays["targets"][row, at : at + len(ids) - 1] = ids[1:]
            arrays["segment_ids"][row, place] = segment
            arrays["positions"][row, place] = np.arange(len(ids))
            at += len(ids)
        assert at <= length
    return arrays


def token_file(folder: Path, count: int = 3000) -> Path:
    """Text with something to learn: a noisy cycle, in documents that end with id 1."""
    rng = np.random.default_rng(0)
    ids = 2 + (np.arange(count) * 7 + rng.integers(0, 3, count)) % 90
    ids[rng.integers(0, count, count // 40)] = 1
    path = folder / "tokens.npy"
    np.save(path, ids.astype(np.uint16))
    return path


def run_config(stage: Stage, folder: Path, data: Path, **fields) -> TrainConfig:
    """A whole run of few steps that saves every second one."""
    return config(
        stage,
        **{
            "output": folder / stage.value,
            "data": DataConfig(sources=(str(data),), document_end=1),
            "checkpoint": CheckpointConfig(interval=2, keep=2),
            "batch_size": 4,
            **fields,
        },
    )


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)
