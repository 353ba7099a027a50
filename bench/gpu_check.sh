#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes: the build of the CUDA kernels, the tests marked cuda,
# compute-sanitizer, benchmarks and a short training run. A step that fails or takes too long does not stop the others.
#
#   bench/gpu_check.sh [FOLDER]     logs, JSON and summary.txt go to FOLDER, by default $OUT or bench/results/gpu
#
# It needs this repository, torch, Triton and nvcc; what else is missing is named and skipped. The exit status is that of
# the steps together. PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=$(realpath -m "${1:-${OUT:-bench/results/gpu}}")
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
deadline=$((SECONDS + 520)) failed=0
: >"$out/summary.txt"

note() { printf '%-12s %-9s %6s s  %s\n' "$@" | tee -a "$out/summary.txt"; }

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@" 2>/dev/null; }

# step NAME SECONDS COMMAND...: run a command for at most so long, and no longer than is left of the nine minutes.
step() {
  local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) status
  shift 2
  if ((left < 5)); then
    note "$name" skipped 0 "no time left"
    failed=1
    return
  fi
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1
  status=$?
  local last
  last=$(tail -n 1 "$out/$name.log" | cut -c1-90)
  case $status in
    0) note "$name" passed $((SECONDS - begin)) "$last" ;;
    124 | 137) note "$name" "too long" $((SECONDS - begin)) "$last" ;;
    *) note "$name" failed $((SECONDS - begin)) "$last" ;;
  esac
  ((status == 0)) || failed=1
}

skip() { note "$1" skipped 0 "$2"; }

{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  nvcc --version | tail -n 2
} >"$out/machine.txt" 2>&1

step device 60 "$python" -c \
  "import torch; assert torch.cuda.is_available(), 'no CUDA device'; print(torch.cuda.get_device_name())"
step build 120 "$python" -m pseudoseg_fast.build
step env 60 "$python" -m pseudoseg_fast.env

if has pytest; then
  beside=()
  if has xdist; then beside=(--numprocesses auto --maxprocesses 8 --dist worksteal); fi  # most of it is compiling
  step tests 180 env OMP_NUM_THREADS=1 "$python" -m pytest -q -m cuda -p no:cacheprovider "${beside[@]}" tests
else
  skip tests "pytest is not installed"
fi

sanitizer=$(command -v compute-sanitizer || true)
for place in "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer /usr/local/cuda*/bin/compute-sanitizer; do
  [[ -z $sanitizer && -x $place ]] && sanitizer=$place
done
if [[ -n $sanitizer ]]; then
  for tool in memcheck racecheck; do
    step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" bench/sanitize.py
  done
else
  skip memcheck "compute-sanitizer is not installed"
  step kernels 60 "$python" bench/sanitize.py
fi

step depthwise 90 "$python" -m bench.depthwise_configs --jobs 12 --output "$out/depthwise.json"

if has pytest pytest_benchmark; then
  for size in voc_full voc_label coco_full ade attention_65 attention_129; do  # each with a file of its own
    step "$size" 60 "$python" -m pytest -q bench/bench_functional.py --device cuda -k "gpu_$size" -p no:cacheprovider \
      --benchmark-json "$out/functional_cuda_$size.json"
  done
  step train_step 150 "$python" -m pytest -q bench/test_train_step.py --device cuda -p no:cacheprovider \
    -k "(voc_321_8_gpu or voc_513_8_gpu) and not compile" --benchmark-json "$out/train_step_cuda.json"
else
  skip benchmarks "pytest and pytest-benchmark are not installed"
fi

if has lightning_fabric || has lightning.fabric; then
  step training 90 "$python" -m pseudoseg_fast.train --config demo --run.accelerator cuda --optim.steps 50 \
    --method.start_u 10 --method.ramp_u 10 \
    --run.dir "$out/training"
else
  skip training "lightning-fabric is not installed"
fi

echo
cat "$out/machine.txt" "$out/summary.txt"
exit "$failed"
