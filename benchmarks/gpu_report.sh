#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with an NVIDIA GPU.
#
#   benchmarks/gpu_report.sh [STAGE ...] [-- ARGUMENTS OF THE BENCHMARK]
#
# Stages, by default all, in this order:
#   build      the extension, from a clean copy of its sources
#   tests      the whole test suite
#   sanitize   a small case of each operation, alone and under compute-sanitizer's memcheck and
#              racecheck
#   bench      the measurement: times, and the peak memory of training steps
#
# A stage that fails does not keep the later ones from running; the exit status says whether one
# did. OUT gets the report, gpu-DEVICE.json and .md, cuda-training-memory.csv and .md, and
# stages.json and gpu_report.log. A later run
# with the same OUT, sources and device adds to them. Needs no network, but setuptools 77 or newer.
# Environment:
#   PYTHON      the python that has torch (python3)
#   OUT         folder of the results (benchmarks/results)
#   BUDGET      seconds after which the benchmark starts no new case (400)
#   SANITIZER   compute-sanitizer (that of PATH, else that of /usr/local/cuda)
#   BUILD_LIMIT, TESTS_LIMIT, SANITIZE_LIMIT, BENCH_LIMIT
#               seconds of a stage (300, 540, 540, 560); sanitize divides its own among its runs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAGES=(build tests sanitize bench)
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
BUDGET=${BUDGET:-400}
BUILD_LIMIT=${BUILD_LIMIT:-300}
TESTS_LIMIT=${TESTS_LIMIT:-540}
SANITIZE_LIMIT=${SANITIZE_LIMIT:-540}
BENCH_LIMIT=${BENCH_LIMIT:-560}
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
export PYTHONUNBUFFERED=1

wanted=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if ! printf '%s\n' "${STAGES[@]}" | grep -qxF -e "$1"; then
    echo "stage is '$1', expected some of: ${STAGES[*]}" >&2
    exit 2
  fi
  wanted+=("$1")
  shift
done
[ $# -eq 0 ] || shift
bench_arguments=("$@")
[ ${#wanted[@]} -gt 0 ] || wanted=("${STAGES[@]}")
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT

# limited SECONDS COMMAND...: ends it, and what it started, after so long.
limited() {
  timeout --kill-after=10 "$@"
}

now() {
  date +%s.%N
}

since() { # START
  awk -v start="$1" -v end="$(now)" 'BEGIN { printf "%.1f", end - start }'
}

print_machine() {
  nvidia-smi || echo "nvidia-smi: not found or no device"
  "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)" --version || echo "nvcc: not found"
  "$SANITIZER" --version || echo "compute-sanitizer: not found"
  limited 60 "$PYTHON" -m wsam_fused || echo "python -m wsam_fused: failed"
}

stage_build() {
  # In a copy: nothing of an earlier build is found, and what works stays until this has worked.
  clean=$(mktemp -d)
  trap 'rm -rf "$clean"' EXIT  # each stage is a shell of its own
  cp -R setup.py pyproject.toml MANIFEST.in README.md LICENSE csrc wsam_fused "$clean"
  rm -f "$clean"/wsam_fused/_*.so
  local start
  start=$(now)
  (cd "$clean" && limited "$BUILD_LIMIT" "$PYTHON" setup.py build_ext --inplace)
  ls -l "$clean"/wsam_fused/_C*.so "$clean"/wsam_fused/_cuda*.so
  echo "== built in $(since "$start") s"
  rm -f wsam_fused/_*.so
  cp "$clean"/wsam_fused/_*.so wsam_fused/
  limited 60 "$PYTHON" -m wsam_fused
}

stage_tests() {
  # What only a GPU shows comes first. Files that need what is not installed are not collected.
  local arguments=(-q -rs -p no:cacheprovider --continue-on-collection-errors
                   "--junitxml=$LOGS/tests.xml" tests/test_gpu.py tests)
  if "$PYTHON" -c 'import pytest_benchmark'; then
    arguments+=(benchmarks)
  else
    arguments+=(-o "addopts=--strict-markers")
  fi
  limited "$TESTS_LIMIT" "$PYTHON" -m pytest "${arguments[@]}"
}

# small_case NAME BACKEND COMMAND...: the case under a command.
small_case() {
  local name=$1 backend=$2 code=0
  shift 2
  echo "== run: $name $backend"
  PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" limited "$((SANITIZE_LIMIT / 5))" "$@" \
    "$PYTHON" tests/gpu_small_case.py --backends "$backend" || code=$?
  echo "== exit: $code"
  [ "$code" -eq 0 ]
}

stage_sanitize() {
  local failed=0 backend
  # torch asks for things that a driver need not have: errors of the API are Python's to report.
  local sanitizer=("$SANITIZER" --report-api-errors no --error-exitcode 9)
  for backend in cuda triton; do
    small_case alone "$backend" env || failed=1
    # Every tensor an allocation of its own, so that memcheck sees what lies behind it.
    small_case memcheck "$backend" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" \
      --tool memcheck || failed=1
    small_case racecheck "$backend" env "${sanitizer[@]}" --tool racecheck || failed=1
  done
  return "$failed"
}

stage_bench() {
  local failed=0
  limited "$BENCH_LIMIT" "$PYTHON" -m benchmarks.bench_gpu --out "$OUT" --budget "$BUDGET" \
    ${bench_arguments[@]+"${bench_arguments[@]}"} || failed=1
  limited 60 "$PYTHON" -m benchmarks.bench_training_memory --device cuda --out "$OUT" || failed=1
  return "$failed"
}

failed=()

# Not to be called in a condition, where bash ignores the stages' own `set -e`.
run_stage() { # STAGE
  local stage=$1 start seconds code
  echo "== stage: $stage"
  start=$(now)
  set +e
  (set -e; "stage_$stage") 2>&1 | tee "$LOGS/$stage.log" | tee -a "$OUT/gpu_report.log"
  code=${PIPESTATUS[0]}
  set -e
  seconds=$(since "$start")
  echo "== stage $stage ended with exit code $code after $seconds s"
  limited 60 "$PYTHON" -m benchmarks.gpu.stages "$stage" --exit "$code" --seconds "$seconds" \
    --logs "$LOGS" --out "$OUT" || code=1
  [ "$code" -eq 0 ] || failed+=("$stage")
}

print_machine 2>&1 | tee -a "$OUT/gpu_report.log"
for stage in "${wanted[@]}"; do
  run_stage "$stage"
done

# The report has all stages, also those that ran after its measurement.
for report in "$OUT"/gpu-*.json; do
  [ -e "$report" ] || continue
  limited 60 "$PYTHON" -m benchmarks.gpu_table --update "$report" > /dev/null || failed+=(report)
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
