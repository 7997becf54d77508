"""Reading text: a file of 500 lines of recipes and rules, and graph text by the line.

    python benchmarks/parsing.py

Goals: the file in at most 0.3 s of processor time beyond imports, graph text at 10 000 lines a
second or more. `read` is text to syntax; `check` is all that `dfc check` does with it: names
resolved, patterns expanded, options converted, every rule's form checked.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))

from graph_scale import synthetic

import dfc
from dfc.lang.format import format_text
from dfc.lang.reader import read_document
from dfc.lang.source import Source
from dfc.recipe.resolve import check_source
from dfc.rewrite.rulesets import kept_apart

LINES = 500
ROUNDS = 9
RULE = """
# Rule {i}: a scaled pair of projections, read once.
rule merge_{i}(x, a, b, s) {{
  match   y = add(mul(linear(x, a), s), linear(x, b))
  where   rank(a) == 2 and rank(b) == 2 and constant(a) and constant(b)
  where   dim(a, 0) == dim(b, 0) and dtype(a) == dtype(b) and normal(s)
  rewrite y = linear(x, add!(mul!(a, s), b))
  within  1e-4
  applies x: f32[2, 3, 8], a: f32[4, 8], b: f32[4, 8], s=0.5
  refuses x: f32[2, 3, 8], a: f32[4, 8], b: f32[4, 8], s: f32[2, 3, 4]   # no constant
}}
"""
RECIPE = """
recipe small_{i} for edge {{
  minimize latency(p50)
  require top1 >= baseline - 0.5pp
  require peak_memory(gpu0) <= 12GiB
  apply simplify
  q: fuse attention, norms on "blocks.*.mlp.**" except op(softmax) with limit=tune(10, 20)
  when latency(q) > 20ms {{
    revert q
  }}
  verify each with samples=8
  emit onnx with opset=21
}}
"""
HEAD = """dfc 1
data val
metric top1 on val, higher is better
target edge {
  device gpu0 : cuda(mem=16GiB, peak=60TFLOPS, bw=600GB/s)
  device host : cpu(cores=8, mem=64GiB)
  link gpu0 <-> host : pcie(bw=25GB/s, latency=10us)
}
"""


def text() -> str:
    parts, i = [HEAD], 0
    while "".join(parts).count("\n") < LINES - 13:
        parts.append((RULE if i % 3 else RECIPE).format(i=i))
        i += 1
    return "".join(parts)


def timed(action) -> tuple[float, float]:
    """Median and largest processor time of several runs, the first left out."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return median(times[1:]), max(times[1:])


def checked(source: Source) -> None:
    with kept_apart():
        errors, _ = check_source(source)
    assert not errors, errors[0].render()


def main() -> None:
    given = text()
    lines = given.count("\n")
    source = Source(given, "bench.dfc")
    print(f"recipes and rules, {lines} lines, {len(given)} characters; processor seconds")
    rows = {
        "read": lambda: read_document(source),
        "check": lambda: checked(Source(given, "bench.dfc")),
        "format": lambda: format_text(given),
    }
    start = time.process_time()
    checked(source)
    print(f"{'first check, libraries and tables loaded':42} {time.process_time() - start:6.3f}")
    for name, action in rows.items():
        middle, most = timed(action)
        print(f"{name:42} {middle:6.3f}  (at most {most:.3f})", flush=True)
    print("\ngraph text, dfc.parse")
    for size in (1_000, 10_000, 100_000):
        graph = str(synthetic(size))
        count = graph.count("\n")
        start = time.process_time()
        dfc.parse(graph)
        taken = time.process_time() - start
        print(f"{count:>8} lines {taken:7.3f} s  {count / taken:>9.0f} lines/s", flush=True)


if __name__ == "__main__":
    main()
