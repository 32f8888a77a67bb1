"""The memory a conversion needs does not grow with the checkpoint: a small `benchmarks.convert`."""

import json
import subprocess
import sys
from pathlib import Path

import convert
from benchmarks.convert import differences, largest_leaf, write_source
from dsa_jax import presets

ROOT = Path(convert.__file__).parents[1]
CONFIG = presets.get("deepseek-v3.2-exp").replace(
    vocab_size=512,
    hidden_size=1024,
    intermediate_size=1024,
    moe_intermediate_size=512,
    n_routed_experts=32,
    num_attention_heads=8,
    q_lora_rank=256,
    index_n_heads=4,
    num_hidden_layers=9,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
)
# What is held together besides a leaf, far below its usual size.
CHILD = """
import json, sys
from benchmarks.convert import peak_bytes
from convert.__main__ import _on_the_cpu
_on_the_cpu()
import convert
from convert import ours, weights
from dsa_jax import presets, store

ours._GROUP_BYTES = ours._PIECE_BYTES = 2**22
weights._STRIPE = 2**20
store._WRITE_BYTES = 2**24
source, warm, folder = sys.argv[1:]
convert.hf_to_orbax(warm, f"{folder}/warm")  # libraries, threads, compiled programs
convert.orbax_to_hf(f"{folder}/warm", f"{folder}/warm-hf")
before = peak_bytes()
convert.hf_to_orbax(source, f"{folder}/ours")
between = peak_bytes()
convert.orbax_to_hf(f"{folder}/ours", f"{folder}/back")
print(json.dumps([between - before, peak_bytes() - between]))
"""


def test_memory_is_bounded_by_a_leaf(tmp_path):
    write_source(tmp_path / "source", CONFIG)
    write_source(tmp_path / "warm-source", CONFIG.replace(num_hidden_layers=2))
    total = sum(path.stat().st_size for path in (tmp_path / "source").iterdir())
    leaf = largest_leaf(CONFIG)
    assert total > 20 * leaf
    out = subprocess.run(
        [sys.executable, "-c", CHILD, *(str(tmp_path / n) for n in ("source", "warm-source")),
         str(tmp_path)],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    there, back = json.loads(out.splitlines()[-1])
    # The leaf, and what Orbax and the allocators keep (60 MB was seen); the whole is 420 MB.
    assert there < leaf + 100 * 2**20
    assert back < leaf + 100 * 2**20
    differences(tmp_path / "source", tmp_path / "back")
