"""Presets against the untransformed graph: none may make a model of the zoo slower.

    python benchmarks/presets.py [NAME...] [--all] [--seconds 600] [--presets O1,O2]
                                 [--engines eager] [--tries 12]
                                 [--shard 0/8]     one of eight parts, to run beside the others

Each model is compiled with `O0`, which is the graph as captured, and with each preset, for the same
engine; the two are run in pairs that alternate in their order, until the interval for the median
of their ratios answers the question (99 % over all looks, dfc/runtime/measure.py). What seems
slower is measured once more, for longer, since among many models some look slower by chance.
Without --all or names every eighth model of each family is taken. `O3` searches: --tries bounds it.
A preset that fails is told, and the exit status is 8; it is 9 if one makes a model slower.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from math import exp, log
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dfc
from dfc.calling import flat_inputs
from dfc.errors import DfcError
from dfc.runtime.measure import Comparison, compare
from tests.zoo import Case, cases

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

MARGIN = 0.03  # less is noise of layout and scheduling
QUICK_S, LONG_S = 1.0, 6.0
EVERY = 8


def chosen(every: int) -> list[Case]:
    """Every so-many-th model of each family, the families in turns."""
    families: dict[str, list[Case]] = {}
    for case in cases():
        if not case.training:
            families.setdefault(case.family, []).append(case)
    rows = [some[::every] for some in families.values()]
    return [c for turn in zip_longest(*rows) for c in turn if c is not None]


def compared(
    case: Case, engines: Sequence[str], presets: Sequence[str], tries: int
) -> Iterator[tuple[str, str, Comparison | str]]:
    """(engine, preset, comparison or why there is none) for each."""
    built = case.build()
    try:
        graph = dfc.trace(built.model, built.args, built.kwargs, built.dynamic_shapes)
    except DfcError as e:
        yield "", "", f"not captured: {e.code}"
        return
    inputs = flat_inputs(graph, built.args, built.kwargs)
    for engine in engines:
        try:
            before = compiled(graph, built, "O0", engine, tries)
        except DfcError as e:
            yield engine, "", f"does not run: {e.code}"
            continue
        for preset in presets:
            try:
                after = compiled(graph, built, preset, engine, tries)
            except DfcError as e:
                yield engine, preset, f"FAILS: {e.code} {e.message}"
                continue
            if str(after.graph) == str(before.graph):
                yield engine, preset, "the same graph"
                continue
            yield engine, preset, pair(before, after, inputs)


def compiled(graph: Any, built: Any, preset: str, engine: str, tries: int) -> dfc.Compiled:
    return dfc.compile(
        graph, built.args, built.kwargs, recipe=preset, engine=engine, verify="none",
        reproducers="none", budget=tries if preset == "O3" else None,
    )  # fmt: skip


def pair(before: dfc.Compiled, after: dfc.Compiled, inputs: Sequence[Any]) -> Comparison:
    def measured(seconds: float) -> Comparison:
        return compare(
            before.run_flat, after.run_flat, inputs, question="slower", margin=MARGIN,
            seconds=seconds,
        )  # fmt: skip

    found = measured(QUICK_S)
    return measured(LONG_S) if found.verdict == "slower" else found


def main() -> int:
    parser = argparse.ArgumentParser(description="presets against the untransformed graph")
    parser.add_argument("names", nargs="*", help="these models of the zoo alone")
    parser.add_argument("--all", action="store_true", help="every model, not every eighth")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after so long")
    parser.add_argument("--presets", default="O1,O2,O3")
    parser.add_argument("--engines", default="eager,onnxruntime")
    parser.add_argument("--tries", type=int, default=12, help="combinations that O3 tries")
    parser.add_argument("--shard", default="0/1", help="which part of how many, as 0/8")
    options = parser.parse_args()
    presets, engines = options.presets.split(","), options.engines.split(",")
    part, parts = map(int, options.shard.split("/"))
    some = chosen(1 if options.all or options.names else EVERY)[part::parts]
    some = [c for c in some if not options.names or c.name in options.names]
    deadline = time.perf_counter() + options.seconds
    began = os.getloadavg()[0]
    print(f"{'model':34} {'engine':12} {'preset':7} {'before ms':>9} {'after ms':>9} {'ratio':>6} "
          f"{'99 % interval':>15} {'pairs':>6} verdict")  # fmt: skip
    ratios: dict[tuple[str, str], list[float]] = {}
    slower, done, same, left_out = [], 0, 0, []
    for case in some:
        if time.perf_counter() > deadline:
            break
        for engine, preset, found in compared(case, engines, presets, options.tries):
            if found == "the same graph":
                same += 1
                continue
            if isinstance(found, str):
                left_out.append(f"{case.name} {engine} {preset}: {found}")
                continue
            ratios.setdefault((engine, preset), []).append(found.ratio)
            interval = f"{found.low:.2f}..{found.high:.2f}"
            print(f"{case.name:34} {engine:12} {preset:7} {found.before_ms:>9.3f} "
                  f"{found.after_ms:>9.3f} {found.ratio:>6.2f} {interval:>15} {found.runs:>6} "
                  f"{found.verdict}", flush=True)  # fmt: skip
            if found.verdict == "slower":
                slower.append(f"{case.name}, {engine}, {preset}: {found.ratio:.2f}")
        done += 1
    print(f"\n{done} of {len(some)} models; {same} combinations have the same graph as before; "
          f"load {began:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")  # fmt: skip
    for (engine, preset), found in sorted(ratios.items()):
        mean = exp(sum(map(log, found)) / len(found))
        print(f"{engine}, {preset}: {len(found)} changed; after/before {mean:.2f} in the mean, "
              f"{min(found):.2f}..{max(found):.2f}")  # fmt: skip
    for line in left_out:
        print(f"left out: {line}")
    print("\n".join(["SLOWER:", *slower]) if slower else "nothing is slower beyond noise")
    failed = any(": FAILS: " in line for line in left_out)
    return 9 if slower else 8 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
