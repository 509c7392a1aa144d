#!/usr/bin/env bash
# In under nine minutes the tests that need a GPU, then the runner beside the peers that are installed.
# Numbers go to the folder given. Needs torch with CUDA, triton, pytest and hypothesis; runs from a
# checkout, without installing the package.
#
#   benchmarks/gpu_suite.sh OUT
#
# benchmarks/.cache (real hidden states, 58 MB, made by `make hidden-states`) must be there.
set -uo pipefail
out=${1:?usage: benchmarks/gpu_suite.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python - <<'PY' || exit 2
import torch
if not torch.cuda.is_available():
    raise SystemExit("gpu_suite.sh: torch sees no CUDA device; nothing was run")
print(torch.cuda.get_device_name(), torch.__version__)
PY
# addopts: pytest's plugins for CI need not be installed where the GPU is.
timeout 200 python -m pytest -o addopts="-q --strict-markers" -p no:cacheprovider tests/test_triton.py tests/test_triton_linear.py tests/test_gpu.py tests/test_gpu_linear.py \
    2>&1 | tee "$out/tests.log"
tests=${PIPESTATUS[0]}
if [ "$tests" -ne 0 ]; then
    echo "tests are red (status $tests): no benchmark is run" | tee -a "$out/tests.log"
    exit "$tests"
fi
status=0
# Seconds, then the words that a job's name must have. SIGTERM keeps what was measured; a process that does
# not answer to it, inside a kernel, goes five seconds later.
bench() {
    local seconds=$1
    shift
    timeout --kill-after=5 "$seconds" python -m benchmarks --suite gpu --out "$out" --filter "$@" \
        2>&1 | tee -a "$out/benchmarks.log"
    local code=${PIPESTATUS[0]}
    # 124: out of time, as announced.
    [ "$code" -eq 0 ] || [ "$code" -eq 124 ] || [ "$code" -eq 137 ] || status=1
}
# First what matters most; what no longer fits in the time is not measured, and its rows are not there.
bench 55 throughput logits
if [ ! -f benchmarks/.cache/hidden_states.pt ]; then
    echo "benchmarks/.cache/hidden_states.pt is missing: run 'make hidden-states' where the model is" | tee -a "$out/benchmarks.log"
    exit 2
fi
bench 70 throughput linear "1.2 nats"
bench 35 throughput linear "0.5 nats"
bench 25 throughput linear "2.6 nats"
bench 30 accuracy "T 1.0"
bench 30 scaling
bench 35 end_to_end
# Memory stands beside the times (peak_bytes); the suite `memory` and the rest of each of these have no limit
# when run by hand: python -m benchmarks --suite gpu --out OUT
exit "$status"
