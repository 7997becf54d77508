#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call of at most BUDGET_S seconds (default 540):
#
#     bash benchmarks/gpu.sh [PART ...]
#
# Parts are tests, pipelines, linear, tiers, predictions, engines, fusions; without names, all.
# Runs the GPU tests, then the GPU benchmarks, and writes benchmarks/results/gpu-DEVICE.txt (also
# into $OUT, where that is set). A part that fails or takes too long is reported, and the next runs.
# PYTHON is the interpreter (default python3); wheels of what it lacks may lie in .whl.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUDGET_S=${BUDGET_S:-540}
wanted=" $* "
began=$SECONDS

for part in passes runtime; do # the two links of the package, where a copy has lost them
  [ -e "dfc/$part/__init__.py" ] || { rm -rf "dfc/$part"; ln -s "../$part" "dfc/$part"; }
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if ls .whl/*.whl >/dev/null 2>&1; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
  export PYTHONPATH="$PYTHONPATH:$site" # after what the machine has: its own versions win
fi

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device: nothing to measure"
  exit 0
fi

log=$(mktemp)
failed=0
say() { echo "$@" | tee -a "$log"; }

part() { # NAME SECONDS COMMAND...: at most SECONDS, less where less of the budget is left
  local name=$1 limit=$2 left=$((BUDGET_S - (SECONDS - began))) start=$SECONDS status
  shift 2
  [ "$wanted" = "  " ] || [ "$name" = machine ] || [[ "$wanted" == *" $name "* ]] || return 0
  [ "$limit" -gt "$left" ] && limit=$left
  say ""
  say "== $name"
  if [ "$limit" -lt 5 ]; then
    say "left out: the budget of $BUDGET_S s is spent"
    failed=1
    return
  fi
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  if [ "$status" -eq 0 ]; then
    say "-- $name: done in $((SECONDS - start)) s"
  else
    failed=1
    [ "$status" -eq 124 ] && say "-- $name: stopped after $limit s" || say "-- $name: status $status"
  fi
}

say "date $(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), load $(cut -d' ' -f1-3 /proc/loadavg)"
part "machine" 40 "$PYTHON" -c '
import importlib, platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
print("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
missing = []
for name in "lark interegular typer rich onnx onnxscript onnxruntime networkx safetensors scipy pytest transformers".split():
    try:
        importlib.import_module(name)
    except ImportError as e:
        missing.append(f"{name} ({e})")
print("missing:", ", ".join(missing) or "nothing")
raise SystemExit(bool(missing))
'
part tests 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -rs --durations=5 tests/test_gpu*.py
part pipelines 60 "$PYTHON" benchmarks/gpu_pipelines.py
part linear 60 "$PYTHON" benchmarks/gpu_linear.py
part tiers 90 "$PYTHON" benchmarks/tiers.py --gpu
part predictions 70 "$PYTHON" benchmarks/gpu_predictions.py --seconds 20
part engines 240 "$PYTHON" benchmarks/gpu_engines.py --seconds 150
part fusions 60 "$PYTHON" benchmarks/gpu_fusions.py 45

device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "none")' 2>/dev/null | tr -c 'A-Za-z0-9\n' '-' | tr -s - | tr 'A-Z' 'a-z')
mkdir -p benchmarks/results
result="benchmarks/results/gpu-${device:-unknown}.txt"
sed "s|$PWD|.|g" "$log" >"$result"
[ -n "${OUT:-}" ] && cp "$result" "$OUT/"
echo
echo "written: $result ($((SECONDS - began)) s)"
exit "$failed"
