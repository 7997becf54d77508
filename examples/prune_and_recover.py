"""Prune a small network, and let its own teacher bring back what it lost.

    python examples/prune_and_recover.py

A convolutional net is trained on generated pictures (ten shapes, shifted and noisy). A recipe takes
out 40 % of its channels and hidden units by what flows through them, refits what reads them, then
trains the smaller graph for a few seconds on the original's logits, without labels. The result is
kept only if its accuracy is within one point of the original's.

On the command line the same is
    dfc compile examples/prune_and_recover.py:build -r small.dfc -o small.dfcpkg \\
        --data pictures=examples/prune_and_recover.py:pictures \\
        --data test=examples/prune_and_recover.py:test \\
        --metric top1=examples/prune_and_recover.py:top1 \\
        --function distil=examples/prune_and_recover.py:distil
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfc

RECIPE = """
dfc 1
data pictures, test
metric top1 on test, higher is better

recipe small {
  minimize size
  require top1 >= baseline - 1pp
  fold_batch_norm
  dce
  prune using pictures by activation with ratio=0.4, refit=yes
  recover by distil using pictures
}
"""


def sample(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of ten random shapes, moved by up to two pixels, under noise; and which it is."""
    shapes = F.interpolate(
        torch.randn(10, 1, 5, 5, generator=torch.Generator().manual_seed(0)), size=(12, 12)
    )
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=random)
    moved = torch.randint(0, 5, (count, 2), generator=random)
    x = torch.randn(count, 1, 16, 16, generator=random) * 1.2
    for i, (a, b) in enumerate(moved.tolist()):
        x[i, :, a : a + 12, b : b + 12] += shapes[labels[i]]
    return x, labels


@cache
def trained() -> nn.Module:
    """The network, trained from scratch in a few seconds."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(150):
        x, y = sample(64, seed=1000 + step)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def build() -> tuple[nn.Module, tuple[Tensor], None, dict[str, dict[int, object]]]:
    """What `dfc compile` traces."""
    return trained(), (sample(4, 1)[0],), None, {"input": {0: torch.export.Dim("B", max=512)}}


def pictures() -> list[Tensor]:
    """Calibration and distillation: pictures without labels."""
    return list(sample(1024, seed=2)[0].split(64))


def test() -> list[tuple[Tensor, Tensor]]:
    """Pictures that neither training nor pruning has seen."""
    x, y = sample(1000, seed=3)
    return list(zip(x.split(250), y.split(250), strict=True))


def top1(run: Callable[[Tensor], Tensor], data: Sequence[tuple[Tensor, Tensor]]) -> float:
    right = sum(int((run(x).argmax(-1) == y).sum()) for x, y in data)
    return right / sum(len(y) for _, y in data)


def distil(module: nn.Module, batches: Sequence[Tensor]) -> None:
    """Bring the student's logits near the teacher's."""
    teacher = trained()
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3)
    for _ in range(6):
        for x in batches:
            with torch.no_grad():
                wanted = teacher(x)
            loss = F.mse_loss(module(x), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    model, args, kwargs, shapes = build()
    compiled = dfc.compile(
        model, args, kwargs, shapes, recipe=RECIPE,
        data={"pictures": pictures(), "test": test()}, metrics={"top1": top1},
        functions={"distil": distil}, engine="eager",
    )  # fmt: skip
    print(compiled.report)
    before, after = top1(model, test()), top1(compiled, test())
    print(f"top1 {before:.1%} before, {after:.1%} after")
    print(f"bytes {compiled.report.bytes_before} before, {compiled.report.bytes_after} after")


if __name__ == "__main__":
    main()
