for a in "100 64 3000 448 0" "200 128 3000 448 0" "200 64 3000 448 0" "100 128 3000 448 1"; do timeout 25 python3 scratch_gpu/case.py $a 2>&1 | grep -v "^external\|^===\|^E11\|^$\|^  File\|jaxlib" | cut -c1-300 | tail -3; done
timeout 40 compute-sanitizer --tool memcheck python3 scratch_gpu/case.py 140 64 3000 448 0 x 2>&1 | grep "=====\|ran" | head -25
timeout 40 python3 scratch_gpu/time.py 2>&1 | tail -4 | cut -c1-300
