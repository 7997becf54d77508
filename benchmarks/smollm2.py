"""What four bits and zeros cost a language model that was really trained: SmolLM2-135M.

    python benchmarks/smollm2.py             measure what is missing, print the table
    python benchmarks/smollm2.py NAME...     measure these again: see VARIANTS
    python benchmarks/smollm2.py --table     print what was measured, measure nothing

Perplexity on 8 windows of 512 tokens, one of each of 8 encyclopaedia articles; methods that need
data see 16 windows of 16 other articles. The 210 linear layers of the blocks change, the tied
table does not. Each variant is what a recipe's step gives, evaluated with the weights that the
codes stand for (tests/test_smollm2.py compares that with the packed layers). Losses by window are
kept in results/smollm2.json, so that the measuring can be interrupted. Needs the assets `smollm2`
and `wiki100`.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import smollm2

RESULTS = Path(__file__).parent / "results"
LOSSES, TABLE = RESULTS / "smollm2.json", RESULTS / "smollm2.txt"
BLOCKS = '"model.layers.**"'
FOUR = "with scheme=weights, group=64, embeddings=no"
FLOAT, NEAREST = "float", "int4 g64, nearest"
# name -> the step
VARIANTS: Mapping[str, str] = {
    FLOAT: "",
    "int8 per channel": "quantize int8 with scheme=weights, embeddings=no",
    NEAREST: "",  # the full range of each group: no method of the step
    "int4 g64, rtn": f"quantize int4 {FOUR}, method=rtn",
    "int4 g64, gptq": f"quantize int4 using calib {FOUR}, method=gptq",
    "int4 g64, awq": f"quantize int4 using calib {FOUR}, method=awq",
    "50 %, magnitude": f"sparsify {BLOCKS} by magnitude with ratio=0.5",
    "50 %, wanda": f"sparsify {BLOCKS} using calib by wanda with ratio=0.5",
    "50 %, sparsegpt": f"sparsify {BLOCKS} using calib by sparsegpt with ratio=0.5",
    "2:4, wanda": f'sparsify {BLOCKS} using calib by wanda with pattern="2:4"',
    "2:4, sparsegpt": f'sparsify {BLOCKS} using calib by sparsegpt with pattern="2:4"',
}
LIMITS = {"int8 per channel": 1.005, "50 %, sparsegpt": 1.8, "2:4, sparsegpt": 4.0}
CLOSED = {"int4 g64, gptq": 0.5, "int4 g64, awq": 0.5}  # of the log-perplexity that nearest loses


@cache
def traced() -> Any:
    """The graph of the model as it was trained, for one window."""
    import dfc

    return dfc.trace(smollm2.model(), (smollm2.windows(smollm2.CALIBRATE[:1], 1),))


def graph_of(name: str, calibration: Any) -> Any:
    """The model's graph after the variant's step, in floats."""
    from dfc.rewrite.pass_ import Context

    graph = traced().copy()
    if name == NEAREST:
        round_blocks(graph)
    elif VARIANTS[name]:
        shown = [time.monotonic()]

        def progress(done: int, total: int) -> None:
            if time.monotonic() - shown[0] > 20:
                shown[0] = time.monotonic()
                print(f"  {name}: {done} of {total}", file=sys.stderr, flush=True)

        ctx = Context(data={"calib": list(calibration.split(1))}, progress=progress)
        step_of(VARIANTS[name]).run(graph, ctx)
    smollm2.in_floats(graph)
    return graph


def step_of(sentence: str) -> Any:
    from dfc.lang.source import Source
    from dfc.recipe.resolve import resolve

    data = "data calib\n" if "calib" in sentence else ""
    plan = resolve(Source(f"dfc 1\n{data}recipe r {{\n {sentence}\n}}", "smollm2.dfc"))
    (step,) = plan.passes()
    return step.build({})


def round_blocks(graph: Any) -> None:
    """Every weight of the blocks to the nearest of 16 values over its group's full range."""
    from dfc.compress.grid import Grid, round_to_nearest

    for node in list(graph.nodes):
        if node.op == "aten.linear.default" and ".layers." in f".{node.loc.module}":
            weight = round_to_nearest(node.inputs[1].data.tensor(), Grid(4, 64)).weight
            made = graph.add_constant(f"{node.inputs[1].name}.nearest", weight)
            graph.set_inputs_of(node, [node.inputs[0], made, *node.inputs[2:]])


def measure(name: str, judged: Any, calibration: Any) -> dict[str, Any]:
    from dfc.ir.interpret import interpret

    traced()
    start = time.process_time()
    graph = graph_of(name, calibration)
    made = time.process_time()
    losses = smollm2.losses(lambda row: interpret(graph, [row])[0], judged)
    end = time.process_time()
    return {
        "losses": losses.tolist(),
        "tokens": smollm2.digest(judged),
        "calibration": smollm2.digest(calibration),
        "step_cpu_s": round(made - start, 1),
        "judge_cpu_s": round(end - made, 1),
    }


def table(found: Mapping[str, Any], judged: Any, calibration: Any) -> str:
    from dfc.compress.statistics import perplexity_ratio

    predicted = judged.shape[1] - 1
    rows = [
        f"SmolLM2-135M on {cpu()}, beside other work: seconds are rough, perplexities are not.",
        f"{len(judged)} windows of "
        f"{judged.shape[1]} tokens ({smollm2.digest(judged)}), calibrated on {calibration.numel()} "
        f"tokens of other articles ({smollm2.digest(calibration)})",
        "ratio: perplexity / float, with its 95 % interval (bootstrap over windows); closed: how",
        "much of the log-perplexity that `nearest` loses is won back; s: CPU seconds of the step",
        "",
        "variant              perplexity   ratio         interval  closed     s  goal",
    ]

    def pairs(name: str) -> list[tuple[float, int]]:
        return [(loss * predicted, predicted) for loss in found[name]["losses"]]

    def mean(name: str) -> float:
        return math.fsum(found[name]["losses"]) / len(found[name]["losses"])

    for name in VARIANTS:
        if name not in found or FLOAT not in found:
            continue
        ratio, low, high = perplexity_ratio(pairs(FLOAT), pairs(name))
        interval = "" if name == FLOAT else f"{low:7.4f}..{high:7.4f}"
        closed = None
        if name.startswith("int4") and NEAREST in found:
            closed = 1 - (mean(name) - mean(FLOAT)) / (mean(NEAREST) - mean(FLOAT))
        rows.append(
            f"{name:20} {math.exp(mean(name)):10.3f} {ratio:7.4f} {interval:16} "
            f"{'' if closed is None else f'{closed:7.0%}':>7} {found[name]['step_cpu_s']:5.0f}  "
            f"{_goal(name, ratio, closed)}".rstrip()
        )
    rows += [f"{n}: {x['note']}" for n, x in found.items() if "note" in x]
    rows += ["", "zeros are stored and multiplied like other weights: no speed on this target"]
    return "\n".join(rows) + "\n"


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def _goal(name: str, ratio: float, closed: float | None) -> str:
    if name in LIMITS:
        return f"ratio <= {LIMITS[name]}: {'met' if ratio <= LIMITS[name] else 'missed'}"
    if name in CLOSED and closed is not None:
        return f"closed >= {CLOSED[name]:.0%}: {'met' if closed >= CLOSED[name] else 'missed'}"
    return ""


def main(names: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    judged = smollm2.windows(smollm2.JUDGE, 1)
    calibration = smollm2.windows(smollm2.CALIBRATE, 1)
    found = json.loads(LOSSES.read_text()) if LOSSES.exists() else {}
    wanted = [] if names == ["--table"] else names or [n for n in VARIANTS if n not in found]
    for name in wanted:
        print(f"{name}: measuring", file=sys.stderr, flush=True)
        found[name] = measure(name, judged, calibration)
        LOSSES.write_text(json.dumps(found, indent=1) + "\n")
    digests = (smollm2.digest(judged), smollm2.digest(calibration))
    found = {k: v for k, v in found.items() if (v["tokens"], v["calibration"]) == digests}
    TABLE.write_text(table(found, judged, calibration))
    print(TABLE.read_text(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
