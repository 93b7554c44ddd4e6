#!/usr/bin/env bash
# Build, test and measure the kernels on a CUDA machine, in under nine minutes and without a network.
# Usage: kernels/benchmarks/gpu_check.sh FOLDER      (records, tables and logs are written there: eight files)
# Needs python3 with torch, triton, transformers and pytest (PYTHON=... chooses another one); mmfix itself need not be
# installed. Where the files are no git checkout, MMFIX_REVISION=... says in the records which revision they are.
# Nothing is measured whose tests are red or did not end in time. A step that fails or takes too long ends alone: what
# it has written stays, the next one goes on, and the script's exit code is 1.
# DRY=1 walks through the same steps on a CPU, with a few cases in Triton's interpreter and tiny benchmarks: it shows
# that the script works, and measures nothing worth keeping.
set -uo pipefail
out=${1:?usage: gpu_check.sh FOLDER}
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
dry=${DRY:-}
total=${dry:+3600}  # seconds for everything
total=${total:-520}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 2
scratch=$(mktemp -d)
export PYTHONPATH="$root:$root/kernels:$root/decoding:$root/evals${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_DEFAULT_FP_FUSION=1
export HF_HUB_OFFLINE=1
unset TRITON_INTERPRET MMFIX_BACKEND MMFIX_SHARD

background=()
stop_all() {
  local pid
  for pid in "${background[@]}"; do kill "$pid" 2> /dev/null; done
  for pid in "${background[@]}"; do wait "$pid" 2> /dev/null; done
  background=()
}
trap 'stop_all; rm -rf "$scratch"' EXIT
begin=$SECONDS
failed=
left() { echo $((total - (SECONDS - begin))); }
step() { echo "== $1 (after $((SECONDS - begin)) s)"; }

step "machine"
DRY=$dry "$python" - > "$out/machine.txt" <<'PY' || { echo "no usable CUDA device" >&2; exit 2; }
import os, torch, transformers, triton
gpu = torch.cuda.is_available()
assert os.environ["DRY"] or gpu
print(torch.cuda.get_device_name() if gpu else "CPU", "torch", torch.__version__, "triton", triton.__version__,
      "transformers", transformers.__version__, "cores", os.cpu_count())
PY
cat "$out/machine.txt"

# The commands that measure. Each is run twice: the first time beside the tests and with its records thrown away, so
# that everything is compiled when it counts.
var="var:sink_dims=[0,1],tau=2,min_image_mass=0,max_sink_share=1"
two="causalmm-language"
bench=("$python" -m mmfix_kernels.bench --tests-passed)
decode=("$python" -m mmfix_evals.bench.decode --tests-passed)
kernels=(--budget 0.12)
model=(--methods "vanilla,$var@triton,vhr@triton,$two@triton,empty,eager-maps,sequential,$var@sdpa,vhr@sdpa,$two@sdpa" --tokens 32 --runs 3)
sizes=(--methods "vanilla,$var@triton,$two@triton,sequential,eager-maps" --sizes 2048x1 8192x1 640x8 2048x8 8192x8 --tokens 12 --runs 2)
# few layers: compiling is most of the time
graphs=(--methods "vanilla,static/vanilla,static/$var@triton,static/$two@triton" --layers 8 --tokens 32 --runs 2)
if [ -n "$dry" ]; then
  small=(--device cpu --layers 2 --tokens 3 --runs 1)
  kernels=(--device cpu --quick --budget 0.01 --only "decode var")
  model=("${small[@]}" --methods vanilla,empty,vhr --lengths 616)
  sizes=("${small[@]}" --methods "vanilla,$two" --sizes 640x1 616x2)
  graphs=("${small[@]}" --methods vanilla,static/vhr --lengths 616)
fi

step "tests"
cases=tests/kernels/triton
in_tests=(MMFIX_BACKEND=triton TORCHINDUCTOR_COMPILE_THREADS=1)
most=230
if [ -n "$dry" ]; then
  in_tests+=(TRITON_INTERPRET=1)
  most=1200
fi
names=()
pids=()
tests() {  # tests NAME SHARDS ARGUMENT...: pytest in processes that share the cases; compiling is most of the time
  local name=$1 shards=$2 n
  shift 2
  for ((n = 0; n < shards; n++)); do
    env "${in_tests[@]}" MMFIX_SHARD="$n/$shards" timeout -k 5 "$most" "$python" -m pytest -q -p no:cacheprovider \
      -p no:xdist --maxfail 8 --rootdir "$cases" "$@" > "$scratch/tests-$name-$n.txt" 2>&1 &
    names+=("$name-$n")
    pids+=($!)
    background+=($!)
  done
}
if [ -n "$dry" ]; then
  tests kernels 2 "$cases/other_cases.py" "$cases/prefix_cases.py::test_the_prefix_is_read_once_for_its_branches"
  tests model 1 "$cases/model_cases.py" -k "contract_suite"
  tests graphs 1 "$cases/model_cases.py" -k "fixed_cache"
else
  tests kernels 10 "$cases"/{device,map,prefix,statistics,refusal,other}_cases.py
  tests model 2 "$cases/model_cases.py" -k "not fixed_cache"
  tests graphs 2 "$cases/model_cases.py" -k "fixed_cache"
  compiling=()
  ahead() {  # ahead COMMAND...: compile what a measurement will need, with records that nobody reads
    timeout -k 5 "$most" "$@" --out "$scratch/ahead" > /dev/null 2>&1 &
    background+=($!)
    compiling+=($!)
  }
  ahead "${bench[@]}" --quick --budget 0.01 --only prefill
  ahead "${bench[@]}" --quick --budget 0.01 --only decode
  ahead "${decode[@]}" "${sizes[@]}" --layers 3 --sizes 640x8 2048x1 --runs 1
  ahead "${decode[@]}" "${model[@]}" --layers 3 --runs 1
  ahead "${decode[@]}" "${graphs[@]}" --runs 1
fi
red=" "
for n in "${!pids[@]}"; do
  wait "${pids[$n]}"
  code=$?
  [ "$code" -eq 0 ] && continue
  red+="${names[$n]%-*} "
  echo "red: ${names[$n]} (exit code $code$([ "$code" -eq 124 ] && echo ", not finished in $most s"))"
  tail -n 60 "$scratch/tests-${names[$n]}.txt"
done
for name in "${names[@]}"; do echo "== $name"; cat "$scratch/tests-$name.txt"; done > "$out/tests.txt"
echo "tests have ended (after $((SECONDS - begin)) s)"
if [ -z "$dry" ]; then  # let compiling ahead go on for a little while, never beside a measurement
  for pid in "${compiling[@]}"; do
    while kill -0 "$pid" 2> /dev/null && [ $((SECONDS - begin)) -lt 150 ]; do sleep 1; done
  done
fi
stop_all

: > "$out/log.txt"
measure() {  # measure NAME SECONDS TESTS COMMAND...: nothing is measured while one of TESTS is red
  local name=$1 seconds=$2 needed=$3 rest code
  shift 3
  step "$name"
  for need in $needed; do
    if [[ "$red" == *" $need "* ]]; then
      echo "the $need tests are red: nothing is measured" | tee -a "$out/log.txt" >&2
      failed=1
      return
    fi
  done
  rest=$(left)
  [ -n "$dry" ] && seconds=1200
  [ "$rest" -lt "$seconds" ] && seconds=$rest
  if [ "$seconds" -lt 20 ]; then
    echo "no time is left for it" | tee -a "$out/log.txt"
    failed=1
    return
  fi
  echo "== $name" >> "$out/log.txt"
  timeout -k 5 "$seconds" "$@" --out "$out" --limit $((seconds * 3 / 4)) > "$scratch/now.txt" 2>&1
  code=$?
  cat "$scratch/now.txt" >> "$out/log.txt"
  tail -n 12 "$scratch/now.txt"
  if [ "$code" -ne 0 ]; then
    echo "$name: exit code $code$([ "$code" -eq 124 ] && echo ", not finished in $seconds s")" | tee -a "$out/log.txt"
    failed=1
  fi
}
measure "kernels" 125 "kernels" "${bench[@]}" "${kernels[@]}"
measure "whole model" 105 "kernels model" "${decode[@]}" "${model[@]}"
measure "fixed cache and CUDA graphs" 90 "kernels graphs" "${decode[@]}" "${graphs[@]}"
measure "lengths and batches" 130 "kernels model" "${decode[@]}" "${sizes[@]}"

step "tables"
timeout -k 5 60 "$python" - "$out" <<'PY' || failed=1
import sys
from pathlib import Path

from mmfix_evals.bench.plot import write_plots
from mmfix_evals.bench.table import speed_table
from mmfix_evals.errors import DataError

out = Path(sys.argv[1])
(out / "speed.md").write_text(speed_table(out) + "\n", encoding="utf-8")
for name in ("kernels.jsonl", "decode.jsonl"):
    try:
        if (out / name).exists():
            write_plots([out / name], out)
    except DataError as problem:
        print(problem)
PY

step "done"
[[ "$red" == " " && -z "$failed" ]]
