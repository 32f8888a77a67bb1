import sys, numpy as np, jax, jax.numpy as jnp
from benchmarks import sparse_attention as b
from pallas_kernels.sparse_attention import forward_sm90 as f
T=1056; rng=np.random.default_rng(0); s=8192
f.TUNE.update({k.split('=')[0]:(k.split('=')+['1'])[1] for k in sys.argv[1].split('+') if k!='base'})
q=jnp.asarray(rng.standard_normal((1,T,128,576),np.float32),jnp.bfloat16); kv=jnp.asarray(rng.standard_normal((1,s,576),np.float32),jnp.bfloat16)
rows=jnp.asarray(b.selections(rng,T,s,b.K,"random"))
jax.block_until_ready(f.forward(q,kv,rows,value_width=512,scale=b.SCALE))
