"""What a checkpoint of any format holds, and whether that is what its config asks for."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from convert.formats import open_checkpoint
from convert.rules import entries, hf_scale
from convert.source import has_mtp
from convert.weights import E4M3
from dsa_jax.config import ModelConfig


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        kind: "hf", "demo" or "orbax".
        config: the model's.
        tensors: how many there are, under Hugging Face's names.
        parameters: numbers in them, block scales aside.
        scales: block scales.
        nbytes: bytes by dtype.
        missing: names that the config asks for.
        unexpected: names that it does not know.
        misshapen: names with another shape than it asks for.
    """

    kind: str
    config: ModelConfig
    tensors: int
    parameters: int
    scales: int
    nbytes: dict[str, int]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def ok(self) -> bool:
        """Whether the checkpoint fits its config."""
        return not (self.missing or self.unexpected or self.misshapen)


def inspect(folder: str | Path) -> Inspection:
    """Looks at headers only.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: none that this package reads, or damaged files.
    """
    kind, source = open_checkpoint(folder)
    config = source.config
    if not has_mtp(source):
        config = config.replace(num_nextn_predict_layers=0)
    wanted: dict[str, tuple[int, ...]] = {}
    scales = set()
    for entry in entries(config):
        for name in entry.names:
            wanted[name] = entry.their_shape
            if name in source.tensors and source.tensors[name].dtype == E4M3 and config.fp8_weights:
                scales.add(hf_scale(name))
                wanted[hf_scale(name)] = entry.their_scale_shape(config.fp8_weights)
    nbytes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        nbytes[tensor.dtype.name] += tensor.nbytes
    found = source.tensors.keys()
    sizes = {name: math.prod(tensor.shape) for name, tensor in source.tensors.items()}
    in_scales = sum(size for name, size in sizes.items() if name in scales)
    return Inspection(
        kind=kind,
        config=config,
        tensors=len(sizes),
        parameters=sum(sizes.values()) - in_scales,
        scales=in_scales,
        nbytes=dict(nbytes),
        missing=sorted(wanted.keys() - found),
        unexpected=sorted(found - wanted.keys()),
        misshapen=sorted(n for n in found & wanted.keys() if source.tensors[n].shape != wanted[n]),
    )


def show(found: Inspection, console: Console) -> None:
    """Prints an inspection."""
    table = Table(show_header=False, box=None)
    c = found.config
    table.add_row("format", found.kind)
    layers = f"{c.num_hidden_layers} layers ({len(c.moe_layers)} with experts)"
    layers += f" + {c.num_nextn_predict_layers} extra" if c.num_nextn_predict_layers else ""
    table.add_row("model", f"{c.model_type}, {layers}, {len(c.indexer_layers)} indexers")
    table.add_row("widths", f"D={c.hidden_size} C={c.kv_lora_rank} N={c.num_attention_heads}")
    if c.moe_layers:
        experts = f"E={c.n_routed_experts} F={c.moe_intermediate_size} k={c.num_experts_per_tok}"
        table.add_row("experts", experts)
    table.add_row("tensors", f"{found.tensors:,}")
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("block scales", f"{found.scales:,}")
    for dtype, size in sorted(found.nbytes.items()):
        table.add_row(dtype, f"{size / 1e9:,.3f} GB")
    for title in ("missing", "unexpected", "misshapen"):
        names = getattr(found, title)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        table.add_row(title, ", ".join(names[:5]) + more if names else "none")
    console.print(table, highlight=False)
