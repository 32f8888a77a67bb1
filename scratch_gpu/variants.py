import sys, time, numpy as np, jax, jax.numpy as jnp, traceback
from benchmarks import sparse_attention as b, timing
from pallas_kernels.sparse_attention import forward_sm90 as f
sizes=[int(x) for x in sys.argv[1].split(',')]
rng=np.random.default_rng(0)
data={}
for s in sizes:
    q,kv=b.inputs(rng,b.T,b.N,s); data[s]=(q,kv,jnp.asarray(b.selections(rng,b.T,s,b.K,"random")))
cq,ckv=b.inputs(rng,200,128,3000); crows=b.selections(rng,200,3000,448,"random")
cnt=rng.integers(0,449,200); cnt[:4]=[0,1,64,448]
crows=jnp.asarray(np.where(np.arange(448)<cnt[:,None],crows,-1))
from pallas_kernels.sparse_attention import reference
exp=reference.forward(cq.astype(jnp.float32),ckv.astype(jnp.float32),crows,value_width=512,scale=b.SCALE,workspace_bytes=2**31)
t0=time.time()
for v in sys.argv[2:]:
    try:
        f.TUNE.clear(); f.TUNE.update({k.split('=')[0]:(k.split('=')+['1'])[1] for k in v.split('+') if k!='base'})
        f.forward.clear_cache()
        def run(q,kv,rows): return f.forward(q,kv,rows,value_width=512,scale=b.SCALE)
        out,lse=run(cq,ckv,crows); fin=jnp.isfinite(exp[1]); e=dict(relative=float(jnp.linalg.norm(out.astype(jnp.float32)-exp[0])/jnp.linalg.norm(exp[0])),lse=float(jnp.max(jnp.where(fin,jnp.abs(lse-exp[1]),0))),empty_differ=int(jnp.sum(jnp.isfinite(lse)!=fin)))
        line=[]
        for s in sizes:
            t=timing.device_time(run,*data[s],repeats=10)
            line.append(f"{s}: {t.median_ms:.3f}ms {t.tflops(2*b.T*b.N*b.K*1088):.0f}")
        print(v, '|', *line, '|', f"rel {e['relative']:.2e} lse {e['lse']:.1e} empty {e['empty_differ']} t={time.time()-t0:.0f}", flush=True)
    except Exception as e:
        print(v,'FAILED',str(e)[:200],flush=True)
        if 'LAUNCH' in str(e): break
