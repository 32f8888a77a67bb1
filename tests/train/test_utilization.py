"""Shares of what the devices can do, memory, and the window of the profile."""

import types

import jax
import pytest
from small_runs import config

from train import flops, utilization
from train.config import LogConfig
from train.stages import Stage
from train.utilization import Profiler, Utilization, peak_flops, peak_memory


def device(kind="NVIDIA H100 80GB HBM3", **stats):
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats or None)


def test_peaks_are_the_data_sheets():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("cpu") is None


@pytest.mark.parametrize(("dtype", "known"), [("bfloat16", True), ("float32", False)])
def test_share_of_the_peak(monkeypatch, dtype, known):
    """What a step needs, over devices, seconds and peak; the peak is of bf16."""
    monkeypatch.setattr(jax, "local_devices", lambda: [device()])
    run = config(Stage.SPARSE, compute_dtype=dtype, batch_size=8)
    found = Utilization(run, devices=4).of(2.0)
    needed = 8 * flops.model_flop(run)
    assert found["tflops_per_device"] == pytest.approx(needed / 4 / 2.0 / 1e12)
    assert ("mfu" in found) == known
    if known:
        assert found["mfu"] == pytest.approx(needed / (4 * 2.0 * 989.4e12))


def test_the_count_follows_the_selection():
    run = config(Stage.SPARSE, sequence_length=64)
    fewer = config(Stage.SPARSE, sequence_length=64, model=run.model.replace(index_topk=4))
    assert flops.model_flop(fewer) < flops.model_flop(run)


def test_peak_memory_is_of_the_fullest_device(monkeypatch):
    devices = [device(peak_bytes_in_use=5), device(peak_bytes_in_use=9), device()]
    monkeypatch.setattr(utilization.jax, "local_devices", lambda: devices)
    assert peak_memory() == {"peak_memory_bytes": 9}
    monkeypatch.setattr(utilization.jax, "local_devices", lambda: [device("cpu")])
    assert peak_memory() == {}


@pytest.fixture
def traced(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder.name))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (range(1, 6), {3: ["profile"], 4: ["stop"]}),
        (range(4, 6), {4: ["profile", "stop"]}),  # a resume within the window
        (range(5, 8), {}),  # and one after it
        (range(1, 4), {3: ["profile"], "end": ["stop"]}),  # a run that ends within it
    ],
)
def test_profile_window(traced, tmp_path, steps, wanted):
    profiler = Profiler(LogConfig(profile_start=3, profile_steps=2), tmp_path)
    seen = {}
    for step in steps:
        profiler.before(step)
        profiler.after(step, jax.numpy.zeros(1))
        if traced:
            seen[step] = traced.copy()
            traced.clear()
    profiler.close()
    if traced:
        seen["end"] = traced.copy()
    assert seen == wanted


def test_no_profile_by_default(traced, tmp_path):
    profiler = Profiler(LogConfig(), tmp_path)
    for step in range(5):
        profiler.before(step)
        profiler.after(step, None)
    profiler.close()
    assert not traced
