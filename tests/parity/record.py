"""Records what transformers computes, for the tests that run without torch.

    python -m tests.parity.record

writes `tests/oracle/golden.npz`, from weights that anybody can draw again from their names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from convert.compare import observe_transformers, torch_modules
from tests.oracle.named_weights import configs, tokens_of
from tests.parity.random_models import build

GOLDEN = Path(__file__).parents[1] / "oracle" / "golden.npz"
LAST = 8  # positions whose logits are kept


def record(name: str) -> dict[str, np.ndarray]:
    """The last logits, the selected keys, the loss and the norms of its gradients."""
    torch, _ = torch_modules()
    config = configs()[name]
    model = build(config)
    tokens = tokens_of(config, 1)
    seen = observe_transformers(model, tokens)
    loss = model(torch.as_tensor(tokens), labels=torch.as_tensor(tokens)).loss
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    found = {
        "tokens": tokens.astype(np.int32),
        "logits": seen.logits[:, -LAST:],
        "loss": np.float32(loss.item()),
        "gradient_norm": np.float32(norm.item()),
    }
    if seen.selected is not None:
        found["selected"] = np.packbits(seen.selected, axis=-1)
    return {f"{name}/{key}": value for key, value in found.items()}


def record_all() -> dict[str, np.ndarray]:
    _, transformers = torch_modules()
    found = {"transformers": np.array(transformers.__version__)}
    for name in configs():
        found |= record(name)
    return found


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **record_all())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
