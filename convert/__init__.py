"""Checkpoints of other projects, to and from ours."""

from convert.add_indexer import add_indexer
from convert.huggingface import hf_to_orbax, orbax_to_hf
from convert.inference_demo import demo_to_orbax, orbax_to_demo
from convert.inspection import Inspection, inspect
from convert.safetensors import ConvertError

__all__ = [
    "ConvertError",
    "Inspection",
    "add_indexer",
    "demo_to_orbax",
    "hf_to_orbax",
    "inspect",
    "orbax_to_demo",
    "orbax_to_hf",
]
