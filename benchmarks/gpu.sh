#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call of at most BUDGET_S seconds (default 540):
#
#     bash benchmarks/gpu.sh [PART ...]
#
# Parts are tests, pipelines, linear, tiers, predictions, engines and fusions; without names, all.
# Each writes benchmarks/results/gpu-DEVICE-PART.txt (also into $OUT, where that is set). A part that
# fails or takes too long is reported, and the next runs.
# PYTHON is the interpreter (default .venv's, or python3); wheels of what it lacks may lie in .whl.
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
failed=0

part() { # NAME SECONDS COMMAND...: at most SECONDS, less where less of the budget is left
  local name=$1 limit=$2 left=$((BUDGET_S - (SECONDS - began))) start=$SECONDS status
  local file="benchmarks/results/gpu-$slug-$name.txt" log
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
  log=$(mktemp)
  {
    echo "$device, $(date -u +%Y-%m-%d), load $(cut -d' ' -f1-3 /proc/loadavg)"
    timeout --kill-after=5 "$limit" "$@" 2>&1
    status=$?
    case $status in
      0) echo "-- done in $((SECONDS - start)) s" ;;
      124) echo "-- stopped after $limit s" ;;
      *) echo "-- status $status after $((SECONDS - start)) s" ;;
    esac
    [ $status -eq 0 ]
  } | tee "$log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
  mkdir -p benchmarks/results
  sed "s|$PWD|.|g" "$log" >"$file"
  [ -n "${OUT:-}" ] && cp "$file" "$OUT/"
  rm "$log"
}

part tests 240 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -rs --durations=5 tests/test_gpu*.py
part pipelines 110 "$PYTHON" benchmarks/gpu_pipelines.py
part linear 60 "$PYTHON" benchmarks/gpu_linear.py
part tiers 90 "$PYTHON" benchmarks/tiers.py --gpu
part predictions 120 "$PYTHON" benchmarks/gpu_predictions.py --seconds 20
part engines 240 "$PYTHON" benchmarks/gpu_engines.py --seconds 150
part fusions 60 "$PYTHON" benchmarks/gpu_fusions.py 45
exit "$failed"
