"""Engines on a CUDA device: BERT-base and ResNet-50 by dfc, by PyTorch and by torch.compile.

    python benchmarks/gpu_engines.py [--cases NAMES] [--seconds 240] [--no-autotune] [--both]
                                     [--into FILE]

Peers: PyTorch's eager mode, and `torch.compile(mode="max-autotune")`, which measures kernels and
replays CUDA graphs. A time is that of one call until its results are there; calls take turns, a
ratio is the median of those of one round. Weights are random, dtypes are the model's own. With
`--both` dfc's engine that measures kernels is there too. max-autotune takes minutes: all cases are
timed and printed without it first.

With `--into` a case is written to FILE whenever it was timed, and those that FILE has beside
max-autotune are left out: a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402 - after what makes it quiet

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _rows import Rows  # noqa: E402
from engines import models, table  # noqa: E402

import dfc  # noqa: E402
from dfc.compiled import with_state_inputs  # noqa: E402
from dfc.errors import DfcError  # noqa: E402
from dfc.report import Report  # noqa: E402
from dfc.runtime.engines import find_engine  # noqa: E402

MOST_S = 1.5  # of measuring, for each way to run a case
AUTOTUNE = "torch.compile max-autotune"
BF16, F32 = torch.bfloat16, torch.float32
Call = Callable[[], Any]


def cases() -> dict[str, tuple[str, torch.dtype]]:
    """By name: the model of engines.py, and its dtype; those last that max-autotune takes longest
    for."""
    berts = [(f"bert-base-{size}-s128", dtype) for dtype in (BF16, F32) for size in ("b1", "b8")]
    made = [*berts, ("resnet50-b1", F32), ("resnet50-b1", BF16)]
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


@dataclass
class Case:
    """A model that is built, and the ways to run it."""

    name: str
    module: torch.nn.Module
    args: Any
    calls: dict[str, Call]
    told: str
    began: float

    def timed(self) -> str:
        """What the ways take, as the lines of its block."""
        found = times(self.calls)
        rounds, today = len(found["dfc auto"]), time.strftime("%Y-%m-%d", time.gmtime())
        lines = [f"{self.name}; {today}, {rounds} rounds; {self.told}", *table(found, digits=3)]
        lines.append(f"  {error(self.module, self.calls, self.args)}")
        lines.append(f"  ({time.perf_counter() - self.began:.0f} s in all)")
        return "\n".join(lines)


def prepared(name: str, both: bool) -> Case:
    begin = time.perf_counter()
    module, args = build(*cases()[name])
    calls, told = ours(module, args, both)
    module, args = module.cuda(), tuple(x.cuda() for x in args)
    calls["PyTorch eager"] = eager(module, args)
    return Case(name, module, args, calls, told, begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="parts of names, separated by commas")
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after these")
    parser.add_argument("--no-autotune", action="store_true")
    parser.add_argument("--both", action="store_true", help="dfc's max_autotune too")
    parser.add_argument("--into", type=Path, help="a file of results, which is gone on with")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    start = time.perf_counter()
    head = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(head, flush=True)
    rows = Rows(options.into, f"{head}; benchmarks/gpu_engines.py")
    wanted = [n for n in cases() if any(part in n for part in options.cases.split(","))]
    todo = [(n, False) for n in wanted if not rows.has(n, "dfc auto")]
    if not options.no_autotune:
        todo += [(n, True) for n in wanted if not rows.has(n, AUTOTUNE)]
    built: dict[str, Case] = {}
    failed: set[str] = set()
    for name, autotuned in todo:
        if name in failed:
            continue
        if time.perf_counter() - start > options.seconds:
            print(f"\n{name}: left out, no time was left", flush=True)
            continue
        try:
            block = measured(name, autotuned, built, options.both)
        except (DfcError, RuntimeError) as e:
            failed.add(name)
            block = f"{name}: not measured: {' '.join(str(e).split())}"
        print(f"\n{block}", flush=True)
        rows.put(block)


def measured(name: str, autotuned: bool, built: dict[str, Case], both: bool) -> str:
    """A case's block; what is built for it stays for its next one."""
    case = built.get(name) or built.setdefault(name, prepared(name, both))
    if autotuned:
        torch._dynamo.reset()
        case.calls[AUTOTUNE] = max_autotune(case.module, case.args)
    return case.timed()


if __name__ == "__main__":
    main()
