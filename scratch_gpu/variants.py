import sys, time, numpy as np, jax, jax.numpy as jnp, faulthandler
from benchmarks import sparse_attention as b, timing
from pallas_kernels.sparse_attention import forward_sm90 as f
t0=time.time()
def say(*a): print(f"[{time.time()-t0:.0f}]",*a,flush=True)
sizes=[int(x) for x in sys.argv[1].split(',')]
rng=np.random.default_rng(0)
def exact(q,kv,rows):
    q,kv,rows=np.asarray(q,np.float32)[0],np.asarray(kv,np.float32)[0],np.asarray(rows)[0]
    outs,lses=[],[]
    for t in range(len(q)):
        r=rows[t][(rows[t]>=0)&(rows[t]<len(kv))]
        s=q[t]@kv[r].T*b.SCALE
        if not len(r): outs.append(np.zeros((q.shape[1],512),np.float32)); lses.append(np.full(q.shape[1],-np.inf)); continue
        m=s.max(1,keepdims=True); p=np.exp(s-m); l=p.sum(1,keepdims=True)
        outs.append(p/l@kv[r,:512]); lses.append((m+np.log(l))[:,0])
    return np.stack(outs),np.stack(lses)
T=200
cq,ckv=b.inputs(rng,T,128,3000); crows=b.selections(rng,T,3000,448,"random")
cnt=rng.integers(0,449,T); cnt[:4]=[0,1,64,448]
crows=np.where(np.arange(448)<cnt[:,None],crows,-1); crows[0,7,3]=3000; crows[0,8,0]=-5
crows=jnp.asarray(crows)
eo,el=exact(cq,ckv,crows); fin=np.isfinite(el)
say("exact")
data={}
for s in sizes:
    q=jnp.asarray(rng.standard_normal((1,256,b.N,576),np.float32),jnp.bfloat16); q=jnp.concatenate([q]*16,1); kv=jnp.asarray(rng.standard_normal((1,s,576),np.float32),jnp.bfloat16)
    rows=b.selections(rng,256,s,b.K,"random"); rows=np.concatenate([np.sort((rows+rng.integers(s))%s,-1) for _ in range(16)],1).astype(np.int32)
    data[s]=(q,kv,jnp.asarray(rows))
say("data")
for v in sys.argv[2:]:
    try:
        f.TUNE.clear(); f.TUNE.update({k.split('=')[0]:(k.split('=')+['1'])[1] for k in v.split('+') if k!='base'})
        f.forward.clear_cache()
        def run(q,kv,rows): return f.forward(q,kv,rows,value_width=512,scale=b.SCALE)
        out,lse=(np.asarray(x[0],np.float32) for x in run(cq,ckv,crows))
        rel=np.linalg.norm(out-eo)/np.linalg.norm(eo); le=np.abs(np.where(fin,lse,0)-np.where(fin,el,0)).max()
        say(v, f"rel {rel:.2e} abs {np.abs(out-eo).max():.1e} lse {le:.1e} empty {(np.isfinite(lse)!=fin).sum()}")
        line=[]
        for s in sizes:
            t=timing.device_time(run,*data[s],repeats=10)
            line.append(f"{s}: {t.median_ms:.3f}ms {t.tflops(2*b.T*b.N*b.K*1088):.0f}")
        say(v, '|', *line)
    except Exception as e:
        say(v,'FAILED',str(e)[:200])
        if 'LAUNCH' in str(e): break
