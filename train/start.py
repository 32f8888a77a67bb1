"""Where a stage's first state comes from: its own checkpoint, another stage's, or a random draw.

A stage change keeps parameters, data position and key, and makes new optimizer state. The one
thing that may be missing is the indexer, when warm-up starts from a dense model: it is grafted,
freshly initialised. Any other difference between the parameters on disk and those of the model is
an error, for a parameter that silently stays random is the worst kind of bug.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsa_jax import checkpoint as model_files
from dsa_jax.layer_tree import split_layers, stack_layers
from dsa_jax.sharding import Axes, Rules, axes_tuple, param_specs, shardings
from train.checkpoints import Checkpoints, RunRecord, refuse_other_config
from train.config import TrainConfig, differences, to_dict
from train.data import DataPosition
from train.optimizer import make_optimizer
from train.stages import Group, Stage, group_of
from train.state import Params, Skeleton, TrainState, build, flat, nested, new_state, skeleton_of

Shapes = dict[str, jax.ShapeDtypeStruct]


class Plan(NamedTuple):
    """What a run is made of before it has numbers.

    Attributes:
        config: resolved.
        mesh: the devices.
        skeleton: of the model.
        optimizer: of the stage.
        state: shapes, dtypes and shardings of the state.
    """

    config: TrainConfig
    mesh: Mesh
    skeleton: Skeleton
    optimizer: optax.GradientTransformation
    state: TrainState


class Start(NamedTuple):
    """The state before the next step.

    Attributes:
        state: arrays on their devices.
        rng: raw key of the run, kept across stages.
        position: of the data; None at its beginning.
        origin: where the parameters came from, in words.
        notes: what the user should know about it, one line each.
    """

    state: TrainState
    rng: tuple[int, ...]
    position: DataPosition | None
    origin: str
    notes: tuple[str, ...] = ()


class Source(NamedTuple):
    """Parameters that a new stage can start from.

    Attributes:
        name: of the folder.
        shapes: what it holds, by path on disk, one leaf a layer.
        read: takes shapes with shardings, returns arrays.
        record: what its run noted; None for an exported model.
        close: to be called when all is read.
    """

    name: str
    shapes: Shapes
    read: Callable[[Shapes], Params]
    record: RunRecord | None
    close: Callable[[], None] = lambda: None


def plan(config: TrainConfig, mesh: Mesh) -> Plan:
    """Shapes and shardings of a run; allocates nothing.

    Raises:
        ValueError: the batch or a parameter does not divide over the devices.
    """
    _check_batch(config, mesh)
    skeleton = skeleton_of(config)
    optimizer = make_optimizer(config)
    shapes = jax.eval_shape(lambda params: new_state(config, params, optimizer), skeleton.shapes)
    placed = param_shardings(skeleton.shapes, mesh, config.rules)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def shard(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment's path ends in the key of its parameter, and it lives where that does.
        name = getattr(path[-1], "key", None)
        return _with(leaf, placed[name] if name in placed and leaf.ndim else everywhere)

    return Plan(config, mesh, skeleton, optimizer, jax.tree.map_with_path(shard, shapes))


def _check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Whether a micro-batch's sequences, and their tokens, divide over the mesh."""

    def over(axes: Axes) -> tuple[int, str]:
        names = axes_tuple(axes)
        return math.prod(mesh.shape[a] for a in names), " x ".join(f"mesh.{a}" for a in names)

    parts, names = over(config.rules.B)
    rows = (config.batch_size or 0) // config.micro_batches
    if rows % parts:
        raise ValueError(
            f"batch_size={config.batch_size} in micro_batches={config.micro_batches} leaves {rows} "
            f"sequences at a time, which do not divide over {parts} devices ({names}); choose a "
            f"batch_size that is a multiple of {parts * config.micro_batches}"
        )
    parts, names = over(config.rules.T)
    if parts > 1 and (config.sequence_length or 0) % (2 * parts):
        raise ValueError(
            f"sequence_length={config.sequence_length} does not divide into two chunks for each of "
            f"{parts} devices ({names}); choose a multiple of {2 * parts}"
        )


def param_shardings(
    shapes: Mapping[str, Any], mesh: Mesh, rules: Rules | None = None
) -> dict[str, NamedSharding]:
    """Where each parameter lives, stacked or one leaf a layer."""
    return flat(shardings(param_specs(nested(shapes), mesh, rules), mesh))


def start(run: Plan, checkpoints: Checkpoints | None = None) -> Start:
    """The state that the run goes on from.

    Args:
        run: from `plan`.
        checkpoints: of the run's own folder: if it holds one, the run is resumed. None: the run as
            it begins.

    Raises:
        ValueError: another config was run there, or parameters that do not fit the model.
        CheckpointError: a damaged checkpoint.
    """
    if checkpoints is not None and (step := checkpoints.latest) is not None:
        record = checkpoints.record(step)
        refuse_other_config(record.config, run.config, checkpoints.folder)
        rest = checkpoints.restore_optimizer(step, run.state)
        params = _stack(run, checkpoints.restore_params(step, layer_shapes(run)))
        origin = f"resumed {checkpoints.folder} at step {step}"
        return Start(rest._replace(params=params), record.rng, record.position, origin)
    rng = tuple(jax.random.key_data(jax.random.key(run.config.seed)).tolist())
    if run.config.init_from is not None:
        return _next_stage(run, _source(run, run.config.init_from), rng)
    make = jax.jit(
        lambda: run.skeleton.params(build(run.config, rng)), out_shardings=_sharding(run.state)
    )
    return Start(_fresh(run, make()), rng, None, "random parameters")


def _next_stage(run: Plan, source: Source, rng: tuple[int, ...]) -> Start:
    rng = source.record.rng if source.record else rng
    wanted = layer_shapes(run)
    grafted = _check_fit(run, source, wanted)
    layers = source.read({p: shape for p, shape in wanted.items() if p not in grafted})
    source.close()
    if grafted:
        layers |= _new_indexers(run, rng, wanted)
    return Start(
        _fresh(run, _stack(run, layers)),
        rng,
        source.record.position if source.record else None,
        f"parameters of {source.name}" + (", with new indexers" if grafted else ""),
        _model_changes(run, source),
    )


# --- what another stage left ---------------------------------------------------------------------


def _source(run: Plan, path: Path) -> Source:
    """Finds a run's checkpoint or an exported model at `path`."""
    place = find_step(path)
    if place is not None:
        folder, step = place
        other = Checkpoints(folder, run.config.model)
        return Source(
            str(folder / str(step)),
            other.layer_shapes(step),
            lambda wanted: other.restore_params(step, wanted),
            other.record(step),
            other.close,
        )
    if not path.exists():
        raise FileNotFoundError(
            f"init_from={str(path)!r} does not exist: name a run's folder, one of its "
            "checkpoints, or an exported model"
        )
    model = model_files.load(path, mesh=run.mesh, rules=run.config.rules)
    leaves = flat(split_layers(nested(Skeleton(model).params(model)), model.config))
    return Source(
        str(path),
        {p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for p, leaf in leaves.items()},
        lambda wanted: {p: leaves[p].astype(shape.dtype) for p, shape in wanted.items()},
        None,
    )


def find_step(path: Path) -> tuple[Path, int] | None:
    """The folder of checkpoints and the step that `path` means; None if it is no run.

    Args:
        path: a run's folder, its `checkpoints` folder, or one step of it.
    """
    if path.name.isdigit() and (path / "run").is_dir():
        return path.parent, int(path.name)
    for folder in (path / "checkpoints", path):
        steps = [int(p.parent.name) for p in folder.glob("*/run") if p.parent.name.isdigit()]
        if steps:
            return folder, max(steps)
    return None


def _check_fit(run: Plan, source: Source, wanted: Shapes) -> set[str]:
    """Compares what there is with what the model needs.

    Returns:
        The indexer parameters to graft: none, or all of them.

    Raises:
        ValueError: anything else that differs.
    """
    missing = set(wanted) - set(source.shapes)
    extra = set(source.shapes) - set(wanted)
    indexers = {path for path in wanted if group_of(path) is Group.INDEXER}
    dense = not any(group_of(path) is Group.INDEXER for path in source.shapes)
    grafted = indexers if dense and run.config.stage is Stage.WARMUP else set()
    problems = [f"missing {path}" for path in sorted(missing - grafted)]
    problems += [f"not in the model: {path}" for path in sorted(extra)]
    problems += [
        f"{path} is {list(source.shapes[path].shape)}, the model needs {list(shape.shape)}"
        for path, shape in sorted(wanted.items())
        if path in source.shapes and source.shapes[path].shape != shape.shape
    ]
    if problems:
        hint = ""
        if dense and indexers and not grafted:
            hint = "; it has no indexer: run a warm-up stage on it first, which grafts one"
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"init_from={source.name} does not fit the model: {'; '.join(problems[:6])}{more}{hint}"
        )
    return grafted


def _model_changes(run: Plan, source: Source) -> tuple[str, ...]:
    """Fields of the architecture that differ although all shapes agree (a longer context, a larger
    `index_topk`): wanted sometimes, so told and not refused."""
    if source.record is None:
        return ()
    changed = differences(source.record.config["model"], to_dict(run.config.model))
    return tuple(f"model.{name}: {old} before, {new} now" for name, (old, new) in changed.items())


def _new_indexers(run: Plan, rng: tuple[int, ...], wanted: Shapes) -> Params:
    """Freshly initialised indexers, one leaf a layer; the rest of the model is not computed."""

    def make() -> Params:
        params = run.skeleton.params(build(run.config, rng))
        layers = flat(split_layers(nested(params), run.config.model))
        return {path: leaf for path, leaf in layers.items() if group_of(path) is Group.INDEXER}

    where = {path: s.sharding for path, s in wanted.items() if group_of(path) is Group.INDEXER}
    return jax.jit(make, out_shardings=where)()


# --- one leaf a layer <-> stacked -----------------------------------------------------------------


def layer_shapes(run: Plan) -> Shapes:
    """The run's parameters as they lie on disk: shapes, dtypes, shardings."""
    model = run.config.model
    shapes = flat(jax.eval_shape(lambda p: split_layers(nested(p), model), run.skeleton.shapes))
    where = param_shardings(shapes, run.mesh, run.config.rules)
    return {path: _with(leaf, where[path]) for path, leaf in shapes.items()}


def _stack(run: Plan, layers: Params) -> Params:
    def stack(layers: Params) -> Params:
        like = nested(run.skeleton.shapes)
        return flat(stack_layers(nested(layers), like, run.config.model))

    return jax.jit(stack, out_shardings=_sharding(run.state))(layers)


def _fresh(run: Plan, params: Params) -> TrainState:
    """Given parameters, everything else new."""

    def make(params: Params) -> TrainState:
        return new_state(run.config, params, run.optimizer)._replace(params={})

    where = jax.tree.map(lambda leaf: leaf.sharding, run.state._replace(params={}))
    return jax.jit(make, out_shardings=where)(params)._replace(params=params)


def _sharding(state: TrainState) -> dict[str, Any]:
    return {path: leaf.sharding for path, leaf in state.params.items()}


def _with(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
