"""The layout of DeepSeek's inference demo: `model{i}-mp{n}.safetensors`, a file for each GPU.

File i holds every n-th part of the attention heads, MLP widths and vocabulary, a run of whole
experts, and all of what is not split: norms, router, indexer. There are no extra layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from convert.folder_writer import FolderWriter
from convert.huggingface import write_tensors
from convert.ours import OurFolder, companions, to_ours
from convert.rules import Entry, demo_scale, entries, hf_scale
from convert.safetensors import ConvertError, SafetensorsFile, SafetensorsWriter
from convert.source import DType, Plan, Tensor, plan
from dsa_jax.config import ModelConfig
from dsa_jax.folder import refuse_existing, write_json
from dsa_jax.hf_config import load_json

_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
# The demo's own names of what its config file says.
_CONFIG = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
}
DEMO_CONFIG = "inference_config.json"


def demo_to_orbax(
    source: str | Path,
    destination: str | Path,
    *,
    config: str | Path | None = None,
    dtype: DType = "keep",
) -> ModelConfig:
    """Converts a checkpoint of the inference demo into one of this package.

    Args:
        source: the folder with `model{i}-mp{n}.safetensors`, for any n.
        destination: the folder to make; refused if anything is there.
        config: a Hugging Face `config.json`. None: the one in `source`.
        dtype: of the weights; "keep" copies their bits, FP8 with its block scales.

    Returns:
        The config of what was written.

    Raises:
        FileNotFoundError: a file of the source is missing.
        FileExistsError: something at `destination`.
        ConvertError: a source that contradicts its config or itself. Nothing is at `destination`
            then.
    """
    refuse_existing(destination)
    return to_ours(DemoFolder(source, config), destination, dtype=dtype)


def orbax_to_demo(
    source: str | Path, destination: str | Path, *, parallel: int = 1, dtype: DType = "keep"
) -> ModelConfig:
    """Converts a checkpoint of this package for the inference demo on `parallel` GPUs.

    Beside the weights it writes `config.json`, as Hugging Face's, and `inference_config.json`, the
    demo's own.

    Args:
        source: a folder written by `dsa_jax.save` or by a converter.
        destination: the folder to make; refused if anything is there.
        parallel: the number of files; it must divide heads, experts, widths and their FP8 tiles.
        dtype: of the weights; "keep" copies their bits, FP8 with its block scales.

    Returns:
        The config of what was written.

    Raises:
        FileNotFoundError: nothing at `source`.
        FileExistsError: something at `destination`.
        ConvertError: `parallel` does not divide the model.
    """
    refuse_existing(destination)
    folder = OurFolder(source)
    todo = plan(folder, dtype, mtp=False)
    with DemoWriter(destination, todo, parallel) as writer:
        writer.copy(folder.companions)
        write_tensors(folder, todo, writer)
    return todo.config


class _Place(NamedTuple):
    """Where a tensor is: a name in each of some files, and along which axis they are joined."""

    name: str
    files: tuple[int, ...]
    axis: int | None

    def piece(self, tensor: Tensor) -> Tensor:
        """What each file holds of a tensor."""
        if self.axis is None:
            return tensor
        shape = list(tensor.shape)
        shape[self.axis] //= len(self.files)
        return Tensor(tensor.dtype, tuple(shape))


def _places(entry: Entry, count: int) -> Iterator[tuple[str, _Place]]:
    """The place of each tensor of an entry, and of its scales, by Hugging Face's names."""
    for expert, (hf, demo) in enumerate(zip(entry.names, entry.demo, strict=True)):
        files = tuple(range(count))
        if entry.stacked:
            files = (expert * count // len(entry.names),)
        axis = entry.split if count > 1 and not entry.stacked else None
        yield hf, _Place(demo, files, axis)
        if entry.kind == "matrix":
            yield hf_scale(hf), _Place(demo_scale(demo), files, axis)


class DemoFolder:
    """A checkpoint of the inference demo, under Hugging Face's names.

    Args:
        folder: with `model{i}-mp{n}.safetensors`.
        config: where its config is; None: `config.json` in the folder, or the demo's own form of it
            under the same name or as `inference_config.json`.

    Raises:
        FileNotFoundError: a file is missing.
        ConvertError: files that contradict each other or themselves.
    """

    def __init__(self, folder: str | Path, config: str | Path | None = None):
        self.folder = Path(folder)
        paths = _files(self.folder)
        self._files = [SafetensorsFile(path) for path in paths]
        self.config = _read_config(self.folder, config).replace(num_nextn_predict_layers=0)
        self.companions = companions(self.folder)
        self._places: dict[str, _Place] = {}
        tensors: dict[str, Tensor] = {}
        left = [dict(file.tensors) for file in self._files]
        for entry in entries(self.config):
            for name, place in _places(entry, len(paths)):
                found = [left[i].pop(place.name, None) for i in place.files]
                if not any(found):
                    continue
                tensors[name] = self._join(place, found)
                self._places[name] = place
        for path, names in zip(paths, left, strict=True):
            if names:
                raise ConvertError(f"{path}: tensor {min(names)} is not one its config knows here")
        self.tensors: Mapping[str, Tensor] = tensors

    def __str__(self) -> str:
        return str(self.folder)

    def _join(self, place: _Place, found: list[Any]) -> Tensor:
        first = next(info for info in found if info is not None)
        for i, info in zip(place.files, found, strict=True):
            if info is None:
                raise ConvertError(
                    f"{self._files[i].path} lacks tensor {place.name}, others do not"
                )
            if info[:2] != first[:2]:
                raise ConvertError(
                    f"{self._files[i].path}: tensor {place.name} is {info.dtype}"
                    f"{list(info.shape)}, in another file it is {first.dtype}{list(first.shape)}"
                )
        shape = list(first.shape)
        if place.axis is not None and place.axis < len(shape):
            shape[place.axis] *= len(place.files)
        return Tensor(first.dtype, tuple(shape))

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        place = self._places[name]
        return f"{self._files[place.files[0]].path}: tensor {place.name}"

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of a tensor; what was returned before may no longer be used."""
        place = self._places[name]
        if place.axis is None:
            return self._files[place.files[0]].read(place.name, rows)
        if place.axis == 1:
            parts = [self._files[i].read(place.name, rows) for i in place.files]
            return np.concatenate(parts, axis=1)
        start, stop, _ = rows.indices(self.tensors[name].shape[0])
        height = self.tensors[name].shape[0] // len(place.files)
        parts = []
        for i in range(start // height, -(-stop // height)):
            mine = slice(max(start - i * height, 0), min(stop - i * height, height))
            parts.append(self._files[place.files[i]].read(place.name, mine))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _files(folder: Path) -> list[Path]:
    """All files of a checkpoint, in order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}: it is not a folder")
    found = {
        (int(m[2]), int(m[1])): path
        for path in folder.iterdir()
        if (m := _FILE.fullmatch(path.name))
    }
    counts = {count for count, _ in found}
    if len(counts) != 1:
        kinds = ", ".join(f"mp{count}" for count in sorted(counts)) or "no model{i}-mp{n} files"
        raise ConvertError(f"{folder} holds {kinds}; a checkpoint is n files of one n")
    (count,) = counts
    for i in range(count):
        if (count, i) not in found:
            raise FileNotFoundError(f"{folder}/model{i}-mp{count}.safetensors is missing")
    if len(found) > count:
        raise ConvertError(f"{folder} holds model{max(found)[1]}-mp{count}.safetensors: too many")
    return [found[count, i] for i in range(count)]


def _read_config(folder: Path, config: str | Path | None) -> ModelConfig:
    if config is None:
        names = ("config.json", DEMO_CONFIG)
        config = next((folder / n for n in names if (folder / n).is_file()), None)
    if config is None:
        raise ConvertError(
            f"{folder} has no config.json; name the model's with --config (Hugging Face's, or the "
            "demo's own)"
        )
    values = load_json(config)
    return ModelConfig.from_hf(_from_demo(values) if "dim" in values else values)


def _from_demo(demo: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's config as a Hugging Face one; what it leaves out has the demo's defaults."""
    hf: dict[str, Any] = {ours: demo[name] for name, ours in _CONFIG.items() if name in demo}
    original = demo.get("original_seq_len", 4096)
    factor = demo.get("rope_factor", 40)
    hf |= {
        "model_type": "deepseek_v32" if "index_topk" in demo else "deepseek_v3",
        "rope_theta": demo.get("rope_theta", 10000.0),
        "max_position_embeddings": int(original * factor),
        "rope_scaling": {
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": demo.get("beta_fast", 32),
            "beta_slow": demo.get("beta_slow", 1),
            "mscale": demo.get("mscale", 1.0),
            "mscale_all_dim": demo.get("mscale", 1.0),
        },
    }
    if demo.get("dtype") == "fp8":
        hf["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "scale_fmt": demo.get("scale_fmt"),
        }
    return hf


def to_demo_config(config: ModelConfig) -> dict[str, Any]:
    """The demo's own config file."""
    demo: dict[str, Any] = {
        name: value
        for name, ours in _CONFIG.items()
        if (value := getattr(config, ours)) is not None
    }
    demo |= {"score_func": "sigmoid", "dtype": "bf16", "rope_theta": config.rope_theta}
    if (fp8 := config.fp8_weights) is not None:
        demo |= {"dtype": "fp8"} | ({"scale_fmt": "ue8m0"} if fp8.scale_format == "ue8m0" else {})
    if (yarn := config.rope_scaling) is not None:
        demo |= {
            "original_seq_len": yarn.original_max_position_embeddings,
            "rope_factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale_all_dim,
        }
    return demo


class DemoWriter(FolderWriter):
    """Writes the demo's files; they appear only when the block ends well.

    Of a run of several processes each writes every so-many-th file.

    Args:
        path: the folder to make.
        todo: what will be written.
        count: the number of files.

    Raises:
        ConvertError: `count` does not divide the model.
    """

    def __init__(self, path: str | Path, todo: Plan, count: int):
        _check_divides(todo, count)
        super().__init__(path, todo.config)
        self._places = {
            name: place for leaf in todo.leaves for name, place in _places(leaf.entry, count)
        }
        self._contents: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for leaf in todo.leaves:
            for name, tensor in todo.tensors(leaf).items():
                place = self._places[name]
                for i in place.files:
                    self._contents[i][place.name] = place.piece(tensor)
        self._mine = range(jax.process_index(), count, jax.process_count())

    def __enter__(self) -> Self:
        super().__enter__()
        for i in self._mine:
            path = self._new.folder / f"model{i}-mp{len(self._contents)}.safetensors"
            self._files[i] = SafetensorsWriter(path, self._contents[i])
        return self

    def takes(self, name: str) -> bool:
        """Whether any of a tensor is this process's to write."""
        return any(i in self._mine for i in self._places[name].files)

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows `start`, ... of a tensor."""
        place = self._places[name]
        for number, i in enumerate(place.files):
            if i not in self._files:
                continue
            if place.axis is None:
                self._files[i].write(place.name, start, rows)
            elif place.axis == 1:
                width = self._contents[i][place.name].shape[1]
                part = rows[:, number * width : (number + 1) * width]
                self._files[i].write(place.name, start, part)
            else:
                height = self._contents[i][place.name].shape[0]
                low = max(start, number * height)
                high = min(start + len(rows), (number + 1) * height)
                if low < high:
                    part = rows[low - start : high - start]
                    self._files[i].write(place.name, low - number * height, part)

    def _write_rest(self) -> None:
        write_json(self._new.folder / "config.json", self._config.to_hf())
        write_json(self._new.folder / DEMO_CONFIG, to_demo_config(self._config))


def _check_divides(todo: Plan, count: int) -> None:
    """Whether the demo's files can be made: whole heads, whole experts, whole FP8 tiles."""
    if count < 1:
        raise ConvertError(f"parallel={count} must be at least 1")
    for name in ("num_attention_heads", "n_routed_experts"):
        if (number := getattr(todo.config, name)) % count:
            raise ConvertError(f"parallel={count} does not divide {name}={number}")
    for leaf in todo.leaves:
        entry = leaf.entry
        if entry.split is None or entry.stacked:
            continue
        size = entry.their_shape[entry.split]
        unit = 1
        if leaf.scales_out and count > 1:
            assert todo.fp8 is not None
            unit = todo.fp8.weight_block_size[entry.split]
        if size % (count * unit):
            raise ConvertError(
                f"parallel={count} does not divide axis {entry.split} of {entry.demo[0]} "
                f"{list(entry.their_shape)}" + (f" in whole tiles of {unit}" if unit > 1 else "")
            )
