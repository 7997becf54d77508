"""How well a calibrated target predicts what stages of the test zoo take, and what pipelines take.

python benchmarks/predictions.py [MODEL ...] [--by-op] [--target FILE] [--seconds N]

The machine is measured, with one thread, as `dfc calibrate --threads 1` does. Models of the zoo,
with their example's sizes and with a batch of 32, are cut in stages of equal predicted time; each
stage runs alone on the eager engine, in turns with the others, and what its quickest tenth takes at
most, as calibration tells it too, is held against the prediction. The error is
exp(mean |log(predicted / measured)|) - 1. Machines drift within a minute where others use them as
well: calibration and stages are measured in three turns, and the ratio of a stage is the median of
its turns. What the first calibration alone says of all turns is told as well.
`--by-op` shows which operators are wrong, timed where they stand, by class and one by one.

Pipelines of two stages are simulated with the stages' own measured times, and held against the step
that threads take. Stages are measured one at a time, and all at once, as they run in a pipeline:
two cores share caches, memory and what the host gives them. The nets are those whose kernels are
long enough that Python's lock does not matter, as it does for the zoo's.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests

import dfc
from dfc.calling import flat_inputs
from dfc.cli.inputs import random_inputs
from dfc.ir.graph import Graph, Value
from dfc.ir.interpret import bind_inputs
from dfc.planning.cost import Work, work_of
from dfc.planning.host import machine_text, this_machine
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.model import Wish
from dfc.planning.pipeline import plan, stage_of
from dfc.planning.schedules import schedule
from dfc.planning.simulate import Costs, simulate
from dfc.planning.stages import StageGraph, split
from dfc.recipe.calibrated import target_text
from dfc.recipe.machines import machine_of
from dfc.recipe.sources import plan_of
from dfc.runtime.calibrate.device import measure_device
from dfc.runtime.calibrate.inplace import Clocked, clocked, quiet_seconds
from dfc.runtime.calibrate.sampling import Reading, sample_all
from dfc.runtime.engines import find_engine
from dfc.runtime.pipeline.local import Pipeline
from tests.zoo import cases

MODELS = (  # noqa: SIM905
    "resnet18 mobilenet_v2 efficientnet densenet shufflenet inception vgg unet conv1d_stack "
    "transformer_encoder nano_gpt multihead_attention linear_attention dlrm graph_convolution "
    "bert distilbert gpt2 llama qwen3 vit convnext t5_encoder whisper_encoder mixtral_batched"
).split()
Lane = Callable[[], Any]
BATCH = 32
_TURNS = 3
_TINY_S = 2e-5  # stages shorter than this are a few calls: not worth a device


@dataclass(frozen=True)
class Subject:
    """A traced model with the inputs that it is measured on."""

    name: str
    graph: Graph
    inputs: list[Any]

    @property
    def sizes(self) -> dict[str, Any]:
        return bind_inputs(self.graph, self.inputs)


def subjects(names: Iterable[str]) -> list[Subject]:
    """Each model with its example, and with a batch of BATCH where its batch may vary."""
    known, found = {c.name: c for c in cases()}, []
    for name in names:
        built = known[name].build()
        graph = dfc.trace(
            built.model, built.args, built.kwargs, dynamic_shapes=built.dynamic_shapes
        )
        example = flat_inputs(graph, built.args, built.kwargs)
        found.append(Subject(name, graph, example))
        if "batch" in graph.ranges:
            sizes = {**bind_inputs(graph, example), "batch": BATCH}
            wide = random_inputs(graph, sizes, 0, example)
            found.append(Subject(f"{name}*{BATCH}", graph, wide))
    return found


def lanes(device: Device, count: int) -> Machine:
    """So many of a device, with links that take no time."""
    devices = tuple(replace(device, name=f"lane{i}", memory=1e12) for i in range(count))
    wires = {(i, j): Wire() for i in range(count) for j in range(count)}
    return Machine("lanes", devices, wires)


def runner(graph: Graph, inputs: Sequence[Any]) -> Callable[[], None]:
    run = find_engine("eager").build(graph, "cpu")

    def once() -> None:
        run(inputs)

    return once


@dataclass(frozen=True)
class Case:
    """One stage to be measured."""

    name: str
    works: list[Work]
    run: Callable[[], None]

    def predicted(self, device: Device) -> float:
        return sum(w.seconds(device) for w in self.works)


def stages(subject: Subject, device: Device) -> list[Case]:
    """A model's stages with what they take in."""
    count = max(1, min(4, len(subject.graph) // 12))
    found = plan(subject.graph, lanes(device, count), sizes=subject.sizes)
    made = []
    parts = split(subject.graph, stage_of(found))
    for i, (part, inputs) in enumerate(zip(parts, taken(subject, parts), strict=True)):
        works = [work_of(n, subject.sizes) for n in part.graph.nodes]
        made.append(Case(f"{subject.name}[{i}]", works, runner(part.graph, inputs)))
    return made


def taken(subject: Subject, parts: Sequence[StageGraph]) -> list[list[Any]]:
    """What each stage reads, from a run of the ones before it."""
    values: dict[Value, Any] = dict(zip(subject.graph.inputs, subject.inputs, strict=True))
    found = []
    for part in parts:
        inputs = [values[v] for v in part.takes]
        found.append(inputs)
        results = find_engine("eager").build(part.graph, "cpu")(inputs)
        values.update(zip(part.gives, results, strict=True))
    return found


def error(ratios: Sequence[float]) -> float:
    """The geometric mean error of predicted / measured."""
    return math.exp(sum(abs(math.log(r)) for r in ratios) / len(ratios)) - 1


@dataclass(frozen=True)
class Turn:
    """A calibration, and what stages took right after it."""

    device: Device
    took: Mapping[str, Reading]

    def ratio(self, case: Case, device: Device | None = None) -> float:
        return case.predicted(device or self.device) / self.took[case.name].value


def predict_stages(made: Sequence[Case], first: Device, path: str | None, seconds: float) -> float:
    runs = {c.name: c.run for c in made}
    turns: list[Turn] = []
    for i in range(_TURNS):
        device = calibrated(path, seconds / _TURNS) if i else first
        turns.append(Turn(device, sample_all(runs, rounds=31, seconds=seconds / _TURNS)))
    print("stage                     measured   predicted   ratio   of each turn   spread")
    ratios, once = [], []
    for c in made:
        each = [t.ratio(c) for t in turns]
        took = median(t.took[c.name].value for t in turns)
        spread = median(t.took[c.name].spread for t in turns)
        if took < _TINY_S:
            continue
        ratios.append(median(each))
        once.append(median(t.ratio(c, first) for t in turns))
        print(
            f"{c.name:24} {took * 1e6:8.1f} us {median(each) * took * 1e6:8.1f} us "
            f"{ratios[-1]:7.2f}   {' '.join(f'{r:.2f}' for r in each)} {spread:7.0%}"
        )
    print(f"{len(ratios)} stages: {summary(ratios)} (goal 25 %)")
    print(f"by the first calibration alone: {summary(once)}")
    return error(ratios)


def summary(ratios: Sequence[float]) -> str:
    low, high = (sorted(ratios)[int(len(ratios) * q)] for q in (0.1, 0.9))
    return (
        f"geometric mean error {error(ratios):.1%}, median ratio {median(ratios):.2f}, "
        f"a tenth below {low:.2f}, a tenth above {high:.2f}"
    )


def predict_operators(chosen: Sequence[Subject], device: Device, seconds: float) -> None:
    """Every operator where it stands, in the whole graph."""
    runs = {s.name: clocked(s.graph, s.inputs) for s in chosen}
    rows: dict[str, list[Clocked]] = {name: [] for name in runs}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(rows[chosen[0].name]) < 3:
        for name, run in runs.items():
            run()
            rows[name].append(run())
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for s in chosen:
        for node, took in zip(s.graph.nodes, quiet_seconds(rows[s.name]), strict=True):
            work = work_of(node, s.sizes)
            pairs.setdefault((work.kind, node.op), []).append((took, work.seconds(device)))
    kinds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (kind, _), found in pairs.items():
        kinds.setdefault((kind, ""), []).extend(found)
    by_loss = sorted(pairs.items(), key=lambda x: -abs(sum(p - t for t, p in x[1])))
    print("class      operator                                 count  measured  predicted  ratio  error")  # fmt: skip # noqa: E501
    for (kind, op), found in [*sorted(kinds.items()), *by_loss[:40]]:
        measured, predicted = (sum(x) * 1e6 for x in zip(*found, strict=True))
        print(
            f"{kind:10} {op:40} {len(found):5} {measured:9.0f} {predicted:10.0f} us "
            f"{predicted / measured:6.2f} {error([p / t for t, p in found]):6.0%}"
        )


def nets() -> list[Subject]:
    """A tower of linear layers, convolutions, an encoder: milliseconds for each microbatch."""
    from torch import nn

    layers = [m for _ in range(8) for m in (nn.Linear(512, 512), nn.ReLU())]
    convs = [m for _ in range(6) for m in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    layer = nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True)
    made = {
        "tower": (nn.Sequential(*layers), torch.randn(8 * BATCH, 512)),
        "convolutions": (nn.Sequential(*convs), torch.randn(BATCH, 32, 28, 28)),
        "encoder": (nn.TransformerEncoder(layer, 4), torch.randn(BATCH, 32, 256)),
    }
    batch = torch.export.Dim("batch", min=1, max=16 * BATCH)
    return [
        Subject(name, dfc.trace(net.eval(), (x,), dynamic_shapes=({0: batch},)), [x])
        for name, (net, x) in made.items()
    ]


def predict_pipelines(device: Device) -> float:
    """Two stages on threads: the step that the simulator gives for the stages' own times."""
    together, alone = zip(*(_pipeline(s, device) for s in nets()), strict=True)
    found = error(together)
    print(
        f"pipelines: geometric mean error {found:.1%} (goal 10 %), {error(alone):.1%} from stages "
        "that were measured one at a time"
    )
    return found


def _pipeline(s: Subject, device: Device, microbatches: int = 8) -> tuple[float, float]:
    """Predicted over measured, from stages measured at once and one at a time.

    Why:  a stage is timed as a lane runs it, microbatch after microbatch, while the other computes
          as well: alone it has the caches to itself, and on one input everything stays in them.
    """
    part = s.inputs[0].shape[0] // microbatches
    small = Subject(s.name, s.graph, [s.inputs[0][:part].clone()])
    found = plan(s.graph, lanes(device, 2), sizes=small.sizes, wish=Wish(microbatches))
    placed = stage_of(found)
    parts = split(s.graph, placed)
    program = schedule("forward", len(parts), microbatches)
    measured: list[float] = []
    predicted: dict[str, list[float]] = {"together": [], "alone": []}
    with ExitStack() as stack:
        runs = stage_lanes(parts, s.inputs, microbatches, stack)
        pipeline = stack.enter_context(
            Pipeline(s.graph, placed, microbatches=microbatches, threads=len(parts))
        )
        for _ in range(11):  # in turns: what else happens on the machine happens to all
            for how, measure in (("together", at_once), ("alone", one_by_one)):
                costs = Costs(measure(runs, microbatches))
                predicted[how].append(float(simulate(program, costs).makespan))
            pipeline.run_flat(s.inputs)
            pipeline.run_flat(s.inputs)
            measured.append(pipeline.report().seconds)
    each = {
        how: sorted(p / m for p, m in zip(times, measured, strict=True))
        for how, times in predicted.items()
    }
    print(
        f"{s.name:24} {len(parts)} stages, {microbatches} microbatches: measured "
        f"{median(measured) * 1e3:.2f} ms, predicted {median(predicted['together']) * 1e3:.2f} ms, "
        + "; ".join(f"{how} {median(r):.2f} ({r[0]:.2f} to {r[-1]:.2f})" for how, r in each.items())
    )
    return median(each["together"]), median(each["alone"])


_STEPS = 2  # of a stage, as many as are measured of the pipeline


def stage_lanes(
    parts: Sequence[StageGraph], batch: Sequence[Any], count: int, stack: ExitStack
) -> list[Lane]:
    """Each stage as a pipeline of its own, with what the stages before it make of a batch."""
    found, values = [], dict(zip(parts[0].takes, batch, strict=True))
    for part in parts:
        given = [values[v] for v in part.takes]
        placed = dict.fromkeys(part.graph.nodes, 0)
        pipeline = Pipeline(part.graph, placed, microbatches=count, threads=1)
        stack.enter_context(pipeline)
        values.update(zip(part.gives, pipeline.run_flat(given), strict=True))
        found.append(partial(pipeline.run_flat, given))
    return found


def one_by_one(lanes: Sequence[Lane], count: int) -> list[float]:
    return [mean(repeated(lane)) / count for lane in lanes]


def at_once(lanes: Sequence[Lane], count: int) -> list[float]:
    """Seconds of a microbatch of each, all kept busy until all have been timed."""
    left = threading.Barrier(len(lanes))
    done = [False] * len(lanes)

    def timed(index: int) -> float:
        left.wait()
        times = repeated(lanes[index])
        done[index] = True
        while not all(done):
            lanes[index]()
        return mean(times) / count

    with ThreadPoolExecutor(len(lanes), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(timed, range(len(lanes))))


def repeated(run: Lane) -> list[float]:
    times = []
    for _ in range(_STEPS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times


def calibrated(path: str | None, seconds: float = 40) -> Device:
    """The device of a target, or this machine's processor as measured now."""
    if path is None:
        text = target_text("here", [measure_device("cpu0", "cpu", seconds=seconds)], [])
    else:
        text = Path(path).read_text()
    target = plan_of("O0", target=text).target
    assert target is not None
    print(text)
    return machine_of(target).devices[0]


def main(arguments: Sequence[str]) -> None:
    def option(name: str) -> str | None:
        return arguments[arguments.index(name) + 1] if name in arguments else None

    torch.set_num_threads(1)
    print(machine_text(this_machine()))
    seconds = float(option("--seconds") or 60)
    values = {option("--target"), option("--seconds")}
    names = [a for a in arguments if not a.startswith("--") and a not in values]
    begin = time.perf_counter()
    chosen = subjects(names or MODELS)
    print(f"{len(chosen)} models traced in {time.perf_counter() - begin:.0f} s")
    device = calibrated(option("--target"), seconds / _TURNS)
    if "--by-op" in arguments:
        predict_operators(chosen, device, seconds)
        device = calibrated(option("--target"), seconds / _TURNS)
    made = [c for s in chosen for c in stages(s, device)]
    predict_stages(made, device, option("--target"), seconds)
    predict_pipelines(device)


if __name__ == "__main__":
    main(sys.argv[1:])
