"""Train a small language model in two pipeline stages on this machine.

    python examples/train_pipeline.py [--schedule zb1p] [--checkpoint FOLDER]

The model returns its loss, so the loss belongs to the last stage. `balanced` measures every
operator and cuts where both stages take as long; any schedule then runs them: forwards (F),
gradients of inputs (I) and of weights (W), each in its own time. Gradients are those of one
process. The table that is embedding and head belongs to the first and the last stage: its gradients
are added up.

With --checkpoint it goes on from that folder, if there is one, and writes it every ten steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfc
from dfc.planning.balanced import balanced
from dfc.runtime.pipeline.training import Trainer


class Decoder(nn.Module):
    """Predicts the next of 64 symbols."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(64, width)
        nn.init.normal_(self.table.weight, std=0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
            for _ in range(layers)
        )

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return F.cross_entropy((x @ self.table.weight.T).flatten(0, 1), target.flatten())


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Sequences that count up in steps of 1 to 5: easy to learn."""
    random = torch.Generator().manual_seed(step)
    start = torch.randint(64, (32, 1), generator=random)
    ids = (start + torch.randint(1, 6, (32, 1), generator=random) * torch.arange(17)) % 64
    return ids[:, :-1], ids[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedule", default="zb1p", help="gpipe, 1f1b, zb1p, auto, ...")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint", type=Path, help="a folder to save to, and to go on from")
    options = parser.parse_args()
    torch.manual_seed(0)
    size = torch.export.Dim("B", max=256)
    graph = dfc.trace(Decoder(), batch(0), dynamic_shapes=({0: size}, {0: size}))
    with Trainer(
        graph, balanced(graph, 2, batch(0)), schedule=options.schedule, microbatches=8,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 3e-3),
    ) as trainer:  # fmt: skip
        if options.checkpoint and options.checkpoint.exists():
            trainer.load(options.checkpoint)
        for step in range(trainer.steps, options.steps):
            loss = trainer.step(*batch(step))
            if step % 10 == 0 or step == options.steps - 1:
                print(f"step {step:3}: loss {loss:.3f}")
                if options.checkpoint:
                    trainer.save(options.checkpoint)
        if trainer.last is not None:
            print(trainer.report())


if __name__ == "__main__":
    main()
