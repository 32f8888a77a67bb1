import time; t0=time.time()
import jax, jax.numpy as jnp, functools
def say(*a): print(round(time.time()-t0,1), *a, flush=True)
say('import')
from benchmarks import indexer_loss as b
from pallas_kernels.indexer_loss import dense_sm90, reference
*a, r, g = b.inputs(1024, 16); jax.block_until_ready(a); say('inputs')
kl,gr = dense_sm90.run(*a, r, g, scale=b.SCALE, workspace_bytes=2**23); jax.block_until_ready(gr); say('run', float(kl.mean()))
w=[x.astype(jnp.float32) for x in a]
o=dict(scale=b.SCALE, workspace_bytes=2**30)
kl2=reference.dense_forward(*w,r,**o); g2=reference.dense_backward(*w,r,g,**o); jax.block_until_ready(g2); say('ref')
say(float(jnp.abs(kl-kl2).max()), [b._error(x,y) for x,y in zip(gr,g2)])
