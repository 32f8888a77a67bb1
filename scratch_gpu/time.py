from benchmarks import sparse_attention as b
b.measure()
