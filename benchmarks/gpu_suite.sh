#!/usr/bin/env bash
# In under nine minutes the tests that need a GPU, then throughput beside the peers that are installed.
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
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
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
timeout 110 python benchmarks/logits_throughput.py --out "$out" 2>&1 | tee "$out/logits_throughput.log"
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
if [ ! -f benchmarks/.cache/hidden_states.pt ]; then
    echo "benchmarks/.cache/hidden_states.pt is missing: run 'make hidden-states' where the model is" | tee -a "$out/tests.log"
    exit 2
fi
# First what matters most; what no longer fits in the time is not measured, and its rows are not there.
for entropy in 1.2 0.5 2.6; do
    timeout 75 python benchmarks/linear_throughput.py --device cuda --entropies "$entropy" --repetitions 5 --out "$out" \
        2>&1 | tee -a "$out/linear_throughput.log"
    # 124: out of time, as announced.
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || [ "$code" -eq 124 ] || status=1
done
exit "$status"
