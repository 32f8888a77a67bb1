"""The demo's report: a table on the terminal, `report.md` with figures, all from `results.json`.

Nothing here computes a result; `write` can be called again on a finished run's folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from train import claims as claims_module
from train import figures, needles
from train.claims import Verdict, mean_and_range, number
from train.cost import LayerShape
from train.ladder import LADDER, rungs
from train.report_setup import markdown_table, setup
from train.tracker import read_metrics

Results = Mapping[str, Any]


def write(folder: Path) -> Path:
    """Writes `report.md` and `figures/` beside `results.json`.

    Args:
        folder: of a finished demo.

    Returns:
        The report.

    Raises:
        FileNotFoundError: the folder holds no `results.json`: the demo did not finish.
    """
    source = folder / "results.json"
    if not source.is_file():
        raise FileNotFoundError(
            f"{source} does not exist: the demo in {folder} has not finished; run it again"
        )
    results = json.loads(source.read_text(encoding="utf-8"))
    curves = [
        {
            name: read_metrics(folder / stage["metrics"], "train")
            for name, stage in run["stages"].items()
        }
        for run in results["runs"]
    ]
    with np.load(folder / results["snapshot"]) as snapshot:
        drawn = figures.draw_all(folder / "figures", results, curves, dict(snapshot))
    path = folder / "report.md"
    path.write_text(_markdown(results, check(results), drawn, folder), encoding="utf-8")
    return path


def check(results: Results) -> list[Verdict]:
    """The demo's claims against its numbers."""
    return claims_module.check(claims_module.of(results), results["runs"])


# --- the terminal ---------------------------------------------------------------------------------


def table(results: Results) -> Table:
    """The ladder for the terminal, without the column that the eye can subtract."""
    runs = results["runs"]
    k, length = results["topk"], results["length"]
    out = _table(f"Held-out text, k = {k} of up to {length} keys, {_seeds(results)}")
    shown = [i for i, name in enumerate(_LADDER_COLUMNS) if name != "to dense"]
    for i in shown:
        out.add_column(_LADDER_COLUMNS[i], justify="right" if i else "left", no_wrap=True)
    for cells in _ladder_rows(runs):
        out.add_row(*(cells[i].replace(" ± ", "\n±") for i in shown))
    return out


def _table(title: str) -> Table:
    """Narrow enough for 80 columns."""
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """The claims for the terminal."""
    out = _table("Claims, checked against the numbers above")
    for column in ("claim", "value", "limit", "holds"):
        out.add_column(column, justify="left" if column == "claim" else "right")
    for verdict in verdicts:
        holds = "[green]yes[/]" if verdict.holds else "[red]NO[/]"
        out.add_row(*_verdict_cells(verdict), holds)
    return out


def implementation_table(served: Mapping[str, str]) -> Table:
    """Which implementation serves each op, for the terminal."""
    out = _table("Ops of training and what serves them")
    for column in ("op", "implementation"):
        out.add_column(column)
    for op, implementation in sorted(served.items()):
        out.add_row(op, implementation)
    return out


def needle_table(results: Results) -> Table:
    """Retrieval for the terminal."""
    out = _table("Needles answered, by bytes of the document")
    head, rows = _needle_rows(results, errors=False)
    for i, column in enumerate(head):
        out.add_column(column, justify="right" if i else "left", no_wrap=True)
    for cells in rows:
        out.add_row(*cells)
    return out


def sample_text(sample: Mapping[str, str]) -> Text:
    """The sample for the terminal; the model's own words are bold."""
    return Text.assemble(sample["prompt"], (sample["text"], "bold"))


_LADDER_COLUMNS = (
    "weights and keys", "nats/byte", "quoted", "to dense", "to control", "recall", "oracle",
    "overlap",
)  # fmt: skip


def _ladder_rows(runs: Sequence[Results]) -> list[list[str]]:
    def cell(name: str, key: str, index: int | None = None, sign: str = "") -> str:
        values = [run["ladder"][name].get(key) for run in runs]
        if any(value is None for value in values):
            return "–"
        values = [value if index is None else value[index] for value in values]
        mean = f"{np.mean(values):{sign}.3f}"
        return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"

    rows = []
    for rung in LADDER:
        selects = rung.control != "dense"
        rows.append(
            [
                rung.title,
                cell(rung.name, "cross_entropy"),
                cell(rung.name, "quoted_loss"),
                cell(rung.name, "gap_to_dense", 0, "+"),
                cell(rung.name, "gap_to_control", 0, "+"),
                *(
                    cell(rung.name, key) if selects else "–"
                    for key in ("mass_recall", "oracle_mass", "overlap")
                ),
            ]
        )
    return rows


def _needle_rows(results: Results, errors: bool = True) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row a rung, a column a length; with the standard error over documents."""
    runs = results["runs"]
    asked = runs[0]["needles"]
    rows = []
    for rung in rungs(list(asked["accuracy"])):
        cells = []
        for column in range(len(asked["lengths"])):
            shares = [x for run in runs for x in run["needles"]["documents"][rung.name][column]]
            error = f" ± {np.std(shares, ddof=1) / len(shares) ** 0.5:.3f}" if errors else ""
            cells.append(f"{np.mean(shares):.3f}{error}")
        rows.append([rung.title, *cells])
    return ["weights and keys", *(str(n) for n in asked["lengths"])], rows


def _verdict_cells(verdict: Verdict) -> list[str]:
    claim = verdict.claim
    sign = "≤" if claim.sense == "<=" else "≥"
    return [claim.statement, mean_and_range(verdict.values), f"{sign} {number(claim.limit)}"]


# --- report.md ------------------------------------------------------------------------------------


def _markdown(
    results: Results, verdicts: Sequence[Verdict], drawn: Mapping[str, Path], folder: Path
) -> str:
    parts = [
        "# DeepSeek Sparse Attention on real text",
        _headline(results),
        "## What holds and what does not",
        _claims(verdicts),
        "## The ladder",
        _ladder_text(results),
        markdown_table(_LADDER_COLUMNS, _ladder_rows(results["runs"])),
        _figure(drawn, folder, "ladder", "Held-out loss of every rung."),
        *_retrieval(results, drawn, folder),
        "## Training",
        _figure(drawn, folder, "training", _TRAINING_CAPTION),
        "## What the indexer learns",
        _figure(drawn, folder, "selection", _SELECTION_CAPTION),
        _figure(drawn, folder, "layers", _LAYERS_CAPTION),
        _figure(drawn, folder, "positions", _positions_caption(results)),
        _figure(drawn, folder, "sweep", _SWEEP_CAPTION),
        "## What it costs",
        _cost_text(results),
        _figure(drawn, folder, "cost", "Both axes are logarithmic; faint lines mark k."),
        "## A sample",
        _sample(results),
        "## How it was made",
        setup(results),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


_TRAINING_CAPTION = (
    "Training losses (faint: each step; strong: running mean). The KL of warm-up is over all "
    "visible keys, the KL of the sparse stage over the selected ones: two different quantities, "
    "not to be compared across the line."
)
_SELECTION_CAPTION = (
    "One held-out row. Left, the main attention's mass, averaged over heads. Right, the keys that "
    "the indexer selects (blue) and the mass it misses (orange)."
)
_LAYERS_CAPTION = (
    "Measured in each model's own forward pass, as served; over rows with more than k keys. Green "
    "marks are the oracle on the same queries: the ceiling of recall, and the recency that the "
    "teacher's own choice has."
)
_NEEDLES_CAPTION = (
    "The share answered, by length of the document and by how deep in it the needle lies. Right of "
    "the grey line documents are longer than any in training."
)
_SWEEP_CAPTION = (
    "The same weights with another k at evaluation; no weight was trained for it except at the "
    "dotted line."
)


def _headline(results: Results) -> str:
    runs = results["runs"]

    def losses(name: str) -> str:
        return mean_and_range([run["ladder"][name]["cross_entropy"] for run in runs])

    gaps = [run["ladder"]["sparse"]["gap_to_control"] for run in runs]
    gap = mean_and_range([mean for mean, _ in gaps])
    error = ", ".join(number(stderr) for _, stderr in gaps)
    k, length = results["topk"], results["length"]
    return (
        f"A model that attends to **{k} keys of up to {length}** ({k / length:.1%} at the end of a "
        "row; DeepSeek-V3.2-Exp keeps 2048 of 131072, 1.6 %) reaches "
        f"**{losses('sparse')} nats/byte** on held-out books. The dense control, trained on the "
        f"same tokens from the same checkpoint, reaches {losses('control')}: the gap is **{gap}** "
        f"(standard error over rows: {error}). "
        f"With the untrained indexer the dense weights give {losses('untrained')}, after warm-up "
        f"{losses('warmed')}; the best any choice of {k} keys does for them is "
        f"{losses('oracle')}. ({_seeds(results).capitalize()}.)"
    )


def _seeds(results: Results) -> str:
    count = len(results["runs"])
    return "one seed" if count == 1 else f"{count} seeds: mean ± half the range"


def _claims(verdicts: Sequence[Verdict]) -> str:
    rows = [
        [*_verdict_cells(verdict), "yes" if verdict.holds else "**no**", verdict.claim.why]
        for verdict in verdicts
    ]
    text = markdown_table(["claim", "value", "limit", "holds", "note"], rows)
    failed = [verdict.claim.statement for verdict in verdicts if not verdict.holds]
    if not failed:
        return text + "\n\nAll of them hold."
    listed = "\n".join(f"- {statement}" for statement in failed)
    return f"{text}\n\n{len(failed)} of {len(verdicts)} do not hold:\n\n{listed}"


def _ladder_text(results: Results) -> str:
    return (
        "Every rung sees the same held-out tokens. `quoted` is the loss on bytes that stood "
        "in the row before: quotations, but for their first few bytes. `to dense` and `to control` "
        "are differences in nats per byte over all bytes. `recall` is the share of the attention's "
        "mass on the selected keys, `oracle` the most that k keys could hold, `overlap` the share "
        "of the oracle's keys that were selected: means over layers and over queries with more "
        f"than {results['topk']} visible keys, measured in the rung's own forward pass. Rungs "
        "without other mention use the dense checkpoint's weights."
    )


def _retrieval(results: Results, drawn: Mapping[str, Path], folder: Path) -> list[str]:
    """The needles' section, if any were asked for."""
    if "needles" not in results["runs"][0]:
        return []
    asked, length, k = results["runs"][0]["needles"], results["length"], results["topk"]
    depths, count = asked["depths"], asked["count"] * len(results["runs"])
    text = (
        "Random words of six letters, drawn anew, stand in held-out running text, one for every "
        f"{needles.SPACING} bytes. The text ends by asking for {len(depths)} of them, one "
        "from each of the depths below, in random order and by their "
        "first two letters; an answer counts if each of the other four is the likeliest one. "
        f"{count} documents, so {count * len(depths)} answers, of each length, the same for all "
        "rungs; ± is the standard error over documents, which says little where nearly all or "
        f"nearly none are right. Training had documents of up to {length} bytes; longer ones are "
        f"beyond it. {k} keys are {k / length:.1%} of {length} and "
        f"{k / max(asked['lengths']):.1%} of {max(asked['lengths'])}. Untrained, random, most "
        "recent and oracle keys are asked of the dense checkpoint's weights."
    )
    return [
        "## Retrieval",
        text,
        markdown_table(*_needle_rows(results)),
        _figure(
            drawn,
            folder,
            "needles",
            "By length of the document, and by how deep in it the needle lies.",
        ),
    ]


def _positions_caption(results: Results) -> str:
    long, length = results["long_length"], results["length"]
    dense = mean_and_range([r["long_ladder"]["dense"]["cross_entropy"] for r in results["runs"]])
    sparse = mean_and_range([r["long_ladder"]["sparse"]["cross_entropy"] for r in results["runs"]])
    return (
        f"Rows of {long} bytes; training saw {length}. Over these rows dense attention has "
        f"{dense} nats/byte and the sparse model {sparse}."
    )


def _cost_text(results: Results) -> str:
    shape, cross = LayerShape(), LayerShape().crossovers()
    far = 131_072
    decode = shape.dense_decode_flop(far) / shape.sparse_flop(far)
    prefill = shape.dense_prefill_flop(far) / shape.sparse_flop(far)
    return (
        "Counted for one attention layer of DeepSeek-V3.2-Exp (128 heads, 64 indexer heads, "
        f"k = 2048): at 128K DSA takes {decode:.1f} times fewer operations than dense decoding "
        f"and {prefill:.1f} times fewer than dense prefill. It is not free: up to k keys it costs "
        "the indexer on top of dense attention, and it undercuts dense attention only beyond "
        f"{cross['decode operations']:.0f} keys in decode ({cross['decode bytes']:.0f} by cache "
        f"bytes) and beyond {cross['prefill operations']:.0f} in prefill; below "
        f"{cross['masked prefill']:.0f} a prompt is served cheaper by masking than by gathering. "
        "The slope that remains is the indexer, which still scores every key.\n\n"
        + _measured_cost(results)
    )


def _measured_cost(results: Results) -> str:
    """What the demo itself timed."""
    measured, dtype = results["cost"]["measured"], results.get("compute_dtype", "float32")
    if not measured:
        return "Nothing was timed in this run."
    how = "reference implementations"
    if dtype == "bfloat16" and "mosaic" in results.get("implementations", {}).values():
        how = "kernels for DSA, XLA for dense attention, time between calls included"
    ratios = [(p["position"], p["dense"] / (p["indexer"] + p["sparse"])) for p in measured]
    cheaper = [position for position, ratio in ratios if ratio > 1]
    crossing = (
        f"DSA is the cheaper one from {cheaper[0]} keys on"
        if cheaper
        else "DSA is nowhere the cheaper one"
    )
    shape = results["cost"]["shape"]
    return (
        f"Measured here at {', '.join(str(position) for position, _ in ratios)} keys, on a layer "
        f"with {shape['heads']} heads and k = {shape['topk']}: "
        f"{crossing}; at {ratios[-1][0]} keys the ratio is {ratios[-1][1]:.1f}. In {dtype} on "
        f"{results['machine']['device']}, by {how}: the shape of the curve is the point, not its "
        "height."
    )


def _sample(results: Results) -> str:
    sample = results["sample"]
    return (
        "A held-out passage that begins to be quoted; the sparse-trained model goes on at ⟦ "
        f"(greedy), with {results['topk']} keys at every step.\n\n"
        f"```text\n{sample['prompt']}⟦{sample['text']}\n```\n\n"
        f"The row itself goes on:\n\n```text\n{sample['truth']}\n```"
    )


def _figure(drawn: Mapping[str, Path], folder: Path, name: str, caption: str) -> str:
    if name not in drawn:
        return ""
    return f"![{name}]({drawn[name].relative_to(folder).as_posix()})\n\n*{caption}*"
