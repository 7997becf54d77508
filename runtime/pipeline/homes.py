"""Where the weights of stages on several devices lie while they are trained.

A weight is at home on the device of the first stage that reads it: its optimizer works there. For
stages on other devices that read it too, as with tied weights, there are copies, which are written
anew whenever the weight was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dfc.runtime.pipeline.differentiated import Differentiated

if TYPE_CHECKING:
    import torch


class Homes:
    """The parameters of stages, `devices[i]` being the device of `parts[i]`."""

    def __init__(
        self, weights: Mapping[str, torch.Tensor], parts: Sequence[Differentiated],
        devices: Sequence[str],
    ) -> None:  # fmt: skip
        import torch

        at: dict[str, list[str]] = {}
        for part, device in zip(parts, devices, strict=True):
            for name in part.joint.weights:
                found = at.setdefault(name, [])
                if device not in found:
                    found.append(device)
        self.parameters: dict[str, torch.nn.Parameter] = {
            name: torch.nn.Parameter(x.to(at[name][0], copy=True))
            for name, x in weights.items() if name in at
        }  # fmt: skip
        self._held = {name: p.detach() for name, p in self.parameters.items()}
        self._copies = {
            (name, device): self.parameters[name].detach().to(device, copy=True)
            for name, places in at.items() for device in places[1:]
        }  # fmt: skip

    def on(self, device: str) -> dict[str, torch.Tensor]:
        """What stages of a device read: weights that are at home there, and copies."""
        found = {n: x for n, x in self._held.items() if str(x.device) == device}
        found.update((n, x) for (n, d), x in self._copies.items() if d == device)
        return found

    def changed(self) -> None:
        """Let stages read what parameters are now, of whatever memory: write the copies anew."""
        for name, held in self._held.items():
            parameter = self.parameters[name]
            if parameter.data_ptr() != held.data_ptr():  # `p.data = ...`
                parameter.data = held.copy_(parameter.detach())
        for (name, _), copy in self._copies.items():
            copy.copy_(self.parameters[name].detach())
