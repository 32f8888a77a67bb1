"""A plan as JSON-ready data, for programs."""

from __future__ import annotations

from typing import Any

from train.config import to_dict
from train.flops import computed_flop, model_flop, step_work
from train.plan.estimate import seconds
from train.plan.options import mesh_sizes
from train.plan.report import Report, counted_products


def to_json(report: Report) -> dict[str, Any]:
    """The report as JSON-ready data; bytes, seconds and operations are plain numbers."""
    config, compiled = report.config, report.compiled
    rates = report.options.rates
    return {
        "version": 1,
        "fits": report.fits,
        "devices": report.options.devices,
        "gpu": report.options.hardware.name,
        "mesh": mesh_sizes(config.mesh),
        "run": {
            "preset": report.options.preset,
            "stage": config.stage.value,
            "sequence_length": config.sequence_length,
            "batch_size": config.batch_size,
            "micro_batches": config.micro_batches,
            "steps": config.steps,
            "moment_dtype": config.optimizer.moment_dtype,
            "remat": config.remat,
        },
        "parameters": report.state._asdict(),
        "memory": {
            "limit": report.limit,
            "bytes": report.bytes,
            "parts": [figure._asdict() for figure in report.memory],
        },
        "flop": {
            "source": "counted",
            "needed": model_flop(config) * (config.batch_size or 0),
            "computed": computed_flop(config) * (config.batch_size or 0),
            "parts": [
                {
                    "name": part.name,
                    "kind": part.kind,
                    "total": part.total * (config.batch_size or 0),
                }
                for part in step_work(config)
            ],
            "compiled_products_of_a_device": compiled.work.dot_flop if compiled else None,
            "counted_products_of_a_device": counted_products(config),
        },
        "traffic": [
            {
                **one._asdict(),
                "axes": list(one.axes),
                "seconds": seconds(one, rates),
                "source": report.traffic_source,
            }
            for one in report.traffic
        ],
        "time": {"source": "assumed", **report.estimate._asdict()},
        "rates": to_dict(rates),
        "recipe": [
            {
                "stage": part.stage.value,
                "tokens": part.tokens,
                "source": "assumed",
                "mesh": mesh_sizes(part.mesh),
                "compiled": part.compiled,
                "problem": part.problem,
                "time": part.estimate._asdict() if part.estimate else None,
            }
            for part in report.recipe
        ],
        "candidates": [
            {
                "mesh": mesh_sizes(one.config.mesh),
                "bytes": one.bytes,
                "fits": one.fits,
                "step_seconds": one.estimate.step,
                "compiled_bytes": report.tried.get(one.config.mesh),
                "source": "counted",
            }
            for one in report.candidates
        ],
        "enough_devices": report.enough,
        "compile_seconds": compiled.seconds if compiled else None,
        "implementations": compiled.implementations if compiled else {},
        "notes": report.notes,
    }
