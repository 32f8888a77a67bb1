"""The plan for people: rich tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from train.flops import computed_flop, model_flop, step_work
from train.plan.estimate import seconds
from train.plan.report import Report, counted_products, mesh_sizes

_GB = 1e9
_ROWS = 8


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
        table.add_column(column, justify="left" if number in (0, len(columns) - 1) else "right")
    return table


def _run(console: Console, report: Report) -> None:
    config, options = report.config, report.options
    mesh = " x ".join(f"{a}={n}" for a, n in mesh_sizes(config.mesh).items() if n > 1) or "1"
    console.print(
        f"[bold]{options.preset}[/], {config.stage.value}: {options.devices} x "
        f"{options.hardware.name}, mesh {mesh}\n"
        f"{config.batch_size} sequences of {config.sequence_length} tokens a step, in "
        f"{config.micro_batches} micro-batches; {config.steps} steps; remat {config.remat}, first "
        f"moment {config.optimizer.moment_dtype}\n"
        f"{report.state.parameters / 1e9:,.2f} B parameters, {report.state.trainable / 1e9:,.2f} B "
        f"of them learn, {report.state.indexer / 1e9:,.2f} B are indexers\n",
        highlight=False,
    )


def _memory(console: Console, report: Report) -> None:
    table = _table("Memory of a device", "", "GB", "")
    for figure in report.memory:
        table.add_row(figure.name, f"{figure.bytes / _GB:,.2f}", figure.source)
    table.add_section()
    table.add_row("all", f"{report.bytes / _GB:,.2f}", "")
    share = f"{report.options.memory_share:.0%} of {report.options.hardware.memory / _GB:.1f}"
    table.add_row("may be filled", f"{report.limit / _GB:,.2f}", f"assumed, {share}")
    console.print(table, "")


def _traffic(console: Console, report: Report) -> None:
    table = _table(
        f"Collectives of a step, bytes sent by a device ({report.traffic_source})",
        "axes", "op", "devices", "on a host", "calls", "GB", "s", "",
    )  # fmt: skip
    for one in report.traffic[:_ROWS]:
        table.add_row(
            one.name,
            one.op,
            f"{one.group}",
            f"{one.per_host}",
            f"{one.calls:,}",
            f"{one.bytes_sent / _GB:,.2f}",
            f"{seconds(one, report.options.rates):,.2f}",
            "assumed",
        )
    rest = report.traffic[_ROWS:]
    if rest:
        sent = sum(one.bytes_sent for one in rest) / _GB
        took = sum(seconds(one, report.options.rates) for one in rest)
        calls = sum(one.calls for one in rest)
        table.add_row(
            f"{len(rest)} smaller ones", "", "", "", f"{calls:,}", f"{sent:,.2f}", f"{took:,.2f}",
            "assumed",
        )  # fmt: skip
    if report.traffic:
        console.print(table, "")


def _work(console: Console, report: Report) -> None:
    config, rates = report.config, report.options.rates
    sequences = (config.batch_size or 0) / report.options.devices
    table = _table(
        "Operations of a step, of a device (counted)",
        "", "TFLOP needed", "recomputed", "TFLOP/s", "s", "",
    )  # fmt: skip
    for part in step_work(config):
        rate = getattr(rates, part.kind)
        table.add_row(
            part.name,
            f"{sequences * (part.forward + part.backward) / 1e12:,.1f}",
            f"{sequences * part.recomputed / 1e12:,.1f}",
            f"{rate:,.0f}",
            f"{sequences * part.total / rate / 1e12:,.2f}",
            "assumed",
        )
    table.add_section()
    needed, computed = model_flop(config), computed_flop(config)
    table.add_row(
        "all", f"{sequences * needed / 1e12:,.1f}", f"{sequences * (computed - needed) / 1e12:,.1f}"
    )
    console.print(table)
    if report.compiled is not None and report.compiled.backend == "cuda":
        console.print(
            f"products with weights, experts aside: {counted_products(config) / 1e12:,.1f} TFLOP "
            f"counted; XLA's own products: {report.compiled.work.dot_flop / 1e12:,.1f} TFLOP "
            "compiled",
            highlight=False,
        )
    console.print()


def _time(console: Console, report: Report) -> None:
    found = report.estimate
    table = _table("A step (assumed: rates and overlap)", "", "s", "")
    table.add_row("products and kernels", f"{found.compute:,.2f}", "")
    table.add_row("memory traffic of the rest", f"{found.memory:,.2f}", "")
    table.add_row(
        "collectives", f"{found.network:,.2f}", f"{report.options.rates.overlap:.0%} behind the rest"
    )
    table.add_section()
    table.add_row("step", f"{found.step:,.2f}", f"bound by {found.bound}")
    console.print(table)
    console.print(
        f"{found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%}; {report.config.steps} steps: "
        f"{found.days:,.1f} days, {found.gpu_hours:,.0f} GPU-hours\n",
        highlight=False,
    )


def _recipe(console: Console, report: Report) -> None:
    table = _table(
        "The published recipe on this mesh", "stage", "B tokens", "step, s", "days", "GPU-hours", ""
    )
    for part in report.recipe:
        tokens = f"{part.tokens / 1e9:,.1f}"
        if part.estimate is None:
            table.add_row(part.stage.value, tokens, "", "", "", part.problem)
            continue
        planned = part.estimate is report.estimate
        table.add_row(
            part.stage.value,
            tokens,
            f"{part.estimate.step:,.1f}",
            f"{part.estimate.days:,.2f}",
            f"{part.estimate.gpu_hours:,.0f}",
            "as above" if planned else "counted, not compiled",
        )
    console.print(table, "")


def _candidates(console: Console, report: Report) -> None:
    table = _table("Meshes by arithmetic (counted)", "mesh", "GB", "step, s", "fits", "")
    for one in report.candidates[:_ROWS]:
        mesh = " x ".join(f"{a}={n}" for a, n in mesh_sizes(one.config.mesh).items() if n > 1)
        chosen = one.config.mesh == report.config.mesh
        table.add_row(
            mesh or "1",
            f"{one.bytes / _GB:,.1f}",
            f"{one.estimate.step:,.1f}",
            "yes" if one.fits else "no",
            "the plan above" if chosen else "",
        )
    console.print(table, "")


def _verdict(console: Console, report: Report) -> None:
    gap = abs(report.limit - report.bytes) / _GB
    if report.fits:
        console.print(f"[bold green]It fits[/], with {gap:,.1f} GB to spare.", highlight=False)
        return
    advice = {
        "parameters": "cut them over more devices (mesh.fsdp, mesh.expert, mesh.context)",
        "optimizer": "cut it over more devices (mesh.fsdp, mesh.expert, mesh.context)",
    }
    largest = max(report.memory, key=lambda figure: figure.bytes).name
    way_out = advice.get(
        largest, "more devices, a larger mesh.context, or --search for a better mesh"
    )
    console.print(
        f"[bold red]It does not fit[/]: {gap:,.1f} GB too much; {largest} are the largest part: "
        f"{way_out}.",
        highlight=False,
    )
