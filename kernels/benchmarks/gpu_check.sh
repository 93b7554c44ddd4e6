#!/usr/bin/env bash
# Build, test and measure the kernels on a CUDA machine, in under nine minutes and without a network.
# Usage: kernels/benchmarks/gpu_check.sh FOLDER      (records and logs are written there)
# Needs python3 with torch, triton, transformers and pytest (PYTHON=... chooses another one); mmfix itself need not be
# installed. DRY=1 walks through the same steps on a CPU, with a few cases in Triton's interpreter and tiny benchmarks:
# it shows that the script works, and measures nothing worth keeping.
set -uo pipefail
out=${1:?usage: gpu_check.sh FOLDER}
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
dry=${DRY:-}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root:$root/kernels:$root/decoding:$root/evals${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$out/triton-cache}" TRITON_DEFAULT_FP_FUSION=1 HF_HUB_OFFLINE=1
trap 'rm -rf "$out/triton-cache"' EXIT
begin=$SECONDS
step() { echo "== $1 (after $((SECONDS - begin)) s)"; }

step "machine"
DRY=$dry "$python" - > "$out/machine.txt" <<'PY' || { echo "no usable CUDA device" >&2; exit 2; }
import os, torch, triton
assert os.environ["DRY"] or torch.cuda.is_available()
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", torch.__version__, triton.__version__)
PY
cat "$out/machine.txt"

step "kernel tests"
cases=tests/kernels/triton
tests=("$cases"/{device,map,prefix,statistics,refusal,other,model}_cases.py)
shards=10  # compiling is most of the time: every process takes a share of the cases
if [ -n "$dry" ]; then
  tests=("$cases/other_cases.py" "$cases/prefix_cases.py::test_the_prefix_is_read_once_for_its_branches")
  shards=2
  export TRITON_INTERPRET=1
fi
running=()
for ((n = 0; n < shards; n++)); do
  MMFIX_SHARD="$n/$shards" MMFIX_BACKEND=triton timeout 200 "$python" -m pytest -q -p no:cacheprovider -p no:xdist \
    --rootdir "$cases" "${tests[@]}" > "$out/tests-$n.txt" 2>&1 &
  running+=($!)
done
red=
for ((n = 0; n < shards; n++)); do
  wait "${running[$n]}" || { red=1; tail -40 "$out/tests-$n.txt"; }
done
if [ -n "$red" ]; then
  echo "the kernel tests are red: nothing is measured" >&2
  exit 1
fi
tail -q -n 1 "$out"/tests-*.txt
unset TRITON_INTERPRET

step "kernel benchmarks"
options=(--budget 0.12)
[ -n "$dry" ] && options=(--device cpu --quick --budget 0.01)
timeout 140 "$python" -m mmfix_kernels.bench --out "$out" --tests-passed "${options[@]}" > "$out/bench.txt" 2>&1
measured=$?
tail -5 "$out/bench.txt"

step "whole model"
arms="vanilla,empty,eager-maps,sequential"
for backend in sdpa triton; do
  arms+=",var:sink_dims=[0,1],tau=2,min_image_mass=0,max_sink_share=1@$backend,vhr@$backend,causalmm-language@$backend"
done
options=(--methods "$arms" --tokens 32 --runs 3)
[ -n "$dry" ] && options=(--device cpu --methods vanilla,empty,vhr --tokens 3 --runs 1 --lengths 616)
timeout 115 "$python" -m mmfix_evals.bench.decode --out "$out" --tests-passed "${options[@]}" > "$out/decode.txt" 2>&1
decoded=$?
tail -8 "$out/decode.txt"

step "fixed cache and CUDA graphs"
arms="vanilla,static/vanilla,static/var:sink_dims=[0,1],tau=2,min_image_mass=0,max_sink_share=1@triton"
options=(--methods "$arms" --layers 8 --tokens 32 --runs 1)  # few layers: compiling is most of the time
[ -n "$dry" ] && options=(--device cpu --methods vanilla,static/vhr --layers 2 --tokens 3 --runs 1 --lengths 616)
timeout 75 "$python" -m mmfix_evals.bench.decode --out "$out" --tests-passed "${options[@]}" > "$out/static.txt" 2>&1
fixed=$?
tail -4 "$out/static.txt"

step "done"
# 124: the time limit ended it; the records written before that stand
[ "$measured" -eq 0 ] && [ "$decoded" -eq 0 ] && [ "$fixed" -eq 0 ]
