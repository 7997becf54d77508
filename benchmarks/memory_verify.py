"""Peak memory of proving after each pass: how much is held beside one copy of the weights.

    python benchmarks/memory_verify.py [layers]      default 15 layers: 520 MB of weights in f32

Four cases, each in a process of its own, measured from the moment before the passes run:
weights of a module, weights in a file, weights that are folded into new ones, and a wrong rewrite
that is searched for. Goal: activations and one node's weights in double precision, not 2 x weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH = 2944  # a layer is over 32 MiB: memory that is let go is given back at once
CASES = ("module", "file", "folded", "wrong")


def network(layers: int, scaled: bool) -> Any:
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                w = layer.weight * 0.5 if scaled else layer.weight
                y = torch.nn.functional.linear(x, w, layer.bias)
                x = x + torch.relu(y).clone() * 0.1
            return x

    return Network().eval()


def wrong_pass() -> Any:
    """Swaps the operands of additions, which is right, and drops a relu half-way, which is not."""
    from dataclasses import dataclass

    from dfc.rewrite.pass_ import Pass

    @dataclass(frozen=True)
    class Wrong(Pass):
        name = "wrong"
        limit: int | None = None
        skip: tuple[int, ...] = ()

        def run(self, graph: Any, ctx: Any) -> int:
            done = number = 0
            found = [n for n in graph.nodes if n.op in ("aten.add.Tensor", "aten.relu.default")]
            for node in found:
                number += 1
                if done == self.limit or number - 1 in self.skip:
                    continue
                if number == len(found) // 2 * 2 - 1:
                    graph.replace(node, [node.inputs[0]])
                elif node.op == "aten.add.Tensor":
                    graph.set_inputs_of(node, tuple(reversed(node.inputs)))
                else:
                    graph.set_stage(node, 0)
                done += 1
            return done

    return Wrong()


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system has no {field}")


def measured(run: Callable[[], Any]) -> tuple[int, Any]:
    """The peak of resident memory over what it was before, and the result."""
    import gc

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    found = run()
    return memory("VmHWM") - before, found


def case(name: str, layers: int, folder: Path) -> None:
    import torch

    import dfc
    import dfc.ops
    from dfc.package import attach_weights
    from dfc.rewrite.driver import run_passes
    from dfc.rewrite.pass_ import DEFAULT, find_pass
    from dfc.rewrite.probe import make_probes

    torch.manual_seed(0)
    x = torch.randn(4, WIDTH)
    with torch.device("meta" if name in ("file", "folded") else "cpu"):
        model = network(layers, name == "folded")
    total = sum(p.numel() * 4 for p in model.parameters())
    graph = dfc.trace(model, (x.to(next(model.parameters()).device),))
    if name in ("file", "folded"):
        attach_weights(graph, folder / "weights.safetensors")
    probes = make_probes(graph, [x])
    steps = [wrong_pass()] if name == "wrong" else [find_pass(p) for p in DEFAULT]

    def run() -> Any:
        return run_passes(graph, steps, probes=probes, mode="each")

    peak, outcome = measured(run)
    verdicts = {r.verdict for r in outcome.reports} - {"unchanged"}
    left = len(outcome.left_out)
    print(f"{total} {peak} {'+'.join(sorted(verdicts))}, {left} left out")


def write_weights(layers: int, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    with torch.no_grad():
        save_file(dict(network(layers, False).named_parameters()), path)


def main(layers: int) -> dict[str, tuple[int, int]]:
    """What each case held at most beside what there was, with the weights' bytes."""
    found: dict[str, tuple[int, int]] = {}
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with tempfile.TemporaryDirectory(prefix="dfc-memory-") as folder:
        for name in ("write", *CASES):
            words = [sys.executable, __file__, name, str(layers), folder]
            done = subprocess.run(words, check=True, env=env, stdout=subprocess.PIPE, text=True)
            if name == "write":
                continue
            total, peak, verdict = done.stdout.strip().split(" ", 2)
            found[name] = (int(total), int(peak))
            share = int(peak) / int(total)
            print(f"{name:<7} weights {int(total) / 1e6:6.0f} MB, peak +{int(peak) / 1e6:6.0f} MB "
                  f"({share:.2f} x weights), {verdict}")  # fmt: skip
    return found


if __name__ == "__main__":
    if len(sys.argv) == 4:
        chosen, count, place = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
        if chosen == "write":
            write_weights(count, place / "weights.safetensors")
        else:
            case(chosen, count, place)
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
