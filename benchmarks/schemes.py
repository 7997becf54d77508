"""What `quantize` does by default, and its other schemes: MiniLM's nearness and times by engine.

    python benchmarks/schemes.py [texts=200] [rounds=15] [engines=eager,inductor,onnxruntime]

`weights` multiplies floats, `dynamic` rounds what layers read to int8; int4 in groups of 32, int8
by rows, fp8 as e4m3. Nearness is the cosine of embeddings to float32's, on movie snippets. Times
alternate between all variants on one engine, each after a run that does not count; a ratio above 1
is faster than float32. The table goes to benchmarks/results/schemes.txt.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import dfc  # noqa: E402
from dfc.planning.host import machine_text, this_machine  # noqa: E402
from tests import minilm  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "schemes.txt"
VARIANTS = {
    "float32": "",
    "int4": "quantize int4",
    "int4 weights": "quantize int4 with scheme=weights",
    "int8": "quantize int8",
    "int8 weights": "quantize int8 with scheme=weights",
    "fp8": "quantize fp8",
}
SHAPES = ((1, 32), (8, 64))


def main(texts: int, rounds: int, engines: list[str]) -> None:
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    model, args, _, dynamic = minilm.build()
    graph = dfc.trace(model, args, None, dynamic)
    graphs = {name: quantized(graph, args, step) for name, step in VARIANTS.items()}
    say(f"MiniLM by schemes: benchmarks/schemes.py, {machine_text(this_machine())}")
    nearness(graphs, args, texts, say)
    for engine in engines:
        built = {n: dfc.compile(g, args, passes=[], engine=engine, verify="none")
                 for n, g in graphs.items()}  # fmt: skip
        for shape in SHAPES:
            times(engine, built, shape, rounds, say)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def quantized(graph: Any, args: Any, step: str) -> Any:
    recipe = f"dfc 1\nrecipe small {{\n apply simplify\n {step}\n}}\n"
    return dfc.compile(graph, args, recipe=recipe, engine="eager", verify="none").graph


def nearness(graphs: dict[str, Any], args: Any, texts: int, say: Any) -> None:
    snippets = minilm.movies(train=1, test=texts).test[0]
    wanted = None
    say(f"\n{'':14} {'MB':>6} {'cosine':>8}   of {texts} snippets, eager")
    for name, graph in graphs.items():
        run = dfc.compile(graph, args, passes=[], engine="eager", verify="none")
        found = minilm.embed_all(run, snippets, 64)
        wanted = found if wanted is None else wanted
        size = sum(int(p.tensor_type.nbytes) for p in graph.parameters.values()) / 1e6
        say(f"{name:14} {size:6.2f} {(found * wanted).sum(1).mean():8.4f}")


def times(
    engine: str, built: dict[str, Any], shape: tuple[int, int], rounds: int, say: Any
) -> None:
    inputs = minilm.example(*shape)
    spent: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(rounds):
        for name, run in built.items():
            run(*inputs)
            start = time.perf_counter()
            run(*inputs)
            spent[name].append(time.perf_counter() - start)
    base = spent["float32"]
    say(f"\n{engine}, batch {shape[0]} of {shape[1]} tokens, {rounds} alternating rounds")
    for name, took in spent.items():
        ratios = [b / t for b, t in zip(base, took, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        say(
            f"{name:14} {1e3 * median(took):8.2f} ms  {median(ratios):5.2f}x ({low:.2f}-{high:.2f})"
        )


if __name__ == "__main__":
    given = dict(w.split("=", 1) for w in sys.argv[1:])
    torch.manual_seed(0)
    main(
        int(given.get("texts", 200)), int(given.get("rounds", 15)),
        given.get("engines", "eager,inductor,onnxruntime").split(","),
    )  # fmt: skip
