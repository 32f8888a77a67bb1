"""Made-up results in the form the demo writes, for tests of claims, figures and report."""

import json

import numpy as np

from train.ladder import LADDER

LAYERS, LENGTH, LONG, TOPK = 3, 128, 256, 8
EDGES = (8, 32, 64, 96, 128, 192, 256)
LOSSES = {
    "dense": 2.17, "untrained": 5.13, "random": 5.02, "recent": 2.86, "oracle": 2.31,
    "warmed": 2.32, "warmed_all": 2.17, "sparse": 2.21, "sparse_oracle": 2.20, "sparse_all": 2.19,
    "control": 2.16,
}  # fmt: skip
KL = {"dense": 1.9, "untrained": 1.9, "warmed": 0.08, "warmed_all": 0.07}
RECALL = {"untrained": 0.13, "random": 0.12, "recent": 0.62, "warmed": 0.81}


def rung(name, shift):
    recall = RECALL.get(name, 0.82)

    def layers(x):
        return [x + 0.01 * layer + shift for layer in range(LAYERS)]

    per_layer = {
        "mass_recall": layers(recall),
        "oracle_mass": layers(0.84),
        "overlap": layers(recall),
        "kl": layers(KL.get(name, 0.1)),
        "entropy_fraction": layers(0.95 if name == "untrained" else 0.6),
        "selected_local": layers(0.4),
        "oracle_local": layers(0.42),
    }
    out = {key: float(np.mean(values)) for key, values in per_layer.items()}
    loss = LOSSES[name] + shift
    buckets = np.linspace(recall + 0.1, recall - 0.05, len(EDGES) - 1)
    return out | {
        "cross_entropy": loss,
        "quoted_loss": 2 * loss - 2,
        "text_loss": 2.0,
        "topk": TOPK,
        "layers": per_layer,
        "edges": list(EDGES),
        "mass_recall/buckets": [(buckets - 0.02 * layer).tolist() for layer in range(LAYERS)],
        "oracle_mass/buckets": [np.linspace(0.95, 0.8, len(EDGES) - 1).tolist()] * LAYERS,
        "overlap/buckets": [buckets.tolist()] * LAYERS,
        "gap_to_dense": [loss - LOSSES["dense"] - shift, 0.01],
        "gap_to_control": [loss - LOSSES["control"] - shift, 0.01],
    }


ACCURACY = {
    "dense": 0.98, "untrained": 0.02, "random": 0.01, "recent": 0.08, "oracle": 0.97,
    "warmed": 0.95, "sparse": 0.97, "control": 0.98,
}  # fmt: skip


def needles():
    """Answers to a grid of two lengths and three depths."""
    accuracy = {rung: [[share + 0.01, share, share - 0.01]] * 2 for rung, share in ACCURACY.items()}
    documents = {
        rung: [[share + 0.02, share - 0.02, share, share]] * 2 for rung, share in ACCURACY.items()
    }
    return {"lengths": [LENGTH, LONG], "depths": [0.1, 0.5, 0.9], "count": 4, "batch": 1,
            "accuracy": accuracy, "documents": documents}  # fmt: skip


def run(seed):
    shift = 0.004 * seed
    ladder = {r.name: rung(r.name, shift) for r in LADDER}
    return {
        "seed": seed,
        "ladder": ladder,
        "long_ladder": ladder,
        "sweep": {
            str(k): {
                name: LOSSES[name] + shift + 0.3 * (8 / k - 1) / 4
                for name in ("recent", "oracle", "warmed", "sparse")
            }
            for k in (4, 8, 16, 32)
        },
        "checks": {"changed_frozen_arrays": 0, "all_keys_difference": 3e-6,
                   "all_keys_differing_rows": 0.0},
        "stages": {
            name: {
                "steps": steps, "tokens": steps * 2048, "seconds": 12.0, "rates": "1e-3",
                "checkpoint": f"seed-{seed}/{name}/checkpoints",
                "metrics": f"seed-{seed}/{name}/metrics.jsonl",
            }
            for name, steps in (("dense", 200), ("warmup", 60), ("sparse", 60), ("control", 60))
        },
    }  # fmt: skip


def results(seeds=1):
    shape = {"heads": 16, "topk": 512}
    points = [128 * 2**n for n in range(8)]
    return {
        "topk": TOPK, "length": LENGTH, "long_length": LONG, "seconds": 321.0,
        "laps": {"text": 1.0, "dense": 300.0},
        "command": "python -m train demo", "snapshot": "selection.npz", "snapshot_layer": 1,
        "model": {"layers": LAYERS, "description": "4 heads", "parameters": 600000,
                  "indexer_parameters": 40000},
        "corpus": {"license": "Public domain.", "train_bytes": 4000000, "held_out": ["Ruth"],
                   "held_out_bytes": 200000, "scored": 32768},
        "machine": {"device": "cpu", "cores": 2, "jax": "0.11.2", "date": "2026-01-01"},
        "cost": {"shape": shape, "measured": [
            {"position": x, "dense": 1e-6 * x, "indexer": 1e-7 * x,
             "sparse": 1.2e-6 * min(x, 512)} for x in points]},
        "sample": {"prompt": "In the [beginning]", "text": " was", "truth": " was the"},
        "runs": [run(seed) for seed in range(seeds)],
    }  # fmt: skip


def write_folder(folder, seeds=1, data=None):
    """A finished demo's folder: results, logs and the snapshot."""
    data = data or results(seeds)
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data))
    for one in data["runs"]:
        for name, stage in one["stages"].items():
            path = folder / stage["metrics"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                for step in range(1, stage["steps"] + 1):
                    decay = np.exp(-step / 30)
                    noise = rng.normal(0, 0.05)
                    record = {"kind": "train", "stage": name, "step": step,
                              "lm_loss": 2.2 + 3 * decay + noise}  # fmt: skip
                    if name in ("warmup", "sparse"):
                        layers = (0.1 + 1.8 * decay) * np.arange(1, LAYERS + 1)
                        record["kl_layers"] = (layers * np.exp(noise)).tolist()
                    file.write(json.dumps(record) + "\n")
    scores = rng.normal(size=(LAYERS, LENGTH, LENGTH)) * 2
    scores += -0.1 * np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)))
    seen = np.tril(np.ones((LENGTH, LENGTH), bool))
    p = np.where(seen, np.exp(scores), 0)
    p /= p.sum(-1, keepdims=True)
    rank = (-p).argsort(-1).argsort(-1)
    np.savez(folder / data["snapshot"], target=p, chosen=(rank < TOPK) & seen,
             oracle=(rank < TOPK) & seen, tokens=np.zeros(LENGTH, int))  # fmt: skip
    return folder
