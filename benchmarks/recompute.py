"""Recomputation in pipelined training: a step's time and the activations that stages keep.

python benchmarks/recompute.py [FILE]     two minutes; also write what is printed to FILE

The same residual layers in two stages, one thread each, under several schedules: keeping all,
recomputing in both stages, recomputing cheap operators alone, and what "auto" takes to leave a rank
60 % of what keeping all takes. Ratios are
of medians of alternating rounds in one run; in brackets the lowest and the highest ratio of a
single round. Bytes are what stages held at once, by their tensors.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from _timing import alternating, ratio, say, stolen, write
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.planning.host import machine_text, this_machine
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer

WIDTH, LAYERS, ITEMS, M, ROUNDS = 256, 8, 64, 8, 7  # items of a microbatch
PART = 0.6  # of what keeping all takes, for "auto"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block() for _ in range(LAYERS)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.layers(x), y)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-3)


def compared(name: str, model: StagedModel, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Steps of three trainers in turn, after one of each that must give the same loss."""
    with ExitStack() as stack:

        def made(**options: Any) -> Trainer:
            trainer = Trainer(model, schedule=name, microbatches=M, optimizer=sgd, threads=2,
                              **options)  # fmt: skip
            return stack.enter_context(trainer)

        plain = made()
        losses = [plain.step(*batch)]
        room = int(PART * max(plain.report().peak_bytes))
        trainers = {"never": plain, "always": made(recompute=True)}
        trainers["selective"] = made(recompute="selective")
        trainers["auto"] = made(recompute="auto", memory=room)
        losses += [t.step(*batch) for way, t in trainers.items() if way != "never"]
        assert all(torch.equal(losses[0], other) for other in losses), "losses differ"
        runs = {way: lambda t=t: t.step(*batch) for way, t in trainers.items()}
        took = alternating(runs, ROUNDS)
        for way, trainer in trainers.items():
            report = trainer.report()
            held = ", ".join(f"{x / 1e6:.1f}" for x in report.peak_bytes)
            again = sorted(report.program.recomputes)
            ways = ", ".join(sorted(set(report.program.ways.values())))
            how = f", {ways}" if way == "auto" and again else ""
            say(
                f"  {way:9} stages {again}{how}: {median(took[way]) * 1e3:6.1f} ms, "
                f"{ratio(took[way], took['never'])} of keeping all; predicted "
                f"{report.timing.predicted * 1e3:.1f} ms; MB held by each stage: {held}"
            )


def main() -> None:
    say(machine_text(this_machine()))
    before = stolen()
    torch.manual_seed(0)
    x, y = torch.randn(M * ITEMS, WIDTH), torch.randn(M * ITEMS, WIDTH)
    shapes = ({0: torch.export.Dim("B", min=1, max=4096)},) * 2
    graph = dfc.trace(Model().train(), (x[:ITEMS], y[:ITEMS]), dynamic_shapes=shapes)
    nodes = list(graph.nodes)
    model = StagedModel(graph, {n: i * 2 // len(nodes) for i, n in enumerate(nodes)})
    for name in ("gpipe", "1f1b"):
        say(f"{name}, {M} microbatches of {ITEMS} items, {LAYERS} layers of {WIDTH}, 2 stages")
        compared(name, model, (x, y))
    lost, ticks = (b - a for a, b in zip(before, stolen(), strict=True))
    say(f"the host took {lost / max(ticks, 1):.0%} of the time")
    if len(sys.argv) > 1:
        write(sys.argv[1])


if __name__ == "__main__":
    main()
