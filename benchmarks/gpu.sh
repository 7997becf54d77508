#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call of at most BUDGET_S seconds (default 540):
#
#     bash benchmarks/gpu.sh [PART ...]
#
# Parts are processes, engines, tests, predictions, pipelines, linear, tiers and fusions, in the
# order in which their results are missed; without names, as many of all as there is time for. Each
# writes gpu-DEVICE-PART.txt line by line, in benchmarks/results or in $OUT, where that is set: what
# is stopped leaves what it had. `engines` goes on with what its file in benchmarks/results lacks.
# A part that fails or takes too long is reported, and the next runs.
# PYTHON is the interpreter (default .venv's, or python3). Wheels of what it lacks may lie in .whl:
# with PyTorch, pytest, NumPy, SciPy and transformers there, those of lark, interegular, expecttest.
set -uo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && default=.venv/bin/python || default=python3
PYTHON=${PYTHON:-$default}
BUDGET_S=${BUDGET_S:-540}
wanted=" $* "
began=$SECONDS

for part in passes runtime; do # the two links of the package, where a copy has lost them
  [ -e "dfc/$part/__init__.py" ] || { rm -rf "dfc/$part"; ln -s "../$part" "dfc/$part"; }
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

device=$("$PYTHON" -c '
import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
' 2>/dev/null)
if [ -z "$device" ]; then
  echo "no CUDA device that $PYTHON's torch sees: nothing to measure"
  exit 0
fi
if ls .whl/*.whl >/dev/null 2>&1; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
  export PYTHONPATH="$PYTHONPATH:$site" # after what the machine has: its own versions win
fi
slug=$(tr -c 'A-Za-z0-9\n' '-' <<<"$device" | tr -s - | tr 'A-Z' 'a-z')
results=${OUT:-benchmarks/results}
mkdir -p "$results"
failed=0

part() { # NAME SECONDS COMMAND...: at most SECONDS, less where less of the budget is left
  local name=$1 limit=$2 left=$((BUDGET_S - (SECONDS - began))) start=$SECONDS status
  local file="gpu-$slug-$1.txt" told
  shift 2
  [ "$wanted" = "  " ] || [[ "$wanted" == *" $name "* ]] || return 0
  echo
  echo "== $name"
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "left out: the budget of $BUDGET_S s is spent"
    failed=1
    return
  fi
  told="$results/$file"
  if [[ " $* " == *" --into "* ]]; then # it writes the file itself, and goes on with it
    [ -e "$told" ] || cp "benchmarks/results/$file" "$told" 2>/dev/null
    set -- "$@" "$told"
    told=/dev/null
  fi
  {
    echo "$device, $(date -u +%Y-%m-%d), load $(cut -d' ' -f1-3 /proc/loadavg)"
    # interrupted, pytest tells what failed
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1
    status=$?
    case $status in
      0) echo "-- done in $((SECONDS - start)) s" ;;
      124 | 137) echo "-- stopped after $limit s" ;;
      *) echo "-- status $status after $((SECONDS - start)) s" ;;
    esac
    [ $status -eq 0 ]
  } | sed -u "s|$PWD|.|g" | tee "$told"
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
}

tests=("$PYTHON" -m pytest -v --tb=short -m gpu -p no:cacheprovider -rs --durations=5)
others=$(ls tests/test_gpu*.py | grep -v processes)
part processes 150 "${tests[@]}" tests/test_gpu_processes.py
part engines 420 "$PYTHON" benchmarks/gpu_engines.py --seconds 330 --into
# shellcheck disable=SC2086 # several files
part tests 240 "${tests[@]}" $others
part predictions 120 "$PYTHON" benchmarks/gpu_predictions.py --seconds 20
part pipelines 110 "$PYTHON" benchmarks/gpu_pipelines.py
part linear 60 "$PYTHON" benchmarks/gpu_linear.py
part tiers 90 "$PYTHON" benchmarks/tiers.py --gpu
part fusions 60 "$PYTHON" benchmarks/gpu_fusions.py 45
exit "$failed"
