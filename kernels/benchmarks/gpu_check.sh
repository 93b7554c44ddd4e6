#!/usr/bin/env bash
# Build, test and measure the kernels on a CUDA machine, in under nine minutes and without a network.
# Usage: kernels/benchmarks/gpu_check.sh FOLDER      (records and logs are written there)
# Needs python3 with torch, triton and pytest (PYTHON=... chooses another one); mmfix itself need not be installed.
set -uo pipefail
out=${1:?usage: gpu_check.sh FOLDER}
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root:$root/kernels:$root/decoding:$root/evals${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$out/triton-cache}" TRITON_DEFAULT_FP_FUSION=1 HF_HUB_OFFLINE=1
trap 'rm -rf "$out/triton-cache"' EXIT
begin=$SECONDS
step() { echo "== $1 (after $((SECONDS - begin)) s)"; }

step "machine"
"$python" - > "$out/machine.txt" <<'PY' || { echo "no usable CUDA device" >&2; exit 2; }
import torch, triton
assert torch.cuda.is_available()
print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
PY
cat "$out/machine.txt"

step "kernel tests on the device"
spread="-p no:xdist"  # compiling is most of the time: spread it over processes where pytest can
"$python" -c 'import xdist' 2> /dev/null && spread="-n 8"
if ! MMFIX_BACKEND=triton timeout 190 "$python" -m pytest -q -p no:cacheprovider $spread \
    --rootdir tests/kernels/triton tests/kernels/triton/device_cases.py \
    tests/kernels/triton/refusal_cases.py tests/kernels/triton/other_cases.py tests/kernels/triton/model_cases.py > "$out/tests.txt" 2>&1; then
  tail -40 "$out/tests.txt"
  echo "the kernel tests are red: nothing is measured" >&2
  exit 1
fi
tail -1 "$out/tests.txt"

step "kernel benchmarks"
timeout 200 "$python" kernels/benchmarks/bench.py --out "$out" --tests-passed --budget 0.15 > "$out/bench.txt" 2>&1
measured=$?
tail -5 "$out/bench.txt"

step "decode benchmark of a 7B-shaped model"
timeout 130 "$python" kernels/benchmarks/bench_decode.py --out "$out" --tests-passed > "$out/decode.txt" 2>&1
decoded=$?
tail -5 "$out/decode.txt"

step "done"
# 124: the time limit ended it; the records written before that stand
[ "$measured" -eq 0 ] && [ "$decoded" -eq 0 ]
