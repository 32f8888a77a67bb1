"""Plans by arithmetic: counts of the published model, decisions, the search, errors, JSON."""

import dataclasses
import json
import re

import pytest

from dsa_jax import presets
from dsa_jax.sharding import MeshConfig
from train.__main__ import main
from train.plan import PlanOptions, counted, hlo, make, search, to_json
from train.plan import report as report_module
from train.plan.collectives import Traffic
from train.plan.compiled import Compiled
from train.plan.estimate import seconds
from train.plan.hardware import GPUS, Rates
from train.plan.options import architecture, train_config
from train.plan.show import flags, verdict
from train.stages import Stage

GB = 1e9
FLAGSHIP = PlanOptions(devices=256, mesh=MeshConfig(expert=16, context=16), compile="none")
TINY = PlanOptions(preset="tiny", devices=8, sequence_length=64, batch_size=16, compile="none")


def state(options):
    options = options.resolved()
    config = train_config(options, architecture(options.preset), options.mesh)
    return counted.state(config, counted.shapes_of(config))


def test_the_published_model_on_256_devices():
    """671 B parameters and 851 M in indexers; with fp32 masters, a bf16 and an fp32 moment and fp32
    gradients 14 bytes a parameter, cut over all devices."""
    found = state(FLAGSHIP)
    assert found.parameters == pytest.approx(671e9, rel=2e-3)
    assert found.indexer == pytest.approx(851e6, rel=1e-3)
    a_device = found.parameters / 256
    assert found.parameter_bytes == pytest.approx(4 * a_device, rel=1e-3)
    assert found.optimizer_bytes == pytest.approx(6 * a_device, rel=1e-3)
    assert found.gradient_bytes == pytest.approx(4 * a_device, rel=1e-3)
    fp32 = state(dataclasses.replace(FLAGSHIP, moment_dtype="float32"))
    assert fp32.optimizer_bytes == pytest.approx(8 * a_device, rel=1e-3)


def test_warm_up_has_moments_for_the_indexers_only():
    found = state(dataclasses.replace(FLAGSHIP, stage=Stage.WARMUP))
    assert found.trainable == found.indexer
    assert found.optimizer_bytes < 0.03 * GB


def test_copies_of_the_model_are_whole():
    """The axis `data` cuts nothing."""
    one = state(dataclasses.replace(TINY, mesh=MeshConfig(context=4), devices=4))
    two = state(dataclasses.replace(TINY, mesh=MeshConfig(data=2, context=4)))
    assert one.parameter_bytes == two.parameter_bytes


def test_a_device_has_its_share_of_the_tokens():
    options = FLAGSHIP.resolved()
    config = train_config(options, architecture(options.preset), options.mesh)
    assert config.micro_batches == 30  # 480 sequences, 16 at a time
    assert counted.tokens_at_once(config) == 8192
    kept = counted.temporaries(config, state(FLAGSHIP))["layers' inputs"]
    assert kept == 61 * 8192 * 7168 * 4


def test_rows_to_experts_are_padded(monkeypatch):
    """Of 8192 x 8 copies 256 are for each of 256 devices if routing is even, and 512 are sent."""
    options = FLAGSHIP.resolved()
    config = train_config(options, architecture(options.preset), options.mesh)

    def bytes_sent():
        [one] = [one for one in counted.traffic(config) if one.op == "all-to-all"]
        return one.bytes_sent

    trips = 5 * 58 * 30  # two forward, three backward; layers with experts; micro-batches
    assert bytes_sent() == trips * 255 * 512 * 7168 * 2
    monkeypatch.setattr(counted, "RAGGED", True)
    assert bytes_sent() == trips * 255 * 256 * 7168 * 2


def test_gradients_are_there_twice_while_a_batch_is_summed_up():
    options = FLAGSHIP.resolved()
    config = train_config(options, architecture(options.preset), options.mesh)
    held = state(FLAGSHIP)
    # The embedding's is made last: 129,280 words of 7168, cut over all devices.
    once = held.gradient_bytes - 129_280 * 7168 * 4 / 256
    assert counted.temporaries(config, held)["gradients"] == held.gradient_bytes + once
    whole = dataclasses.replace(config, batch_size=16, micro_batches=1)
    assert counted.temporaries(whole, held)["gradients"] == once


def test_does_it_fit():
    small = make(TINY)
    assert small.fits
    assert small.bytes < small.limit
    alone = make(dataclasses.replace(FLAGSHIP, devices=1, mesh=MeshConfig(), batch_size=1))
    assert not alone.fits
    assert alone.bytes > 6.7e12  # 10 bytes a parameter before a gradient
    roomy = dataclasses.replace(FLAGSHIP, mesh=MeshConfig(expert=8, context=32))
    tight = dataclasses.replace(roomy, memory_share=0.5)
    assert make(roomy).fits
    assert not make(tight).fits


def test_search_picks_a_mesh_that_fits_and_is_fast():
    options = dataclasses.replace(FLAGSHIP, mesh=MeshConfig(), search=True)
    report = make(options)
    assert report.fits
    assert report.config.mesh == report.candidates[0].config.mesh
    assert any(not one.fits for one in report.candidates), "256 H100s do not take any mesh"
    fitting = [one for one in report.candidates if one.fits]
    assert min(one.estimate.step for one in fitting) == pytest.approx(
        report.candidates[0].estimate.step, abs=0.01
    )
    assert report.candidates == sorted(report.candidates, key=lambda one: not one.fits)


PUBLISHED = [
    # No mesh of 8 or 64 H100s holds 14 bytes for each of 671 B parameters; 128 hold 73 GB each.
    (8, Stage.SPARSE, 256),
    (64, Stage.SPARSE, 256),
    (256, Stage.SPARSE, None),
    (512, Stage.SPARSE, None),
    # Warm-up keeps 4 bytes a parameter.
    (8, Stage.WARMUP, 64),
    (64, Stage.WARMUP, None),
    (256, Stage.WARMUP, None),
    (512, Stage.WARMUP, None),
]


@pytest.mark.parametrize(("devices", "stage", "enough"), PUBLISHED)
def test_the_published_model_fits_or_not(devices, stage, enough):
    report = make(PlanOptions(devices=devices, stage=stage, search=True, compile="none"))
    said = " ".join(verdict(report))
    assert report.fits == (enough is None)
    assert report.enough == enough
    if report.fits:
        assert "[bold green]It fits" in said
        assert f"The mesh as flags: {flags(report.config.mesh)}" in said
        again = dataclasses.replace(FLAGSHIP, devices=devices, stage=stage, mesh=report.config.mesh)
        assert make(again).bytes == report.bytes
    else:
        assert "It does not fit" in said
        if devices == 8:
            assert re.search(r"alone take [\d,.]+ GB of a device, which may be filled", said)
        assert f"No mesh of {devices} devices fits; by arithmetic {enough} devices do" in said


def test_a_mesh_that_was_asked_for_is_left_alone():
    said = " ".join(verdict(make(dataclasses.replace(FLAGSHIP, memory_share=0.5))))
    assert "Let --search look for a mesh" in said
    assert "Most goes to" in said


def candidate(size):
    state = counted.State(1, 1, 0, size, 0, 0)
    return search.Candidate(None, state, {}, None, fits=size <= 100)


def test_which_meshes_are_compiled():
    """The fastest near the limit, and the smallest of the others; nothing hopeless."""
    sizes = [99, 98, 97, 60, 90, 110, 130]
    found = search.to_compile([candidate(size) for size in sizes], 100, 3)
    assert [one.bytes for one in found] == [99, 98, 60]
    assert [one.bytes for one in search.to_compile(list(map(candidate, (114, 116))), 100, 3)] == [
        114
    ]
    assert search.to_compile([candidate(120)], 100, 3) == []


def test_search_compiles_until_a_mesh_fits(monkeypatch):
    """By the compiler the first mesh is too large: the search goes on, and says what it saw."""
    sizes = iter([79, 70])

    def compiled(config, gpu, backend, on_phase, text):
        on_phase("compiling")
        work = hlo.Work(0.0, {}, 0.0, 0.0)
        held = counted.state(config, counted.shapes_of(config))
        arguments = held.parameter_bytes + held.optimizer_bytes
        memory = {"arguments": arguments, "temporaries": next(sizes) * 10**9 - arguments}
        return Compiled(backend, 1.0, {**memory, "outputs": 0}, {}, [], work, 0)

    monkeypatch.setattr(report_module, "compile_step", compiled)
    monkeypatch.setattr(report_module, "plugin_found", lambda: True)
    phases = []
    found = make(PlanOptions(devices=256, search=True), phases.append)
    assert list(found.tried.values()) == [79 * 10**9, 70 * 10**9]
    assert found.fits
    assert found.config.mesh == found.candidates[1].config.mesh
    assert "mesh 2 of at most 3: compiling" in phases
    shown = to_json(found)["candidates"]
    assert [one["compiled_bytes"] for one in shown[:3]] == [79 * 10**9, 70 * 10**9, None]

    monkeypatch.setattr(report_module, "compile_step", None)  # hopeless: not called
    none = make(PlanOptions(devices=8, search=True, stage=Stage.WARMUP))
    assert none.notes == ["nothing was compiled: by arithmetic no mesh comes near to fitting"]


def test_every_mesh_is_tried():
    found = [mesh.sizes for mesh in search.meshes(8)]
    assert len(found) == len(set(found)) == 35  # 2^3 over five axes: C(3 + 4, 4)
    assert max(mesh.tensor for mesh in search.meshes(64)) == 8  # within a host


def test_time_on_the_wire():
    rates = Rates(nvlink=100, network=10)
    inside = Traffic("all-gather", ("fsdp",), True, 8, 8, 1, 1e9)
    assert seconds(inside, rates) == pytest.approx(0.01)
    ring = Traffic("all-gather", ("fsdp",), True, 64, 8, 1, 8e9)
    assert seconds(ring, rates) == pytest.approx(0.1)  # eight adapters a host
    alone = Traffic("all-gather", ("fsdp",), True, 8, 1, 1, 1e9)
    assert seconds(alone, rates) == pytest.approx(0.1)
    everyone = Traffic("all-to-all", ("expert",), True, 64, 8, 1, 63e9)
    assert seconds(everyone, rates) == pytest.approx(5.6)  # 56 of 63 GB go to other hosts


def test_the_estimate_adds_up():
    report = make(FLAGSHIP)
    found = report.estimate
    assert found.step == pytest.approx(
        found.compute + found.memory + (1 - report.options.rates.overlap) * found.network
    )
    assert found.days == pytest.approx(15_000 * found.step / 86_400)
    assert found.gpu_hours == pytest.approx(found.days * 24 * 256)
    slow = dataclasses.replace(FLAGSHIP, rates=Rates(network=1.0))
    assert make(slow).estimate.bound == "network"
    sparse, warmup = report.recipe[1], report.recipe[0]
    assert sparse.estimate == found
    assert sparse.tokens == pytest.approx(943.7e9, rel=1e-4)
    assert warmup.tokens == pytest.approx(2.097e9, rel=1e-3)
    assert warmup.estimate is not None
    assert warmup.estimate.days < 1


def test_h200s_have_more_room():
    options = dataclasses.replace(FLAGSHIP, gpu="h200")
    assert make(options).limit > 1.7 * make(FLAGSHIP).limit
    assert "141" not in GPUS["h100"].target
    assert str(GPUS["h200"].memory) in GPUS["h200"].target


ERRORS = [
    (["--preset", "no-such"], "no-such.*nor a preset"),
    (["--devices", "256", "--sequence-length", "200000"], "exceeds model.max_position_embeddings"),
    (["--devices", "8", "--mesh.fsdp", "3"], "mesh fsdp=3 is 3 devices, but devices=8"),
    (["--devices", "8", "--mesh.fsdp", "3", "--mesh.data", "-1"], "not a multiple of 3"),
    (["--mesh.data", "-1"], "say how many"),
    (["--mesh.data", "960"], "960 sequences at a time, but batch_size=480"),
    (["--mesh.fsdp", "7"], "batch_size=480 does not divide by 7"),
    (["--mesh.context", "3"], "two chunks for each of the 3 devices"),
    (["--mesh.tensor", "3"], "does not divide by mesh.tensor=3"),
    (["--devices", "7", "--batch-size", "7", "--preset", "tiny"], "sequence_length"),
    (
        ["--devices", "7", "--preset", "tiny", "--sequence-length", "64", "--batch-size", "16"],
        "no mesh of 7 devices divides this run; of the first one tried:",
    ),
    (["--memory-share", "1.5"], "memory_share=1.5"),
    (["--devices", "256", "--micro-batches", "0"], "micro_batches=0: must be at least 1"),
    (["--text", "no/such/program.txt"], "text=no/such/program.txt: no/such is no folder"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_bad_input_is_explained(arguments, message, capsys):
    assert main(["plan", "--compile", "none", *arguments]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("flag", "bound"),
    [("network=1", "network"), ("hbm-share=0.001", "HBM"), ("experts=1", "compute")],
)
def test_rates_are_flags_and_decide_the_bound(flag, bound, capsys):
    name, value = flag.split("=")
    arguments = ["--devices", "256", "--mesh.expert", "8", "--mesh.context", "32", "--json"]
    status = main(["plan", "--compile", "none", *arguments, f"--rates.{name}", value])
    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert found["time"]["bound"] == bound
    assert found["rates"][name.replace("-", "_")] == float(value)


@pytest.mark.parametrize("rate", ["overlap=2", "matmul=0", "network=-1"])
def test_rates_that_make_no_sense_are_refused(rate):
    name, value = rate.split("=")
    with pytest.raises(ValueError, match=f"rates.{name}={value}"):
        Rates(**{name: float(value)})


def test_json_has_every_figure_with_its_source(capsys):
    arguments = "--preset tiny --devices 8 --mesh.context 4 --mesh.expert 2 --sequence-length 64"
    status = main(["plan", "--compile", "none", "--json", *arguments.split(), "--batch-size", "16"])
    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert found["version"] == 1
    assert found["fits"] is True
    assert found["mesh"] == {"data": 1, "fsdp": 1, "expert": 2, "context": 4, "tensor": 1}
    assert found["memory"]["bytes"] == sum(part["bytes"] for part in found["memory"]["parts"])
    sources = [part["source"] for part in found["memory"]["parts"] + found["traffic"]]
    assert {*sources, found["flop"]["source"], found["time"]["source"]} <= {"counted", "assumed"}
    assert {one["op"] for one in found["traffic"]} == {"all-gather", "reduce-scatter", "all-to-all"}
    assert set(found["recipe"][0]) >= {"stage", "tokens", "mesh", "time", "problem"}


def test_the_table_says_yes_or_no(capsys):
    status = main(["plan", "--compile", "none", "--devices", "64", "--mesh.context", "64"])
    said = capsys.readouterr().out
    assert status == 3
    assert "It does not fit" in said
    assert "671.88 B parameters" in said
    assert "nothing was compiled" in said


def test_a_dense_preset_needs_no_indexer():
    options = dataclasses.replace(TINY, stage=Stage.DENSE)
    assert make(options, model=presets.get("tiny")).state.indexer == 0
