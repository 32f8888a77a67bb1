"""Checkpoints of other projects, to and from ours."""

from convert.huggingface import hf_to_orbax, orbax_to_hf
from convert.safetensors import ConvertError

__all__ = ["ConvertError", "hf_to_orbax", "orbax_to_hf"]
