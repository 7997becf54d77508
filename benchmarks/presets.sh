#!/usr/bin/env bash
# benchmarks/presets.py over the whole zoo in eight parts at once, two cores for each:
#
#     bash benchmarks/presets.sh [seconds]
#
# For a machine of 16 quiet cores. Writes benchmarks/results/presets-16-cores.txt ($OUT as well).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
seconds=${1:-400}
for part in passes runtime; do # the two links of the package, where a copy has lost them
  [ -e "dfc/$part/__init__.py" ] || { rm -rf "dfc/$part"; ln -s "../$part" "dfc/$part"; }
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2
if ls .whl/*.whl >/dev/null 2>&1; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
  export PYTHONPATH="$PYTHONPATH:$site"
fi
parts=$(mktemp -d)
for i in 0 1 2 3 4 5 6 7; do
  CUDA_VISIBLE_DEVICES="" timeout $((seconds + 45)) taskset -c $((2 * i)),$((2 * i + 1)) \
    "$PYTHON" benchmarks/presets.py --all --presets O1,O2,O3 --seconds "$seconds" --shard "$i/8" \
    >"$parts/$i.txt" 2>"$parts/$i.err" &
done
wait
result=benchmarks/results/presets-16-cores.txt
{
  echo "# benchmarks/presets.sh $seconds, $(date -u +%Y-%m-%d), $("$PYTHON" -c 'import torch, onnxruntime; print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__)')"
  grep -m1 'model name' /proc/cpuinfo
  cat "$parts"/*.txt
  tail -qn 3 "$parts"/*.err
} >"$result"
[ -n "${OUT:-}" ] && cp "$result" "$OUT/"
grep -hE "of .* models|slower|SLOWER|: 1\.[0-9]+$" "$result" | head -60
