"""What the compiler is told so that collectives run beside computation.

docs/sharding.md says what each option brought where it was measured: beside the scheduler, no other
brought more than the steps of one run differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from jax.sharding import Mesh

OPTIONS: Mapping[str, bool] = {
    # Starts a collective as early and waits for it as late as data and memory allow.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}


def compiler_options(mesh: Mesh, environ: Mapping[str, str] = os.environ) -> dict[str, bool] | None:
    """Options for `jax.jit` of a step on several GPUs; what `XLA_FLAGS` names is left to it.

    Args:
        mesh: of the step.
        environ: where `XLA_FLAGS` is.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return None
    given = environ.get("XLA_FLAGS", "")
    return {name: value for name, value in OPTIONS.items() if f"--{name}=" not in given} or None
