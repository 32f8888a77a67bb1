import sys, time, functools, numpy as np, jax, jax.numpy as jnp
from benchmarks import sparse_attention as b, timing
from pallas_kernels.sparse_attention import forward_sm90 as f, backward_sm90 as bw, reference
t0=time.time()
def say(*a): print(f"[{time.time()-t0:.0f}]",*a,flush=True)
sizes=[int(x) for x in sys.argv[1].split(',')]
reps=int(sys.argv[2]) if len(sys.argv)>2 else 5
rng=np.random.default_rng()
def grads(T,S,K,N,ws=2**34,again=0,B=1):
    q=jnp.asarray(rng.standard_normal((B,T,N,576),np.float32),jnp.bfloat16); kv=jnp.asarray(rng.standard_normal((B,S,576),np.float32),jnp.bfloat16)
    rows=np.concatenate([b.selections(rng,T,S,K,"random") for _ in range(B)])
    cnt=rng.integers(0,K+1,(B,T)); cnt[:,:4]=[0,1,64,K]
    rows=np.where(np.arange(K)<cnt[...,None],rows,-1); rows[0,3,7]=S; rows[0,3,9]=-5
    rows=jnp.asarray(rows)
    w=(q.astype(jnp.float32),kv.astype(jnp.float32))
    out,lse=reference.forward(*w,rows,value_width=512,scale=b.SCALE,workspace_bytes=2**31)
    dout=jnp.asarray(rng.standard_normal((B,T,N,512),np.float32),jnp.bfloat16); dlse=jnp.asarray(rng.standard_normal((B,T,N),np.float32))
    want=reference.backward(*w,rows,out,lse,dout.astype(jnp.float32),dlse,scale=b.SCALE,workspace_bytes=2**31)
    run=lambda: bw.backward(q,kv,rows,out.astype(jnp.bfloat16),lse,dout,dlse,scale=b.SCALE,workspace_bytes=ws)
    got=run()
    e=[float(jnp.linalg.norm(g.astype(jnp.float32)-w)/jnp.linalg.norm(w)) for g,w in zip(got,want)]
    m=[float(jnp.abs(g.astype(jnp.float32)-w).max()/jnp.abs(w).max()) for g,w in zip(got,want)]
    same=all(all(bool((x==y).all()) for x,y in zip(run(),got)) for _ in range(again))
    say("check",(B,T,S,K,N),"rel",["%.2e"%x for x in e],"max",["%.2e"%x for x in m],"same",same)
rates=None
for S in sizes:
    q=jnp.asarray(rng.standard_normal((1,256,b.N,576),np.float32),jnp.bfloat16); q=jnp.concatenate([q]*16,1); kv=jnp.asarray(rng.standard_normal((1,S,576),np.float32),jnp.bfloat16)
    rows=b.selections(rng,256,S,b.K,"random"); rows=jnp.asarray(np.concatenate([np.sort((rows+rng.integers(S))%S,-1) for _ in range(16)],1).astype(np.int32))
    out,lse=f.forward(q,kv,rows,value_width=512,scale=b.SCALE)
    dout=jnp.asarray(rng.standard_normal(out.shape[:1]+(256,)+out.shape[2:],np.float32),jnp.bfloat16); dout=jnp.concatenate([dout]*16,1)
    dlse=jnp.zeros_like(lse)
    say('inputs')
    for ws in [int(x) for x in sys.argv[3].split(',')]:
        t=timing.device_time(functools.partial(bw.backward,scale=b.SCALE,workspace_bytes=ws),q,kv,rows,out,lse,dout,dlse,repeats=reps)
        say(S,ws,f"{t.median_ms:.3f} ms {t.tflops(2*4096*2048*128*2752):.0f} TFLOP/s", {k[:28]:round(v,3) for k,v in sorted(t.kernels.items(),key=lambda x:-x[1])[:14]})
for args in ((64,8192,2048,128,2**25,20),(48,900,320,64,2**34,2,2),(16,900,256,256)):
    try: grads(*args)
    except Exception as e: say(args,"FAILED",str(e)[:300])
