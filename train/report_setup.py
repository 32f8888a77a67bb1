"""The last section of the demo's report: how everything before it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]


def setup(results: Results) -> str:
    """Model, stages, text, machine, and what the numbers do not say."""
    model, corpus, machine = results["model"], results["corpus"], results["machine"]
    rows = []
    for name, stage in results["runs"][0]["stages"].items():
        rows.append(
            [name, str(stage["steps"]), f"{stage['tokens']:,}", stage["rates"],
             f"{stage['seconds']:.0f} s", f"`{stage['checkpoint']}`"]
        )  # fmt: skip
    laps = "; ".join(f"{part} {seconds:.0f}" for part, seconds in results["laps"].items())
    served = "; ".join(f"`{op}` {what}" for op, what in results.get("implementations", {}).items())
    served = f"Ops in training: {served}.\n\n" if served else ""
    stages = markdown_table(
        ["stage", "steps", "tokens", "learning rates", "time", "checkpoint (seed 0)"], rows
    )
    shared = ""
    if results.get("examiners"):
        shared = (
            "Stages took what the table says while other processes compiled programs and answered "
            "the questions about earlier models on the same device.\n\n"
        )
    return (
        f"{model['layers']} layers of MLA, {model['description']}; {model['parameters']:,} "
        f"parameters, {model['indexer_parameters']:,} of them in the indexers "
        f"({model['indexer_parameters'] / model['parameters']:.1%}).\n\n{stages}\n\n"
        f"{shared}{served}"
        f"Text: {corpus['license']} {corpus['train_bytes']:,} bytes to train on; held out, whole: "
        f"{', '.join(corpus['held_out'])} ({corpus['held_out_bytes']:,} bytes). Bytes are tokens; "
        f"half of each row is running text, the rest quotes it{_mixture(results)}. "
        f"Every loss above is over {corpus['scored']:,} held-out bytes in rows of "
        f"{results['length']}, spread evenly over those books.\n\n"
        f"Machine: {machine['device']}, {machine['cores']} cores, jax {machine['jax']}, "
        f"{machine['date']}; {results['seconds']:.0f} s in all ({laps}). Again: "
        f"`{results['command']}`. "
        "Every training record is in `metrics.jsonl`, every number of this page in "
        "`results.json`.\n\n"
        f"Limits: {len(results['runs'])} seed(s), a small model, short rows. "
        f"{results['topk']} keys of {results['length']} are a larger share than "
        "DeepSeek-V3.2-Exp's 2048 of 131072 and yet far fewer keys: easier in one way, harsher in "
        f"the other. {_far(results)} make distant keys matter; plain prose needs them far less at "
        "this size, and a small loss here promises nothing about retrieval at 128K."
    )


def _far(results: Results) -> str:
    """What there is to look up."""
    if "needles" in results["runs"][0]:
        return "Needles, and quotations if the model has learnt to look them up,"
    return "The quotations"


def _mixture(results: Results) -> str:
    """What else the rows are made of."""
    text = ""
    if "needles" in results["runs"][0]:
        text += " and asks for the needles in it"
    if lessons := results["corpus"].get("lessons"):
        lengths = sorted({one["length"] for one in lessons if one["kind"] == "text"})
        others = dict.fromkeys(one["kind"] for one in lessons if one["kind"] != "text")
        text += (
            f"; such documents of {', '.join(map(str, lengths))} bytes, from short to long, fill "
            f"rows of {results['length']}"
        )
        if others:
            text += f", after lessons in looking up that are made up ({', '.join(others)})"
    return text


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers to the right, but for the first column."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
