import functools, json, os, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from benchmarks import indexer_loss as b
from benchmarks import sparse_attention as a
from benchmarks import timing
from pallas_kernels.indexer_loss import sparse_sm90
if "CACHED" in os.environ:
    sparse_sm90.in_cache = lambda size: os.environ["CACHED"] == "1"
keys = int(sys.argv[1]); name = sys.argv[2]
if sys.argv[3:] == ["lower"]:
    a.T = 256
t0 = time.time()
x = b._selected_inputs(keys)
fn = jax.jit(functools.partial(b._sparse_loss, implementation="mosaic"))
if sys.argv[3:] == ["lower"]:
    print(len(fn.trace(x).lower(lowering_platforms=("cuda",)).as_text())); sys.exit()
run = fn.lower(x).compile()
print(name, "compiled", round(time.time() - t0, 1), flush=True)
timing.wait_for(Path(os.environ.get("LOCK", "/tmp/gpu.lock")))
kl, gradient = run(x)
t = timing.device_time(run, x, repeats=4)
print(name, keys, "ms", round(t.median_ms, 3), json.dumps({n: round(v, 3) for n, v in t.kernels.items() if v > 0.008}), flush=True)
equal = timing.equal_runs(lambda: run(x), (kl, gradient))
print(name, "equal", equal, "finite", [bool(jnp.isfinite(g).all()) for g in gradient], flush=True)
out = os.environ.get("OUT")
if out and keys == 32768:
    np.save(f"{out}/{name}.npy", np.asarray(gradient[1], np.float32)[0, ::64].astype(np.float16) if False else np.asarray(gradient[1].astype(jnp.float32))[0, ::64])
print(name, "matmul", timing.matmul_rates() if os.environ.get("RATES") else "", flush=True)
