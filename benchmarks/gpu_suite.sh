#!/usr/bin/env bash
# In under nine minutes the tests that need a GPU, then the runner beside the peers that are installed.
# Numbers go to the folder given. Needs torch with CUDA, triton, pytest and hypothesis; runs from a
# checkout, without installing the package.
#
#   benchmarks/gpu_suite.sh OUT
#
# benchmarks/.cache (real hidden states, 58 MB, made by `make hidden-states`) must be there.
#
# At worst, in seconds, with what `timeout` waits before it kills: the check of the device 40 + 5 (a cold disk),
# tests 120 + 5, the end of what compiles beside them 5, benchmarks 50, 85, 20, 20, 30, 40 and 55, each + 5;
# 510 in all.
#
# Most of a first run is Triton's compiler, a core for each kernel. So the tests run in several processes where
# pytest-xdist is there, and beside them the benchmarks' kernels are compiled, which they then find in Triton's
# cache.
#
# After a red test the benchmarks run all the same: their rows and tables name it.
#
# Exit status: 1 if a test or one of ours is red, or a part failed; 2 if something needed is missing; 124
# if nothing was red but the tests had no time to end. Whatever happens in one part, the others run.
#
# GPU_SUITE_TESTS are options for pytest, GPU_SUITE_BENCHMARKS for the runner, for a rehearsal at small sizes.
set -uo pipefail
out=${1:?usage: benchmarks/gpu_suite.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
timeout --kill-after=5 40 python - <<'PY' || exit 2
import torch
if not torch.cuda.is_available():
    raise SystemExit("gpu_suite.sh: torch sees no CUDA device; nothing was run")
print(torch.cuda.get_device_name(), torch.__version__)
PY

read -ra test_options <<<"${GPU_SUITE_TESTS:-}"
read -ra bench_options <<<"${GPU_SUITE_BENCHMARKS:-}"
if python -c "import xdist" 2>/dev/null; then
    cores=$(nproc)
    test_options+=(--numprocesses $((cores > 8 ? 8 : cores)))
else
    echo "pytest-xdist is missing: the tests compile one kernel at a time and may run out of time" | tee -a "$out/tests.log"
fi

# The benchmarks' kernels at their real shapes; what is measured beside the tests is thrown away.
warm=$(mktemp -d)
warming=()
for words in "throughput logits" "throughput linear 1.2" "end_to_end"; do
    # shellcheck disable=SC2086 # words of a filter
    timeout --kill-after=5 110 python -m benchmarks --suite gpu --out "$warm" --repetitions 1 --minutes 1.5 \
        --providers topr "${bench_options[@]}" --filter $words >"$warm/${words// /-}.log" 2>&1 &
    warming+=($!)
done

status=0 red_tests=
# Seconds, then test files. Out of time (124; 137 where it had to be killed) is not red, unless a test had
# failed by then: -v prints each result as it comes.
tests() {
    local seconds=$1
    shift
    # addopts: pytest's plugins for CI need not be installed where the GPU is.
    timeout --kill-after=5 "$seconds" python -m pytest -o addopts="-v --strict-markers" -p no:cacheprovider \
        "${test_options[@]}" "$@" >"$out/part.log" 2>&1
    local code=$?
    cat "$out/part.log" | tee -a "$out/tests.log"
    # "a.py::test_b FAILED [ 5%]", or "[gw0] [ 5%] FAILED a.py::test_b" of pytest-xdist.
    red_tests=$(grep -E "(^| )(FAILED|ERROR)( |$)" "$out/part.log" | grep -oE "[a-z_]+\.py::[^ ]+" | sort -u |
        awk 'NR <= 5 { printf("%s%s", (NR > 1 ? ", " : ""), $0) } END { if (NR > 5) printf(" and %d more", NR - 5) }')
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        echo "out of time after $seconds s, not all ran: $*" | tee -a "$out/tests.log"
        status=124
    elif [ "$code" -ne 0 ]; then
        echo "red (status $code): $*" | tee -a "$out/tests.log"
        red_tests=${red_tests:-pytest itself (status $code)}
    fi
    rm -f "$out/part.log"
    [ -z "$red_tests" ] || status=1
}
tests 120 tests/core/test_gpu.py tests/core/test_gpu_linear.py tests/core/test_triton.py tests/core/test_triton_linear.py
kill "${warming[@]}" 2>/dev/null
{ wait "${warming[@]}"; } 2>/dev/null
rm -rf "$warm"
[ -z "$red_tests" ] || bench_options+=(--red-tests "$red_tests")

# Seconds, then options of the runner. It has 10 s less for its jobs, for python starts in that time; every
# job has its share of them, and what found no time is a row. SIGTERM keeps what was measured; a process that
# does not answer to it, inside a kernel, goes five seconds later. Each part is a process of its own, because
# an error of a kernel is the end of all CUDA calls of its process.
bench() {
    local seconds=$1
    shift
    timeout --kill-after=5 "$seconds" python -m benchmarks --suite gpu --out "$out" \
        --minutes "$(awk "BEGIN { print ($seconds - 10) / 60 }")" "${bench_options[@]}" "$@" 2>&1 | tee -a "$out/benchmarks.log"
    local code=${PIPESTATUS[0]}
    # 124: out of time, as announced; 130: the same, after what was measured had been written.
    case $code in
        0 | 124 | 130 | 137) ;;
        *) status=1 ;;
    esac
}
# First what matters most.
bench 50 --filter throughput logits
if [ -f benchmarks/.cache/hidden_states.pt ]; then
    bench 85 --filter throughput linear "1.2 nats 8192x4096x128256"
    # Times depend on the values in ours alone, so at other entropies the peers need not run again.
    bench 20 --filter throughput linear "0.5 nats 8192x4096x128256" --providers topr "torch eager"
    bench 20 --filter throughput linear "2.6 nats 8192x4096x128256" --providers topr "torch eager"
    bench 30 --filter accuracy "T 1.0"
    bench 40 --filter scaling --providers "topr exact" "topr tau" "torch eager" "Liger selective"
else
    echo "benchmarks/.cache/hidden_states.pt is missing: run 'make hidden-states' where the model is" | tee -a "$out/benchmarks.log"
    [ "$status" -eq 1 ] || status=2
fi
bench 55 --filter end_to_end
# Memory stands beside the times (peak_bytes). The other shapes, the suite `memory` and every part without a
# limit of time by hand: python -m benchmarks --suite gpu --out OUT
exit "$status"
