"""A run on disk: each step one Orbax folder with everything needed to go on from it.

    <folder>/<step>/params      parameters, one leaf a layer: also what the next stage starts from
    <folder>/<step>/optimizer   optimizer state and step
    <folder>/<step>/run         JSON: config, data position, key

Saves overlap training. A step's folder appears under its name only when it is whole, and an older
one is deleted only after that, so a kill or a full disk at any moment leaves the last checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from dsa_jax.checkpoint import CheckpointError
from dsa_jax.config import ModelConfig
from dsa_jax.layer_tree import split_layers
from train.config import TrainConfig, differences, to_dict
from train.data import DataPosition
from train.state import Params, TrainState, flat, nested

_FORMAT = 1


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message says which one is still good."""


@dataclass(frozen=True)
class RunRecord:
    """The part of a checkpoint that is not arrays.

    Attributes:
        config: `to_dict` of the resolved config.
        position: of the data, after this step.
        rng: raw key of the run.
    """

    config: Mapping[str, Any]
    position: DataPosition
    rng: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunRecord:
        """From JSON.

        Raises:
            CheckpointError: written by another version of this package.
        """
        if data.get("format") != _FORMAT:
            raise CheckpointError(
                f"checkpoint format {data.get('format')!r} is not {_FORMAT}: use the version of "
                "dsa-jax that wrote it"
            )
        return cls(data["config"], DataPosition(**data["position"]), tuple(data["rng"]))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: made if absent.
        model: the architecture: it decides which row of a stacked parameter is which layer.
        keep: newest ones kept; None only reads and touches nothing, for the folder may belong to a
            run that is alive.
        timeout: seconds that a process waits for the others' parts of a checkpoint.
        before_save: called before a step is written; what it raises stops the save.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        keep: int | None = None,
        *,
        timeout: int = 1200,
        before_save: Callable[[], None] = lambda: None,
    ):
        self.folder = folder.absolute()
        self._before_save = before_save
        self._has_failed = False
        self._to_layers = jax.jit(lambda params: split_layers(nested(params), model))
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ("params", "optimizer"):
            registry.add(item, ocp.args.StandardSave)
            registry.add(item, ocp.args.StandardRestore)
        registry.add("run", ocp.args.JsonSave)
        registry.add("run", ocp.args.JsonRestore)
        options = (
            ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0)
            if keep is None
            else ocp.CheckpointManagerOptions(
                preservation_policy=LatestN(keep),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=timeout),
            )
        )
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, handler_registry=registry
        )

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, record: RunRecord) -> None:
        """Starts saving a step; returns when the arrays are copied, before they are on disk.

        Raises:
            SaveError: this save cannot begin, or the one before it failed.
        """
        self.wait()  # Orbax would too; first, for what the one before takes is not free
        self._before_save()
        self._check_space(step, state)
        arguments = ocp.args.Composite(
            params=ocp.args.StandardSave(self._to_layers(state.params)),  # pyright: ignore
            optimizer=ocp.args.StandardSave(nested(optimizer_leaves(state))),  # pyright: ignore
            run=ocp.args.JsonSave(record.to_json()),  # pyright: ignore
        )
        try:
            self.manager.save(step, args=arguments, force=True)
        except Exception as error:
            raise self._failed(f"step {step} could not be saved", error) from error

    def check(self) -> None:
        """Reports a save that failed in the background since.

        Raises:
            SaveError: it did.
        """
        try:
            self.manager.check_for_errors()
        except Exception as error:
            raise self._failed("saving failed in the background", error) from error

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            SaveError: it could not be written.
        """
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._failed("saving failed", error) from error

    def close(self) -> None:
        """Frees the manager's threads; call `wait` before."""
        try:
            self.manager.close()
        except Exception:
            if not self._has_failed:  # else it repeats what a SaveError has said
                raise

    def record(self, step: int) -> RunRecord:
        """The JSON part of a step."""
        restored = self._restore(step, run=ocp.args.JsonRestore())  # pyright: ignore
        return RunRecord.from_json(restored["run"])

    def layer_shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters a step holds, by path on disk, one leaf a layer."""
        try:
            found = flat(self.manager.metadata(step).item_metadata["params"])  # pyright: ignore
        except Exception as error:
            raise self._unreadable(step, error) from error
        return {path: jax.ShapeDtypeStruct(m.shape, m.dtype) for path, m in found.items()}

    def restore_params(self, step: int, like: dict[str, jax.ShapeDtypeStruct]) -> Params:
        """Parameters as they lie on disk, one leaf a layer.

        Args:
            step: which.
            like: by path on disk, with shardings.
        """
        item = ocp.args.StandardRestore(nested(like))  # pyright: ignore[reportCallIssue]
        return flat(self._restore(step, params=item)["params"])

    def restore_optimizer(self, step: int, like: TrainState) -> TrainState:
        """Everything but the parameters, bit for bit; those of the result are empty.

        Args:
            step: which.
            like: shapes, dtypes and shardings.
        """
        leaves = optimizer_leaves(like)
        item = ocp.args.StandardRestore(nested(leaves))  # pyright: ignore[reportCallIssue]
        found = flat(self._restore(step, optimizer=item)["optimizer"])
        structure = jax.tree.structure(like._replace(params={}))
        return jax.tree.unflatten(structure, [found[path] for path in leaves])

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        others = [s for s in self.manager.all_steps() if s != step]
        way_out = (
            f"remove {self.folder / str(step)} to go on from step {max(others)}"
            if others
            else "there is no other checkpoint"
        )
        return CheckpointError(
            f"{self.folder / str(step)} cannot be read, it is damaged or incomplete "
            f"({_cause(error)}): {way_out}"
        )

    def _check_space(self, step: int, state: TrainState) -> None:
        """Refuses to fill the disk: half a checkpoint helps nobody.

        One process looks, for the disk is one; if it ends, so do the others.
        """
        if jax.process_index() > 0:
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._failed(
                f"step {step} needs {needed / 1e6:.1f} MB, the disk of {self.folder} has "
                f"{free / 1e6:.1f} MB free",
                None,
            )

    def _failed(self, what: str, error: Exception | None) -> SaveError:
        self._has_failed = True
        if jax.process_index() == 0:  # room for others; what is missed goes at the next start
            for draft in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(draft, ignore_errors=True)
        because = f" ({_cause(error)})" if error else ""
        # From the disk: the manager counts a step as soon as its save begins.
        whole = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]
        last = f"step {max(whole)} is whole" if whole else "none is whole yet"
        return SaveError(
            f"checkpoint: {what}{because}. {last} in {self.folder}: make room, or move the folder "
            "to another disk, then run the same command to go on from it"
        )


def refuse_other_config(saved: Mapping[str, Any], config: TrainConfig, folder: Path) -> None:
    """Refuses to resume a run under a config that would compute something else.

    Raises:
        ValueError: names every field with its saved and its new value.
    """
    changed = differences(saved, to_dict(config))
    if changed:
        lines = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise ValueError(
            f"{folder} holds a run with another config:\n{lines}\n"
            "Restore these fields to resume it, choose another output, or start a new stage from "
            f"it with init_from={str(folder)!r} and another output"
        )


def optimizer_leaves(state: TrainState) -> dict[str, Any]:
    """All of the state but the parameters, by path."""
    found, _ = jax.tree.flatten_with_path(state._replace(params={}))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in found}


def _cause(error: Exception) -> str:
    """The end of an error's text: TensorStore puts the path first and the reason last."""
    text = " ".join(str(error).split()) or type(error).__name__
    return ": ".join(text.split(": ")[-2:])[-300:]
