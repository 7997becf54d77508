"""MiniLM in 16 bits: file size, nearness, and decisions kept, in ONNX Runtime.

    python benchmarks/minilm_half.py [movies=3000]

Each variant is written as plain ONNX, and run on the CPU by stock ONNX Runtime. A regression is
fitted on float32 embeddings of 2500 movie snippets; `agree` says how many of the test texts get the
same class from a variant's; `drop` is of accuracy, paired, with its one-sided 95 % bound. Nothing
is timed: this kind of CPU has no 16-bit arithmetic, and `autocast ... keep if faster` says so of
each model. The table goes to benchmarks/results/minilm-half.txt.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import dfc  # noqa: E402
from dfc.compress.statistics import agreement, closeness, paired  # noqa: E402
from tests import minilm  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "minilm-half.txt"
VARIANTS = {
    "float32": "",
    "autocast f16": "autocast f16",
    "autocast bf16": "autocast bf16",
    "f16 weights, f32 arithmetic": "autocast f16 with only_weights=yes",
    "bf16 weights, f32 arithmetic": "autocast bf16 with only_weights=yes",
}


def main(movies: int = 3000) -> None:
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    model, args, _, dynamic = minilm.build()
    graph = dfc.trace(model, args, None, dynamic)
    task = minilm.movies(test=movies)
    (train, labels), (texts, wanted) = task.train, task.test
    say(f"MiniLM in 16 bits: benchmarks/minilm_half.py, {movies} movie snippets, ONNX Runtime")
    say(f"{'variant':30} {'MB':>6} {'cosine':>9} {'1 %':>9} {'agree':>8}  accuracy")
    first = classify = None
    for name, step in VARIANTS.items():
        recipe = f"dfc 1\nrecipe half {{\n  apply simplify\n  {step}\n}}\n"
        with tempfile.TemporaryDirectory() as folder:
            compiled = dfc.compile(graph, args, recipe=recipe, engine="onnxruntime")
            compiled.export(Path(folder) / "m.onnx")
            size = sum(f.stat().st_size for f in Path(folder).iterdir()) / 1e6
        with torch.no_grad():
            found = minilm.embed_all(compiled, texts, task.tokens)
        if first is None or classify is None:
            with torch.no_grad():
                fitted = minilm.embed_all(compiled, train, task.tokens)
            first, classify = found, minilm.regression(fitted, labels)
        near = closeness(first, found)
        kept = agreement(classify(first), classify(found))
        right = paired(classify(first) == wanted, classify(found) == wanted)
        say(f"{name:30} {size:6.2f} {near.mean:9.6f} {near.low:9.6f} {100 * kept:6.2f} %  "
            f"{100 * right.after:.2f} %, {right}")  # fmt: skip
    say("goal: at most 45.6 MB, cosine 0.9999, agree 99.8 %")
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
