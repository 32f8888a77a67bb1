"""The compiler's options of a step on several GPUs."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from train.overlap import OPTIONS, compiler_options


def mesh(count, platform) -> Any:
    devices = np.array([SimpleNamespace(platform=platform)] * count)
    return SimpleNamespace(size=count, devices=devices)


def test_only_where_gpus_talk_and_flags_come_first():
    assert compiler_options(mesh(2, "gpu"), {}) == OPTIONS
    assert compiler_options(mesh(1, "gpu"), {}) is None
    assert compiler_options(mesh(8, "cpu"), {}) is None
    name = next(iter(OPTIONS))
    given = {"XLA_FLAGS": f"--xla_dump_to=/tmp/x --{name}=false"}
    assert name not in (compiler_options(mesh(2, "gpu"), given) or {})
