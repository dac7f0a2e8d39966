#!/usr/bin/env bash
# One command for a machine with a CUDA GPU: build for it, test, look for memory errors, benchmark.
#
#     bench/gpu.sh OUTDIR [--build] [--test] [--sanitize] [--bench] [--model]      (no stage named: all)
#
# Needs nvcc, a torch that was built for CUDA, and the build tools of pyproject.toml in the current Python. Stays within
# 9 minutes: stages that are cut short leave what they have. Reads the card's settings and changes none. Without a GPU
# it compiles, says so and ends with 0.
set -euo pipefail
[[ ${1:-} == "" || ${1:-} == --* ]] && { sed -n '2,8p' "$0"; exit 2; }
mkdir -p "$1"
out=$(realpath "$1")
shift
stages=" ${*:---build --test --sanitize --bench --model} "
cd "$(dirname "$0")/.."
failed=""
limit=540

wants() { [[ $stages == *" --$1 "* ]]; }
# Runs a stage's command within what is left of the time, with its output in OUTDIR/NAME.log.
run() {
  local name=$1
  shift
  printf '=== %s (%s s)\n' "$name" "$SECONDS"
  if ! timeout --signal=INT --kill-after=5 $((limit > SECONDS ? limit - SECONDS : 1)) "$@" >"$out/$name.log" 2>&1; then
    failed+=" $name"
  fi
  tail -n 4 "$out/$name.log"
}
finish() {
  printf '=== done (%s s)%s\n' "$SECONDS" "${failed:+; failed:$failed}"
  [[ -z $failed ]]
  exit
}

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 || true)
architectures="80;90a"
if [[ $capability =~ ^[0-9]+\.[0-9]+$ ]]; then
  architectures=${capability/./}
  [[ $architectures == 90 ]] && architectures=90a
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu --format=csv | tee "$out/card.csv"
else
  echo "no GPU was found: compiling for $architectures, nothing else"
fi

if wants build; then
  export LLMCORE_CUDA=on LLMCORE_CMAKE_ARGS="-DLLMCORE_CUDA_ARCHITECTURES=$architectures -DLLMCORE_ISAS=portable"
  run build python -m pip install -v --no-deps --no-build-isolation .
  run build_gpu_test bash -c "cmake -S tests/simt -B '$out/simt' -DLLMCORE_GPU_TEST=ON -DCMAKE_BUILD_TYPE=Release \
    '-DCMAKE_CUDA_ARCHITECTURES=$architectures' && cmake --build '$out/simt' -j 4"
fi
[[ $capability == "" || -n $failed ]] && finish

if wants test; then
  run known_answers "$out/simt/gpu_test"
  run test python -m pytest tests/gpu -x
fi
if wants sanitize && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    run "sanitize_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$out/simt/gpu_test"
  done
  run sanitize_ops compute-sanitizer --tool memcheck --error-exitcode 1 python bench/gpu.py --small
fi
if wants bench; then
  seconds=$((limit - SECONDS - 30 - $(wants model && echo 150 || echo 0)))
  run bench python bench/gpu.py --json "$out/gpu.json" --seconds $((seconds > 5 ? seconds : 5))
fi
wants model && run model python bench/model.py --device cuda --json "$out/model.json"
finish
