"""How far a compiled model is from the original, and at which element: what tables report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Largest:
    """The element that is farthest from the original's.

    Units:  absolute error; `scale` is the original's largest element in that output.
    """

    error: float
    scale: float
    output: str
    index: tuple[int, ...]
    probe: str

    def __str__(self) -> str:
        at = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return (
            f"{self.error:.2g} at {self.output}{at} with {self.probe}"
            f" (its largest value is {self.scale:.3g})"
        )

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


def largest_error(compiled: Any) -> Largest | None:
    """The largest error over all probes; None without probes or weights."""
    import torch

    from dfc.cli.inputs import output_names
    from dfc.rewrite.probe import clone

    if not compiled.probes or any(p.data is None for p in compiled.graph.parameters.values()):
        return None
    names = output_names(compiled.graph)
    worst: Largest | None = None
    for probe in compiled.probes:
        torch.manual_seed(0)
        results = compiled.run_flat(clone(probe.inputs))
        for found in differences(names, results, probe.original or (), probe.label):
            if worst is None or found.error > worst.error:
                worst = found
    return worst


def differences(
    names: Sequence[str], results: Sequence[Any], expected: Sequence[Any], probe: str
) -> Iterator[Largest]:
    """The largest error of each output; elements that are not finite are left out."""
    import torch

    for name, x, o in zip(names, results, expected, strict=False):
        if not isinstance(o, torch.Tensor) or not isinstance(x, torch.Tensor) or not o.numel():
            continue
        if x.shape != o.shape:
            continue
        x, o = x.detach().cpu(), o.detach().cpu()
        if o.is_complex():
            x, o = torch.view_as_real(x.resolve_conj()), torch.view_as_real(o.resolve_conj())
        wide, mine = o.double(), x.double()
        known = wide.isfinite() & mine.isfinite()
        zero = torch.zeros((), dtype=torch.float64)
        error = torch.where(known, (mine - wide).abs(), zero)
        scale = float(torch.where(known, wide.abs(), zero).max())
        at = torch.unravel_index(error.argmax(), error.shape)
        yield Largest(float(error.max()), scale, name, tuple(int(n) for n in at), probe)
