import sys, numpy as np, jax, jax.numpy as jnp
from benchmarks import sparse_attention as b
from pallas_kernels.sparse_attention import forward_sm90
T,N,S,K,ragged=map(int,sys.argv[1:6])
rng=np.random.default_rng()
q,kv=b.inputs(rng,T,N,S)
rows=b.selections(rng,T,S,K,"random")
if ragged:
    count=rng.integers(0,K+1,T); count[:4]=[0,1,64,K]
    rows=np.where(np.arange(K)<count[:,None],rows,-1)
rows=jnp.asarray(rows)
out,lse=forward_sm90.forward(q,kv,rows,value_width=512,scale=b.SCALE)
jax.block_until_ready(out)
print(sys.argv[1:], b.errors(q,kv,rows,out,lse) if len(sys.argv)<7 else "ran",flush=True)
