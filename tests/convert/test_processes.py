"""Two processes, as on two hosts: each reads and writes its part, and the result is the same."""

from checkpoints import assert_same_bits, fp8_config, random_tensors, read_hf, write_hf

import convert
from tests.processes import run_pair

# Expert stacks are shared by expert, matrices by rows where those are whole tiles.
CONFIG = fp8_config(
    num_hidden_layers=2,
    intermediate_size=512,
    num_attention_heads=16,
    qk_nope_head_dim=96,
    qk_rope_head_dim=32,
    moe_intermediate_size=256,
)

WORKER = """
import sys
import jax

rank, port, source, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

from convert import hf_to_orbax, orbax_to_demo, orbax_to_hf, ours, safetensors
from convert.__main__ import main

together = ["--distributed", "--coordinator", f"localhost:{port}", "--num-processes", "2"]
together += ["--process-id", str(rank)]
assert main(["hf-to-orbax", source, f"{folder}/bf16", "--dtype", "bf16", *together]) == 0
assert jax.process_count() == 2

ours._PIECE_BYTES = 1000
read = written = 0
view, put = safetensors.SafetensorsFile.read, safetensors.SafetensorsWriter.write

def count_read(self, *arguments):
    global read
    found = view(self, *arguments)
    read += found.nbytes
    return found

def count_written(self, name, start, rows):
    global written
    written += rows.nbytes
    put(self, name, start, rows)

safetensors.SafetensorsFile.read = count_read
safetensors.SafetensorsWriter.write = count_written
hf_to_orbax(source, f"{folder}/ours")
orbax_to_hf(f"{folder}/ours", f"{folder}/hf", shard_bytes=200_000)
print("bytes", read, written)
orbax_to_demo(f"{folder}/ours", f"{folder}/demo", parallel=2)
try:
    hf_to_orbax(source, f"{folder}/ours")
except FileExistsError:
    print("refused")
"""


def test_each_process_does_its_part(tmp_path):
    content = random_tensors(CONFIG)
    source = write_hf(tmp_path / "source", CONFIG, content)
    outputs = run_pair(WORKER, source, tmp_path, seconds=300)

    total = sum(x.nbytes for x in content.values())
    shares = []
    for out in outputs:
        assert "refused" in out
        read, written = map(int, out.split("bytes ")[1].split("\n")[0].split())
        # Half, and what cannot be halved: norms, routers, ragged matrices, all of them small.
        assert read < 0.65 * total
        shares.append(written)
    assert sum(shares) == total
    assert max(shares) < 0.6 * total

    assert_same_bits(read_hf(tmp_path / "hf"), content)
    convert.demo_to_orbax(tmp_path / "demo", tmp_path / "from_demo")
    convert.orbax_to_hf(tmp_path / "from_demo", tmp_path / "from_demo_hf")
    extra = f"model.layers.{CONFIG.num_hidden_layers}."
    main = {name: x for name, x in content.items() if not name.startswith(extra)}
    assert_same_bits(read_hf(tmp_path / "from_demo_hf"), main)
    convert.hf_to_orbax(source, tmp_path / "alone", dtype="bf16")
    for name in ("bf16", "alone"):
        convert.orbax_to_hf(tmp_path / name, tmp_path / f"{name}_hf")
    assert_same_bits(read_hf(tmp_path / "bf16_hf"), read_hf(tmp_path / "alone_hf"))
    assert not list(tmp_path.glob("*.writing-*"))
