"""A model from whatever a run left on disk: an export, one of its checkpoints, or its folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsa_jax import checkpoint as model_files
from dsa_jax import presets
from dsa_jax.config import Fp8Weights, ModelConfig, Numerics, Yarn
from dsa_jax.sharding import MeshConfig, make_mesh
from dsa_jax.transformer import Transformer
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.stages import Stage
from train.start import find_step, plan, start


def load_model(
    path: Path,
    *,
    mesh: MeshConfig | None = None,
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> Transformer:
    """The model at `path`.

    Args:
        path: an exported model; a run's folder, whose export is taken if it is finished and its
            newest checkpoint if not; or one step of its checkpoints.
        mesh: devices along each axis; None: one device.
        compute_dtype: of the matmuls.

    Raises:
        FileNotFoundError: none of these.
        CheckpointError: damaged, or not written by this package.
    """
    mesh = mesh or MeshConfig()
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return model_files.load(folder, mesh=make_mesh(mesh), dtype=jnp.dtype(compute_dtype))
    place = find_step(path)
    if place is None:
        raise FileNotFoundError(
            f"{path} holds no model: name an exported model, a run's folder, or one step of its "
            "checkpoints"
        )
    folder, step = place
    # Which architecture it is stands in the record; reading that needs none.
    with closing(Checkpoints(folder, presets.get("tiny"))) as checkpoints:
        record = checkpoints.record(step)
    model = architecture(record.config["model"])
    config = TrainConfig(
        stage=Stage.DENSE,  # the one stage that takes models with and without indexers as they are
        init_from=folder / str(step),
        model=model,
        sequence_length=model.max_position_embeddings,
        mesh=mesh,
        compute_dtype=compute_dtype,
    )
    return starting_model(config)


def starting_model(config: TrainConfig) -> Transformer:
    """The model that a new run of `config` would take its first step from."""
    config = config.resolved()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = plan(config, mesh)
        return run.skeleton.model(start(run).state.params)


def architecture(data: Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from `train.config.to_dict` of one."""
    nested = {"rope_scaling": Yarn, "fp8_weights": Fp8Weights, "numerics": Numerics}
    values: dict[str, Any] = dict(data)
    for name, kind in nested.items():
        if values.get(name) is not None:
            values[name] = kind(**values[name])
    for name in ("indexer_types", "eos_token_id", "extra"):
        if isinstance(values.get(name), list):
            values[name] = tuple(tuple(x) if isinstance(x, list) else x for x in values[name])
    return ModelConfig(**values)
