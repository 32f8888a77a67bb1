"""Random-weight checkpoints written by transformers, small and with every width different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from convert.compare import torch_modules
from dsa_jax.config import ModelConfig
from tests.oracle.named_weights import configs, weight


def build(config: ModelConfig, update: float = 1.0) -> Any:
    """A transformers model with the weights of `tests.oracle.named_weights`."""
    torch, transformers = torch_modules()
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager")
    tensors = dict(model.named_parameters())
    tensors |= {k: v for k, v in model.named_buffers() if "e_score_correction_bias" in k}
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.as_tensor(_value(name, tuple(tensor.shape), update)))
    return model.eval()


def _value(name: str, shape: tuple[int, ...], update: float) -> np.ndarray:
    """The checkpoint has one tensor an expert; in memory they are stacked, gate and up in one."""
    if ".experts." not in name:
        return weight(name, shape, update)
    prefix, last = name.rsplit(".", 1)
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    rows = (shape[1] // len(parts), shape[2])
    return np.stack(
        [
            np.concatenate([weight(f"{prefix}.{e}.{part}.weight", rows, update) for part in parts])
            for e in range(shape[0])
        ]
    )


def save(name: str, folder: Path, dtype: str = "fp32", update: float = 1.0) -> Path:
    """Writes the checkpoint of a name, as `save_pretrained` does."""
    torch, _ = torch_modules()
    model = build(configs()[name], update)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder
