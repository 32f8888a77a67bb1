"""The plan of a run, put together: every figure with where it comes from.

`compiled` was read from the program that XLA made for these GPUs, `compiled for CPU` from one made
for as many CPU devices without the kernels, `counted` follows from the config by arithmetic, and
`assumed` is or rests on a rate of `train.plan.hardware.Rates`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from dsa_jax.config import ModelConfig
from dsa_jax.sharding import MeshConfig
from train.config import TrainConfig
from train.flops import step_work
from train.plan import counted, search
from train.plan.collectives import Traffic
from train.plan.compiled import Backend, Compiled, compile_step, plugin_found
from train.plan.estimate import Estimate, estimate
from train.plan.options import PlanOptions, architecture, train_config
from train.plan.search import Candidate
from train.stages import Stage

Source = Literal["compiled", "compiled for CPU", "counted", "assumed"]

# Meshes that a search compiles before it gives up.
_TRIES = 3
# Without the plugin, this many CPU devices are compiled for; what is larger is counted.
_CPU_DEVICES = 16


class Figure(NamedTuple):
    """A number of bytes and where it comes from."""

    name: str
    bytes: int
    source: Source


class Recipe(NamedTuple):
    """A stage of the published recipe on as many devices.

    Attributes:
        stage: warm-up or sparse training.
        tokens: that it reads.
        mesh: the planned one, or if the stage does not divide over it, the best by arithmetic.
        estimate: None if no mesh of so many devices divides the stage.
        compiled: whether the estimate rests on the planned, compiled step.
        problem: why there is none.
    """

    stage: Stage
    tokens: float
    mesh: MeshConfig
    estimate: Estimate | None
    compiled: bool
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """A run, planned.

    Attributes:
        options: what was asked, resolved.
        config: the run on the chosen mesh.
        state: parameters and optimizer.
        memory: what a device holds, part by part.
        limit: bytes that a run may fill.
        traffic: collectives of a step.
        traffic_source: where they come from.
        compiled: what the compiler said; None where nothing was compiled.
        estimate: of a step.
        recipe: the published stages.
        candidates: other meshes, the best first; empty unless searched.
        tried: bytes of a device on each mesh that was compiled, in this order.
        enough: devices that would do where these do not, by arithmetic; None: not searched for, or
            none found.
        notes: what a reader must know, one line each.
    """

    options: PlanOptions
    config: TrainConfig
    state: counted.State
    memory: list[Figure]
    limit: int
    traffic: list[Traffic]
    traffic_source: Source
    compiled: Compiled | None
    estimate: Estimate
    recipe: list[Recipe]
    candidates: list[Candidate]
    notes: list[str]
    tried: dict[MeshConfig, int] = dataclasses.field(default_factory=dict)
    enough: int | None = None

    @property
    def bytes(self) -> int:
        """All that a device must hold at once."""
        return sum(figure.bytes for figure in self.memory)

    @property
    def fits(self) -> bool:
        """Whether that goes into the memory that a run may fill."""
        return self.bytes <= self.limit


def make(
    options: PlanOptions,
    on_phase: Callable[[str], None] = lambda phase: None,
    model: ModelConfig | None = None,
) -> Report:
    """Plans a run.

    Args:
        options: what is asked.
        on_phase: called with a few words whenever something that takes time begins.
        model: the architecture, instead of the preset's.

    Raises:
        ValueError: options that contradict each other, or that nothing can be made of.
        CompileError: the step does not compile.
    """
    options = options.resolved()
    model = model or architecture(options.preset)
    backend = _backend(options)
    if not (options.mesh_is_open or options.search):
        config = train_config(options, model, options.mesh)
        only = search.count(options, config, counted.shapes_of(config))
        return _compiled(options, only, backend, on_phase, [])
    train_config(options, model, MeshConfig())  # what is wrong whatever the mesh
    on_phase("counting meshes")
    candidates = search.rank(options, model)
    if options.search and backend is not None:
        found = _search(options, candidates, backend, on_phase)
    else:
        listed = candidates if options.search else []
        found = _compiled(options, candidates[0], backend, on_phase, listed)
    if found.fits:
        return found
    on_phase("counting devices")
    return dataclasses.replace(found, enough=search.enough(options, model, candidates))


def _search(
    options: PlanOptions,
    candidates: list[Candidate],
    backend: Backend,
    on_phase: Callable[[str], None],
) -> Report:
    """Compiles the best meshes until one fits; of those that do not, the smallest is planned."""
    limit = int(options.hardware.memory * options.memory_share)
    chosen = search.to_compile(candidates, limit, _TRIES)
    if not chosen:
        found = assemble(options, candidates[0], None, candidates)
        note = "nothing was compiled: by arithmetic no mesh comes near to fitting"
        return dataclasses.replace(found, notes=[note])
    tried, best = {}, None
    for number, candidate in enumerate(chosen, 1):
        say = _numbered(on_phase, f"mesh {number} of at most {len(chosen)}")
        found = _compiled(options, candidate, backend, say, candidates)
        tried[candidate.config.mesh] = found.bytes
        if best is None or found.fits or found.bytes < best.bytes:
            best = found
        if found.fits:
            break
    assert best is not None
    return dataclasses.replace(best, tried=tried)


def _numbered(on_phase: Callable[[str], None], mesh: str) -> Callable[[str], None]:
    return lambda phase: on_phase(f"{mesh}: {phase}")


def _compiled(
    options: PlanOptions,
    candidate: Candidate,
    backend: Backend | None,
    on_phase: Callable[[str], None],
    candidates: list[Candidate],
) -> Report:
    """The plan of a mesh, compiled unless there is nothing to compile it with."""
    compiled = None
    if backend is not None:
        compiled = compile_step(candidate.config, options.hardware, backend, on_phase, options.text)
    return assemble(options, candidate, compiled, candidates)


def _backend(options: PlanOptions) -> Backend | None:
    if options.compile == "none":
        return None
    if options.compile == "cpu":
        return "cpu"
    if plugin_found():
        return "cuda"
    if options.compile == "cuda":
        raise ValueError(
            "compile='cuda' needs JAX's CUDA plugin, which needs no GPU: "
            "pip install 'dsa-jax[cuda13]', or compile='cpu' or 'none'"
        )
    return "cpu" if options.devices <= _CPU_DEVICES else None


def assemble(
    options: PlanOptions,
    candidate: Candidate,
    compiled: Compiled | None,
    candidates: list[Candidate],
) -> Report:
    """The plan of one mesh.

    Args:
        options: resolved.
        candidate: the run on the mesh, and what arithmetic says of it.
        compiled: what the compiler says; None: nothing was compiled.
        candidates: to be listed beside it.
    """
    gpu, config = options.hardware, candidate.config
    source: Source = "counted"
    traffic = counted.traffic(config, gpu.per_host)
    timed = candidate.estimate
    if compiled is not None:
        source = "compiled" if compiled.backend == "cuda" else "compiled for CPU"
        traffic = compiled.traffic
        timed = estimate(
            config,
            gpu,
            options.rates,
            traffic,
            compiled.work.other_bytes,
            repeated(config, compiled),
        )
        if compiled.backend == "cpu":  # elementwise work is fused otherwise there
            timed = estimate(config, gpu, options.rates, traffic, _counted_bytes(candidate))
    return Report(
        options=options,
        config=config,
        state=candidate.state,
        memory=_memory(candidate, compiled, source),
        limit=int(gpu.memory * options.memory_share),
        traffic=traffic,
        traffic_source=source,
        compiled=compiled,
        estimate=timed,
        recipe=_recipe(options, config, timed, compiled is not None),
        candidates=candidates,
        notes=_notes(config, compiled),
    )


def _counted_bytes(candidate: Candidate) -> float:
    from train.plan.estimate import other_bytes

    held = candidate.state
    return other_bytes(
        candidate.config,
        held.parameter_bytes + held.optimizer_bytes,
        held.gradient_bytes,
        counted.tokens_at_once(candidate.config),
    )


def counted_products(config: TrainConfig) -> float:
    """Operations of products with weights, of one device in a step, the experts' left out."""
    total = sum(part.total for part in step_work(config) if part.kind == "matmul")
    return total * (config.batch_size or 0) / math.prod(config.mesh.sizes)


def repeated(config: TrainConfig, compiled: Compiled) -> float:
    """How many times more products the program has than the model needs: above 1 where devices
    compute the same thing. Meaningful only where kernels serve everything else."""
    if any(chosen != "mosaic" for chosen in compiled.implementations.values()):
        return 1.0
    return max(1.0, compiled.work.dot_flop / counted_products(config))


def _memory(candidate: Candidate, compiled: Compiled | None, source: Source) -> list[Figure]:
    held = candidate.state
    figures = [
        Figure("parameters", held.parameter_bytes, "counted"),
        Figure("optimizer", held.optimizer_bytes, "counted"),
    ]
    if compiled is None:
        return figures + [
            Figure(name, size, "counted") for name, size in candidate.temporaries.items()
        ]
    memory = compiled.memory
    rest = memory["arguments"] - held.parameter_bytes - held.optimizer_bytes + memory["outputs"]
    return [
        *figures,
        Figure("batch and results", rest, source),
        Figure("gradients and temporaries", memory["temporaries"], source),
    ]


def _recipe(
    options: PlanOptions, config: TrainConfig, planned: Estimate, compiled: bool
) -> list[Recipe]:
    """Warm-up and sparse training at their published sizes."""
    if not config.model.has_indexer:
        return []
    found = []
    for stage in (Stage.WARMUP, Stage.SPARSE):
        defaults = stage.defaults
        tokens = float(defaults.steps * defaults.batch_size * defaults.sequence_length)
        if stage is config.stage and _published(config):
            found.append(Recipe(stage, tokens, config.mesh, planned, compiled))
            continue
        published = dataclasses.replace(
            options,
            stage=stage, batch_size=None, sequence_length=None, micro_batches=None, steps=None,
        )  # fmt: skip
        try:
            best = _on_mesh(published, config)
            found.append(Recipe(stage, tokens, best.config.mesh, best.estimate, False))
        except ValueError as error:
            found.append(Recipe(stage, tokens, config.mesh, None, False, str(error)))
    return found


def _on_mesh(options: PlanOptions, config: TrainConfig) -> Candidate:
    """Another stage on the planned mesh, or if that does not divide it, on the best one."""
    try:
        run = train_config(options, config.model, config.mesh)
        return search.count(options, run, counted.shapes_of(run))
    except ValueError:
        train_config(options, config.model, MeshConfig())  # what is wrong whatever the mesh
        return search.rank(options, config.model)[0]


def _published(config: TrainConfig) -> bool:
    defaults = config.stage.defaults
    fields = ("steps", "batch_size", "sequence_length")
    return all(getattr(config, name) == getattr(defaults, name) for name in fields)


def _notes(config: TrainConfig, compiled: Compiled | None) -> list[str]:
    notes = []
    if compiled is None:
        notes.append(
            "nothing was compiled: temporaries and collectives are arithmetic; JAX's CUDA plugin, "
            "which needs no GPU, compiles the step"
        )
        return notes
    if compiled.backend == "cpu":
        notes.append(
            "compiled for CPU devices: state and collectives are those of GPUs, temporaries are "
            "those of the plain ops; install JAX's CUDA plugin to compile for the GPUs"
        )
    for op, chosen in sorted(compiled.implementations.items()):
        if compiled.backend == "cuda" and chosen != "mosaic":
            notes.append(f"{op} has no kernel for this call: {chosen}")
    if compiled.unknown_loops:
        notes.append(f"{compiled.unknown_loops} loops of unknown length are counted as one pass")
    more = repeated(config, compiled)
    if more > 1.1:
        notes.append(f"devices repeat each other's products: {more:.2f} times what is needed")
    return notes
