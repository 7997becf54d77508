#!/usr/bin/env bash
# The GPU tests and benchmarks in one call; the result is named after the device.
#     benchmarks/gpu.sh [folder for results]      default benchmarks/results
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
results=${1:-benchmarks/results}
# Links do not survive every way of copying a tree.
[ -e dfc/passes ] || ln -s ../passes dfc/passes
[ -e dfc/runtime ] || ln -s ../runtime dfc/runtime
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device: nothing to measure"
  exit 0
fi
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
mkdir -p "$results"
{
  "$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())'
  PYTHONPATH=. "$python" -m pytest -q -m gpu tests/test_gpu.py -p no:cacheprovider
} 2>&1 | tee "$results/gpu-$name.txt"
