"""Is what a rule writes faster than what it replaces?

    python benchmarks/fusions.py [TITLE...] [--seconds 0.5]      rows whose title contains one

Each row is a module as models write it, on one number of rows. The base is its graph after the
passes that simplify; `fused` is the same graph after the named rules. Both run in eager PyTorch and
in ONNX Runtime, in alternating calls on one thread. What is counted is CPU time, which other work
on the machine disturbs least; a ratio is the median of the ratios of neighbouring calls. Below 1
the rules pay; `!` marks results that `dfc.rewrite.agree` refuses against float64. The table goes to
benchmarks/results/fusions-cpu.txt as well when all rows run.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfc
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.passes.fuse import Fuse
from dfc.rewrite.agree import judge
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import DEFAULT, find_pass
from dfc.runtime.engines import find_engine

RESULTS = Path(__file__).parent / "results" / "fusions-cpu.txt"
ENGINES = ("eager", "onnxruntime")
ROWS = (1, 32, 512)


@dataclass(frozen=True)
class Task:
    """A module, an input, and the rules that rewrite it."""

    title: str
    model: nn.Module
    x: Tensor
    rules: tuple[str, ...]


class Written(nn.Module):
    """A module given by its parts and a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.written = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


def qkv(m: nn.Module, x: Tensor) -> Tensor:
    """Attention's three projections, split into heads as the attention reads them."""
    heads = [p(x).unflatten(-1, (-1, 64)).transpose(1, 2) for p in (m.q, m.k, m.v)]
    return F.scaled_dot_product_attention(*heads, enable_gqa=heads[0].shape != heads[1].shape)


def gated(m: nn.Module, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def merging() -> Iterator[Task]:
    for width, keys, biased in ((256, 256, True), (768, 768, True), (2048, 512, False)):
        for rows in ROWS:
            model = Written(
                qkv,
                q=nn.Linear(width, width, biased),
                k=nn.Linear(width, keys, biased),
                v=nn.Linear(width, keys, biased),
            )
            title = f"merge qkv {width}->{width}+2*{keys}"
            yield Task(title, model, torch.randn(1, rows, width), ("merging",))
    for width, inner in ((256, 1024), (768, 2048), (2048, 5632)):
        for rows in ROWS[: 3 if width < 2048 else 2]:
            model = Written(
                gated,
                gate=nn.Linear(width, inner, False),
                up=nn.Linear(width, inner, False),
                down=nn.Linear(inner, width, False),
            )
            title = f"merge gate and up {width}->2*{inner}"
            yield Task(title, model, torch.randn(1, rows, width), ("merging",))


def activations() -> Iterator[Task]:
    written: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        "gelu by erf": lambda m, x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu by tanh": lambda m, x: (
            0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))
        ),
        "silu": lambda m, x: x * torch.sigmoid(x),
        "mish": lambda m, x: x * torch.tanh(F.softplus(x)),
        "hardswish": lambda m, x: x * F.relu6(x + 3) / 6,
        "softplus": lambda m, x: F.relu(x) + torch.log1p(torch.exp(-x.abs())),
        "leaky relu": lambda m, x: torch.where(x > 0, x, 0.2 * x),
        "glu": lambda m, x: (lambda a, b: a * torch.sigmoid(b))(*x.chunk(2, -1)),
    }
    for title, forward in written.items():
        for rows in ROWS:
            yield Task(title, Written(forward), torch.randn(1, rows, 3072), ("activations",))
    for rows in ROWS:
        model = Written(
            lambda m, x: m.b(m.a(x) * torch.sigmoid(1.702 * m.a(x))),
            a=nn.Linear(768, 3072),
            b=nn.Linear(3072, 768),
        )
        yield Task("quick gelu 768->3072->768", model, torch.randn(1, rows, 768), ("activations",))


def linears() -> Iterator[Task]:
    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[0]))

    for rows in ROWS:
        x = torch.randn(1, rows, 768)
        turned = Written(
            lambda m, x: torch.addmm(m.b, x.view(-1, 768), m.w).view(1, -1, 2304),
            w=parameter(768, 2304),
            b=parameter(2304),
        )
        yield Task("Conv1D of GPT-2 768->2304", turned, x, ("linear",))
        scaled = Written(lambda m, x: m.q(x) * 0.125, q=nn.Linear(768, 768))
        yield Task("scaled queries 768->768", scaled, x, ("linear",))
        layer = Written(lambda m, x: x + m.g * m.l(x), l=nn.Linear(768, 768), g=parameter(768))
        yield Task("layer scale 768->768", layer, x, ("linear",))
        bias = Written(lambda m, x: x @ m.w + m.b, w=parameter(768, 768), b=parameter(768))
        yield Task("product plus bias 768->768", bias, x, ("linear",))


def softmaxes() -> Iterator[Task]:
    def stable(m: nn.Module, x: Tensor) -> Tensor:
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    for rows in ROWS:
        x = torch.randn(8, rows, 512)
        yield Task("softmax by hand", Written(stable), x, ("softmax",))


def convolutions() -> Iterator[Task]:
    for size in (56, 224):
        x = torch.randn(1, 64, size, size)
        padded = Written(lambda m, x: m.c(F.pad(x, (1, 1, 1, 1))), c=nn.Conv2d(64, 64, 3))
        yield Task("pad, convolution", padded, x, ("convolution",))
        frozen = Written(
            lambda m, x: F.relu(m.c(x) * m.s + m.t),
            c=nn.Conv2d(64, 64, 3, padding=1, bias=False),
            s=nn.Parameter(torch.randn(1, 64, 1, 1)),
            t=nn.Parameter(torch.randn(1, 64, 1, 1)),
        )
        yield Task("convolution, frozen norm", frozen, x, ("convolution",))
    for patch, size in ((16, 224), (14, 224), (4, 224)):
        embed = Written(
            lambda m, x: m.c(x).flatten(2).transpose(1, 2), c=nn.Conv2d(3, 768, patch, patch)
        )
        x = torch.randn(1, 3, size, size)
        yield Task(f"patches of {patch} by convolution", embed, x, ("patches_as_linear",))


def tasks() -> Iterator[Task]:
    for family in (merging, activations, linears, softmaxes, convolutions):
        torch.manual_seed(0)
        yield from family()


def compare(task: Task, seconds: float) -> str:
    """One row of the table."""
    model, x = task.model.eval(), task.x
    graph = dfc.trace(model, (x,))
    base = run_passes(graph, [find_pass(p) for p in DEFAULT], mode="none").graph
    clean = [find_pass(p) for p in ("remove_noops", "fold_constants", "cse", "dce")]
    fused = run_passes(base, [Fuse(rules=task.rules), *clean], mode="none").graph
    shape = "x".join(map(str, x.shape))
    row = f"{task.title:<34} {shape:<14}"
    for engine in ENGINES:
        row += f"  {engine} {_ratio(engine, graph, base, fused, x, seconds)}"
    return row


def _ratio(engine: str, graph: Graph, base: Graph, fused: Graph, x: Tensor, seconds: float) -> str:
    build = find_engine(engine).build
    runners = [build(g, threads=1) for g in (base, fused)]
    original, witness = interpret(graph, [x]), interpret(graph, [x], double=True)
    verdict = judge(runners[1]([x]), original, witness, rtol=1e-5)
    pairs = _alternate(runners, [x], seconds)
    ratios = sorted(after / before for before, after in pairs)
    spread = ratios[(3 * len(ratios)) // 4] - ratios[len(ratios) // 4]
    mark = "" if verdict.agrees else "!"
    ms = median(before for before, _ in pairs) * 1e3
    return f"{ms:9.3f} ms  fused {median(ratios):.2f} ±{spread:.2f}{mark}"


def _alternate(runners: Sequence[Any], inputs: list[Tensor], seconds: float) -> list[list[float]]:
    """Seconds of CPU time of each runner's calls, side by side."""
    pairs: list[list[float]] = []
    for run in runners:
        run(inputs)
        run(inputs)
    end = time.perf_counter() + seconds * len(runners)
    while len(pairs) < 9 or time.perf_counter() < end:
        times = []
        for run in runners:
            start = time.process_time()
            run(inputs)
            times.append(time.process_time() - start)
        pairs.append(times)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("titles", nargs="*", help="only rows whose title contains one")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each runner of each row")
    options = parser.parse_args()
    head = (
        f"torch {torch.__version__}, ONNX Runtime {ort.__version__}, CPU, one thread: CPU time of "
        "the simplified graph, then the fused graph's by it with the distance between the quartiles"
    )
    print(head)
    lines = [head]
    for task in tasks():
        if options.titles and not any(t in task.title for t in options.titles):
            continue
        lines.append(compare(task, options.seconds))
        print(lines[-1], flush=True)
    if not options.titles:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        main()
