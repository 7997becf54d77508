"""How well a calibrated CUDA device predicts what models of the test zoo take on it.

python benchmarks/gpu_predictions.py [MODEL ...] [--seconds N]

The device is measured as `dfc calibrate` does. Each model runs whole on the eager engine with its
batch at 32, its launches queued as they are in use, in turns with the others; the median is held
against the sum of its nodes' predicted times. The error is that of predictions.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from predictions import MODELS, Subject, subjects, summary

from dfc.planning.cost import work_of
from dfc.planning.machine import Device
from dfc.recipe.calibrated import target_text
from dfc.recipe.machines import machine_of
from dfc.recipe.sources import plan_of
from dfc.runtime.calibrate.device import measure_device
from dfc.runtime.engines import find_engine

Call = Callable[[], Any]


def calibrated(seconds: float) -> Device:
    text = target_text("here", [measure_device("gpu0", "cuda:0", seconds=seconds)], [])
    print(text)
    target = plan_of("O0", target=text).target
    assert target is not None
    return machine_of(target).devices[0]


def predicted(s: Subject, device: Device) -> float:
    return sum(work_of(n, s.sizes).seconds(device) for n in s.graph.nodes)


def runs_of(chosen: Sequence[Subject]) -> dict[str, Call]:
    found: dict[str, Call] = {}
    for s in chosen:
        run = find_engine("eager").build(s.graph, "cuda")
        given = [x.cuda() if isinstance(x, torch.Tensor) else x for x in s.inputs]
        found[s.name] = lambda run=run, given=given: run(given)
    return found


def measured(runs: dict[str, Call], seconds: float) -> dict[str, float]:
    took: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(), run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(took[next(iter(took))]) < 3:
        for name, run in runs.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(4):
                run()
            torch.cuda.synchronize()
            took[name].append((time.perf_counter() - begin) / 4)
    return {name: median(times) for name, times in took.items()}


def main(arguments: Sequence[str]) -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    seconds = 20.0
    if "--seconds" in arguments:
        seconds = float(arguments[arguments.index("--seconds") + 1])
    names = [a for a in arguments if not a.startswith("--") and a != f"{seconds:g}"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    chosen = [s for s in subjects(names or MODELS) if "*" in s.name]
    device = calibrated(seconds)
    took = measured(runs_of(chosen), seconds / 2)
    ratios = []
    for s in chosen:
        want = predicted(s, device)
        ratios.append(want / took[s.name])
        print(f"{s.name:28} {took[s.name] * 1e3:8.3f} ms, predicted {want * 1e3:8.3f} ms, "
              f"ratio {ratios[-1]:.2f}")  # fmt: skip
    print(f"{len(ratios)} models: {summary(ratios)} (goal 25 %)")


if __name__ == "__main__":
    main(sys.argv[1:])
