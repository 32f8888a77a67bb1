"""The plan for people: rich tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dsa_jax.sharding import MeshConfig
from train.flops import computed_flop, model_flop, step_work
from train.plan.collectives import Traffic
from train.plan.estimate import seconds
from train.plan.options import mesh_sizes
from train.plan.report import Report, counted_products

_ROWS = 8
_CHECKED = (
    "estimated; three whole steps of one and two layers on an H100 came within 4% of it, the "
    "layers that the rates were chosen with within 12%; no cluster was measured"
)


def show(console: Console, report: Report) -> None:
    """Prints a plan."""
    _run(console, report)
    _memory(console, report)
    _traffic(console, report)
    _work(console, report)
    _time(console, report)
    if report.recipe:
        _recipe(console, report)
    if report.candidates:
        _candidates(console, report)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    _verdict(console, report)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column else "left")
    return table


def _gb(count: float) -> str:
    return _number(count / 1e9)


def _number(value: float) -> str:
    """Two digits behind the point, or where that shows nothing, two that count."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def _run(console: Console, report: Report) -> None:
    config, options = report.config, report.options
    console.print(
        f"[bold]{options.preset}[/], {config.stage.value}: {options.devices} x "
        f"{options.hardware.name}, mesh {_mesh(report.config.mesh)}",
        highlight=False,
    )
    console.print(
        f"{config.batch_size} sequences of {config.sequence_length} tokens a step, "
        f"{config.micro_batches} micro-batches, {config.steps} steps; remat {config.remat}, "
        f"first moment {config.optimizer.moment_dtype}",
        highlight=False,
    )
    state = report.state
    console.print(
        f"{_count(state.parameters)} parameters, of which {_count(state.trainable)} learn; "
        f"{_count(state.indexer)} in indexers\n",
        highlight=False,
    )


def _count(parameters: int) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if parameters >= size:
            return f"{parameters / size:.2f}{unit}"
    return str(parameters)


def _mesh(mesh: MeshConfig) -> str:
    sizes = mesh_sizes(mesh).items()
    return " x ".join(f"{axis}={n}" for axis, n in sizes if n > 1) or "of one device"


def _memory(console: Console, report: Report) -> None:
    table = _table("Memory of a device", "", "GB", "")
    for figure in report.memory:
        table.add_row(figure.name, _gb(figure.bytes), figure.source)
    table.add_section()
    table.add_row("all", _gb(report.bytes), "")
    share = f"{report.options.memory_share:.0%} of {_gb(report.options.hardware.memory)}"
    table.add_row("may be filled", _gb(report.limit), f"assumed, {share}")
    console.print(table, "")


def _traffic(console: Console, report: Report) -> None:
    if not report.traffic:
        return
    table = _table(
        f"Collectives of a step: GB sent by a device ({report.traffic_source}), s (assumed)",
        "axes", "op", "group", "on host", "calls", "GB", "s",
    )  # fmt: skip
    for one in report.traffic[:_ROWS]:
        group, here = str(one.group), str(one.per_host)
        table.add_row(one.name, one.op, group, here, *_sums(report, [one]))
    if rest := report.traffic[_ROWS:]:
        table.add_row(f"{len(rest)} smaller", "", "", "", *_sums(report, rest))
    console.print(table, "")


def _sums(report: Report, traffic: list[Traffic]) -> tuple[str, str, str]:
    return (
        f"{sum(one.calls for one in traffic):,}",
        _gb(sum(one.bytes_sent for one in traffic)),
        _number(sum(seconds(one, report.options.rates) for one in traffic)),
    )


def _work(console: Console, report: Report) -> None:
    config, rates = report.config, report.options.rates
    sequences = (config.batch_size or 0) / report.options.devices
    table = _table(
        "Work of a device in a step: TFLOP (counted), TFLOP/s (assumed)",
        "", "needed", "recomputed", "TFLOP/s", "s",
    )  # fmt: skip
    for part in step_work(config):
        rate = getattr(rates, part.kind)
        table.add_row(
            part.name,
            _number(sequences * (part.forward + part.backward) / 1e12),
            _number(sequences * part.recomputed / 1e12),
            _number(rate),
            _number(sequences * part.total / rate / 1e12),
        )
    needed, computed = model_flop(config), computed_flop(config)
    table.add_section()
    table.add_row(
        "all", _number(sequences * needed / 1e12), _number(sequences * (computed - needed) / 1e12)
    )
    console.print(table)
    if report.compiled is not None and report.compiled.backend == "cuda":
        console.print(
            f"products with weights, experts aside: {_number(counted_products(config) / 1e12)} "
            f"TFLOP counted; XLA's own products: "
            f"{_number(report.compiled.work.dot_flop / 1e12)} TFLOP compiled",
            highlight=False,
        )
    console.print()


def _time(console: Console, report: Report) -> None:
    found, config = report.estimate, report.config
    table = _table("A step (assumed: rates, overlap)", "", "s", "")
    table.add_row("products and kernels", _number(found.compute))
    table.add_row("memory traffic of the rest", _number(found.memory))
    hidden = f"{report.options.rates.overlap:.0%} of it behind the rest"
    table.add_row("collectives", _number(found.network), hidden)
    table.add_section()
    table.add_row("step", _number(found.step), f"bound by {found.bound}")
    console.print(table)
    console.print(
        f"{found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%}; {config.steps} steps take "
        f"{_number(found.days)} days, {found.gpu_hours:,.0f} GPU-hours",
        highlight=False,
    )
    console.print(f"{_CHECKED}\n", highlight=False)


def _recipe(console: Console, report: Report) -> None:
    table = _table(
        f"The published recipe on {report.options.devices} devices (assumed)",
        "stage", "B tokens", "step, s", "days", "GPU-hours", "",
    )  # fmt: skip
    for part in report.recipe:
        tokens = f"{part.tokens / 1e9:,.1f}"
        if part.estimate is None:
            table.add_row(part.stage.value, tokens, "", "", "", part.problem)
            continue
        remark = "as above" if part.estimate is report.estimate else "counted"
        if part.mesh != report.config.mesh:
            remark += f", on {_mesh(part.mesh)}"
        table.add_row(
            part.stage.value,
            tokens,
            _number(part.estimate.step),
            _number(part.estimate.days),
            f"{part.estimate.gpu_hours:,.0f}",
            remark,
        )
    console.print(table, "")


def _candidates(console: Console, report: Report) -> None:
    table = _table(
        "Meshes by arithmetic (counted)", "mesh", "GB", "step, s", "fits", "compiled, GB", ""
    )
    for number, one in enumerate(report.candidates):
        mesh = one.config.mesh
        if number >= _ROWS and mesh not in report.tried:
            continue
        compiled = report.tried.get(mesh)
        table.add_row(
            _mesh(mesh),
            _gb(one.bytes),
            _number(one.estimate.step),
            "yes" if one.fits else "no",
            "" if compiled is None else _gb(compiled),
            "the plan above" if mesh == report.config.mesh else "",
        )
    console.print(table, "")


def _verdict(console: Console, report: Report) -> None:
    for line in verdict(report):
        console.print(line, highlight=False)


def verdict(report: Report) -> list[str]:
    """Yes or no, why, and the way out: sentences, marked up."""
    gap, devices = _gb(abs(report.limit - report.bytes)), report.options.devices
    searched = bool(report.candidates) or report.options.mesh_is_open
    if report.fits:
        said = [f"[bold green]It fits[/], with {gap} GB to spare."]
        if searched and devices > 1:
            said.append(f"The mesh as flags: {flags(report.config.mesh)}")
        return said
    said = [f"[bold red]It does not fit[/]: {gap} GB a device too much."]
    state = report.state
    held = state.parameter_bytes + state.optimizer_bytes + state.gradient_bytes
    if held > report.limit:
        said.append(
            f"Parameters, optimizer and gradients alone take {_gb(held)} GB of a device, which "
            f"may be filled up to {_gb(report.limit)}."
        )
    else:
        largest = max(report.memory, key=lambda figure: figure.bytes)
        said.append(f"Most goes to {largest.name}: {_gb(largest.bytes)} GB.")
    if not searched:
        said.append("Let --search look for a mesh that fits, or take more devices.")
    elif report.enough:
        said.append(
            f"No mesh of {devices} devices fits; by arithmetic {report.enough} devices do: "
            f"--devices {report.enough} --search"
        )
    else:
        said.append(
            f"No mesh of {devices} devices fits, and more of them have nothing to divide: take "
            "GPUs with more memory, shorter sequences (--sequence-length), or --remat full."
        )
    return said


def flags(mesh: MeshConfig) -> str:
    """A mesh as arguments of `python -m train plan` and `python -m train run`."""
    sizes = mesh_sizes(mesh).items()
    return " ".join(f"--mesh.{axis} {n}" for axis, n in sizes if n > 1)
