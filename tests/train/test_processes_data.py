"""Four processes: each reads its rows of every batch and no others, and all stop together."""

import json

import numpy as np
from small_runs import token_file

from tests.processes import run_group
from train import data
from train.config import DataConfig
from train.sources import open_corpus

WORKER = """
import json, sys
import jax
import numpy as np

rank, port, tokens = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 4, rank)

from pathlib import Path
from jax.sharding import NamedSharding
from dsa_jax.sharding import MeshConfig, batch_spec, make_mesh
from train import cluster, data
from train.config import DataConfig
from train.sources import open_corpus

read = []
whole = data.Rows.__getitem__
data.Rows.__getitem__ = lambda self, index: read.append(int(index)) or whole(self, index)

config = DataConfig(sources=(tokens,), document_end=1, threads=1, prefetch=1)
corpus = open_corpus(config, 96, Path(tokens).parent)
sharding = NamedSharding(make_mesh(MeshConfig(data=2, fsdp=4)), batch_spec())
part = data.process_rows(sharding, (8, 16))
stream = data.batches(corpus, config, length=16, batch_size=8, seed=3, first_row=8, part=part)
local = [next(stream) for _ in range(3)]
placed = [data.place(batch, sharding, 8)["tokens"] for batch in local]
held = [shard.data.tolist() for shard in placed[0].addressable_shards]
read_by_rows = list(read)

# Sequences cut over processes: two of them hold parts of the same rows.
cut = NamedSharding(make_mesh(MeshConfig(fsdp=2, context=4)), batch_spec())
part = data.process_rows(cut, (8, 16))
stream = data.batches(corpus, config, length=16, batch_size=8, seed=3, first_row=8, part=part)
pieces = [
    [[s.start or 0 for s in shard.index], shard.data.tolist()]
    for shard in data.place(next(stream), cut, 8)["tokens"].addressable_shards
]

said = []
try:
    with cluster.together():
        if rank == 2:
            raise OSError("no such disk")
except cluster.AgreedError as error:
    said.append(str(error))
try:
    cluster.require_same("data", {"a": 1, "b" * 3000: "x" * (rank // 3)})
except cluster.AgreedError as error:
    said.append(str(error))
cluster.require_same("data", {"a": 1})
with cluster.together():
    pass
tokens = [batch["tokens"].tolist() for batch in local]
print(json.dumps({"tokens": tokens, "read": read_by_rows, "held": held, "said": said}
                 | {"part": [part.start, part.stop], "pieces": pieces}))
"""


def test_four_processes_read_the_batches_of_one(tmp_path):
    tokens = token_file(tmp_path)
    config = DataConfig(sources=(str(tokens),), document_end=1)
    corpus = open_corpus(config, 96, tmp_path)
    shape = {"length": 16, "batch_size": 8, "seed": 3}
    stream = data.batches(corpus, config, first_row=8, **shape)  # as a resume after one step
    wanted = [next(stream)["tokens"] for _ in range(3)]

    outputs = run_group(WORKER, tokens, processes=4, seconds=120)
    found = [json.loads(out.splitlines()[-1]) for out in outputs]

    for step in range(3):
        joined = np.concatenate([f["tokens"][step] for f in found])
        assert (joined == wanted[step]).all()
    held = np.concatenate([np.concatenate(f["held"]) for f in found])
    assert (held == wanted[0]).all()
    read = [set(f["read"]) for f in found]
    assert sum(len(rows) for rows in read) == len(set().union(*read))  # no row in two processes
    assert all(6 <= len(rows) <= 2 * 8 for rows in read)  # three batches and what is read ahead
    assert [f["part"] for f in found] == [[0, 4], [0, 4], [4, 8], [4, 8]]
    for (row, column), piece in (pair for f in found for pair in f["pieces"]):
        assert (piece == wanted[0][row : row + 4, column : column + 4]).all()
    assert len({tuple(at) for f in found for at, _ in f["pieces"]}) == 8
    for f in found:
        assert f["said"][0] == "process 2 cannot start: no such disk"
        assert f["said"][1].startswith("process 3 has other data than process 0: bbb")
        assert "is x there and  in process 0" in f["said"][1]
