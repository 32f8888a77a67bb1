"""How long a step takes, and what bounds it: operations, memory and links, each over its rate.

    device  = sum over parts of operations / rate + other bytes / memory bandwidth
    network = sum over collectives of bytes / link
    step    = max(device + (1 - overlap) network, network)

Products and kernels run at measured rates, which contain their own memory traffic; memory
bandwidth is charged with the rest: norms, casts, copies, the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from train.config import TrainConfig
from train.flops import model_flop, step_work
from train.plan.collectives import Traffic
from train.plan.hardware import Gpu, Rates

_DAY = 86400.0


class Estimate(NamedTuple):
    """Seconds of a step, and what follows from them.

    Attributes:
        compute: in products and kernels.
        memory: in everything else on the device.
        network: in collectives.
        step: all together.
        bound: the largest of the three: `compute`, `HBM` or `network`.
        tokens_per_second: of all devices.
        mfu: operations that the model needs, recomputation left out, over the time and the data
            sheet's peak.
        days: of the stage.
        gpu_hours: of the stage.
    """

    compute: float
    memory: float
    network: float
    step: float
    bound: str
    tokens_per_second: float
    mfu: float
    days: float
    gpu_hours: float


def estimate(
    config: TrainConfig,
    gpu: Gpu,
    rates: Rates,
    traffic: Sequence[Traffic],
    other_bytes: float,
    repeated: float = 1.0,
) -> Estimate:
    """Estimates a step.

    Args:
        config: resolved, its mesh written out.
        gpu: for its peak and memory bandwidth.
        rates: what is reached of them.
        traffic: collectives of a step.
        other_bytes: that a device moves in a step outside products and kernels.
        repeated: how many times over the devices together multiply with the weights.
    """
    assert config.batch_size is not None
    assert config.sequence_length is not None
    devices = math.prod(config.mesh.sizes)
    sequences = config.batch_size / devices
    compute = sum(
        sequences * part.total * (repeated if part.kind == "matmul" else 1.0)
        / (getattr(rates, part.kind) * 1e12)
        for part in step_work(config)
    )  # fmt: skip
    memory = other_bytes / (gpu.hbm_gbps * 1e9 * rates.hbm_share)
    network = sum(seconds(one, rates) for one in traffic)
    step = max(compute + memory + (1 - rates.overlap) * network, network)
    parts = {"compute": compute, "HBM": memory, "network": network}
    total = step * (config.steps or 0)
    return Estimate(
        compute=compute,
        memory=memory,
        network=network,
        step=step,
        bound=max(parts, key=lambda name: parts[name]),
        tokens_per_second=config.batch_size * config.sequence_length / step,
        mfu=config.batch_size * model_flop(config) / (step * devices * gpu.peak_tflops * 1e12),
        days=total / _DAY,
        gpu_hours=total * devices / 3600,
    )


def seconds(traffic: Traffic, rates: Rates) -> float:
    """Time of a collective, between links that all run at once.

    A ring enters and leaves a host once, over the adapters of all its members there. An all-to-all
    sends each device's share for other hosts over that device's own adapter.
    """
    n, here = traffic.group, traffic.per_host
    gb = traffic.bytes_sent / 1e9
    if here >= n:
        return gb / rates.nvlink
    if "all-to-all" in traffic.op:
        away = gb * (n - here) / (n - 1)
        return max(away / rates.network, (gb - away) / rates.nvlink)
    inside = gb / rates.nvlink if here > 1 else 0.0
    return max(inside, gb / (here * rates.network))


def other_bytes(config: TrainConfig, state_bytes: int, gradient_bytes: int, tokens: int) -> float:
    """Bytes that a device moves outside products, by arithmetic.

    The optimizer reads and writes the state and reads gradients; each micro-batch adds its
    gradients to the sum; a layer's norms, casts, rotations and copies of tokens for their experts
    come to some sixty widths of the model a token and pass.

    Args:
        config: of the run.
        state_bytes: parameters and optimizer of a device.
        gradient_bytes: of a device.
        tokens: of a device, at one time.
    """
    c = config.model
    passes = 4 if config.stage.lm_loss else 1
    activations = 60 * 2 * c.hidden_size * tokens * c.num_hidden_layers * passes
    trained = 2 * state_bytes + gradient_bytes if config.stage.lm_loss else gradient_bytes
    return trained + config.micro_batches * (3 * gradient_bytes + activations)
