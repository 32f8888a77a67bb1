"""Two processes, as on two hosts: each reads its devices' part, and both write one checkpoint."""

import jax.numpy as jnp
import numpy as np
from small_models import filled

from dsa_jax import checkpoint, presets, store
from dsa_jax.layer_tree import flatten
from tests.processes import run_pair

WORKER = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

rank, port, source, target = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, rank)

from dsa_jax import checkpoint
from dsa_jax.sharding import MeshConfig, make_mesh

def bytes_read():
    name = "/tensorstore/kvstore/file/bytes_read"
    found = tensorstore.experimental_collect_matching_metrics(name)
    return sum(metric["values"][0]["value"] for metric in found)

before = bytes_read()
model = checkpoint.load(source, make_mesh(MeshConfig(fsdp=4)), dtype=jnp.float32)
print("read", bytes_read() - before)
for leaf in jax.tree.leaves(model):
    assert len(leaf.addressable_shards) == 2
checkpoint.save(model, target)
try:
    checkpoint.save(model, target)
except FileExistsError:
    print("refused")
"""


def test_two_processes_read_their_parts_and_write_one_checkpoint(tmp_path, monkeypatch):
    model = filled(presets.get("tiny").replace(vocab_size=2048, hidden_size=512))
    # Chunks far below the leaves, as they are for leaves of many GB.
    monkeypatch.setattr(store, "_CHUNK_BYTES", 2**16)
    checkpoint.save(model, tmp_path / "source")
    stored = sum(f.stat().st_size for f in (tmp_path / "source").rglob("*") if f.is_file())

    outputs = run_pair(WORKER, tmp_path / "source", tmp_path / "target", seconds=240)

    for out in outputs:
        read = int(out.split("read ")[1].split()[0])
        # Half, and what every process needs: norms, the list of leaves, the chunks' index.
        assert read < 0.6 * stored, (read, stored)
        assert "refused" in out

    again = flatten(checkpoint.load(tmp_path / "target", dtype=jnp.float32))
    for name, leaf in flatten(model).items():
        np.testing.assert_array_equal(again[name], leaf, err_msg=str(name))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}
