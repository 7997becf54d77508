"""Engines on a CUDA device: BERT-base and ResNet-50 by dfc, by PyTorch and by torch.compile.

    python benchmarks/gpu_engines.py [--cases NAMES] [--seconds 240] [--no-autotune] [--both]

Peers: PyTorch's eager mode, and `torch.compile(mode="max-autotune")`, which measures kernels and
replays CUDA graphs. A time is that of one call until its results are there; calls take turns, a
ratio is the median of those of one round. Weights are random, dtypes are the model's own. With
`--both` dfc's engine that measures kernels is there too. max-autotune takes minutes: the others are
timed and printed first.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402 - after what makes it quiet

sys.path.insert(0, str(Path(__file__).resolve().parent))
from engines import models, table  # noqa: E402

import dfc  # noqa: E402
from dfc.compiled import with_state_inputs  # noqa: E402
from dfc.report import Report  # noqa: E402
from dfc.runtime.engines import find_engine  # noqa: E402

MOST_S = 1.5  # of measuring, for each way to run a case
BF16, F32 = torch.bfloat16, torch.float32
Call = Callable[[], Any]


def cases() -> dict[str, tuple[str, torch.dtype]]:
    """By name: the model of engines.py, and its dtype; the most telling first."""
    bert1, bert8, resnet = "bert-base-b1-s128", "bert-base-b8-s128", "resnet50-b1"
    made = [(bert1, BF16), (bert8, BF16), (resnet, BF16), (bert8, F32), (bert1, F32), (resnet, F32)]
    return {f"{m} {'bf16' if d is BF16 else 'f32'}": (m, d) for m, d in made}


def build(model: str, dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    module, args = models()[model]()
    return module.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in args)


def eager(module: torch.nn.Module, args: Any) -> Call:
    return lambda: module(*args)


def max_autotune(module: torch.nn.Module, args: Any) -> Call:
    compiled = torch.compile(module, mode="max-autotune")

    def run() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args)

    return run


def ours(module: torch.nn.Module, args: Any, both: bool) -> tuple[dict[str, Call], str]:
    """dfc's engines on the rewritten graph, `auto` as users call it, and how that was chosen."""
    begin = time.perf_counter()
    auto = dfc.compile(module, args, verify="end", device="cuda")
    took = time.perf_counter() - begin
    names = [e.name for e in auto.report.engines if e.verdict == "slower" and not e.form]
    names += ["inductor:max_autotune:cuda_graph"] * both
    graph, given = with_state_inputs(auto.graph), [x.cuda() for x in args]
    found: dict[str, Call] = {"dfc auto": lambda: auto(*given)}
    for name in names:
        run = find_engine(name).build(graph, "cuda")
        found[f"dfc {name}"] = lambda run=run: run(given)
    told = f"auto is {auto.engine.name}, compiled in {took:.0f} s"
    return found, "\n  ".join([told, *reasons(auto.report)])


def reasons(report: Report) -> list[str]:
    """Why each engine was chosen or was not: as `auto` measured it, or what it was refused for."""
    chosen = next((e.p50_ms for e in report.engines if e.verdict == "chosen" and e.p50_ms), None)
    lines = []
    for e in report.engines:
        line = f"{e.label}: {e.verdict}"
        if e.p50_ms is not None:
            line += f", {e.p50_ms:.3f} ms"
            line += f" ± {e.spread_ms:.3f}" if e.spread_ms is not None else ""
            line += f", {e.p50_ms / chosen:.3f} of the chosen one's time" if chosen else ""
        lines.append(f"{line}: {e.reason}" if e.reason else line)
    return lines + [f"{d.step}: {d.verdict}: {d.reason}" for d in report.decisions]


def times(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Milliseconds of each call in each round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(4):
                call()
            torch.cuda.synchronize()
        end = time.perf_counter() + MOST_S * len(calls)
        while time.perf_counter() < end and len(found[next(iter(found))]) < 200:
            for name, call in calls.items():
                call()
                torch.cuda.synchronize()
                begin = time.perf_counter()
                call()
                torch.cuda.synchronize()
                found[name].append((time.perf_counter() - begin) * 1e3)
    return found


def error(module: torch.nn.Module, calls: Mapping[str, Call], args: Any) -> str:
    """How far each way's first result is from float64, of its largest element."""
    with torch.inference_mode():
        import copy

        wide = copy.deepcopy(module).double()
        want = _first(wide(*(x.double() if x.is_floating_point() else x for x in args)))
        size = float(want.abs().max())
        off = {n: float((_first(c()).double() - want).abs().max()) / size for n, c in calls.items()}
    return "error " + ", ".join(f"{n} {e:.1e}" for n, e in off.items())


def _first(results: Any) -> torch.Tensor:
    while not isinstance(results, torch.Tensor):
        results = results[0]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="parts of names, separated by commas")
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after these")
    parser.add_argument("--no-autotune", action="store_true")
    parser.add_argument("--both", action="store_true", help="dfc's max_autotune too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    start = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for name, (model, dtype) in cases().items():
        if not any(part in name for part in options.cases.split(",")):
            continue
        if time.perf_counter() - start > options.seconds:
            print(f"\n{name}: left out, no time was left")
            continue
        measured(name, model, dtype, options)


def measured(name: str, model: str, dtype: torch.dtype, options: argparse.Namespace) -> None:
    begin = time.perf_counter()
    module, args = build(model, dtype)
    calls, told = ours(module, args, options.both)
    module, args = module.cuda(), tuple(x.cuda() for x in args)
    calls["PyTorch eager"] = eager(module, args)
    print(f"\n{name}; {told}")
    shown(module, args, calls)
    if not options.no_autotune:
        torch._dynamo.reset()
        calls["torch.compile max-autotune"] = max_autotune(module, args)
        shown(module, args, calls)
    print(f"  ({time.perf_counter() - begin:.0f} s in all)", flush=True)
    torch.cuda.empty_cache()


def shown(module: torch.nn.Module, args: Any, calls: Mapping[str, Call]) -> None:
    found = times(calls)
    print(f"{len(found['dfc auto'])} rounds")
    print("\n".join(table(found, digits=3)))
    print(f"  {error(module, calls, args)}", flush=True)


if __name__ == "__main__":
    main()
