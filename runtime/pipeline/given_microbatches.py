"""What the caller gives the stages of each microbatch: inputs, masks, and what it counts for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.ir.graph import Value
from dfc.ir.interpret import bind_inputs
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.differentiated import Gradient
from dfc.runtime.pipeline.dropout import Mask
from dfc.runtime.pipeline.staged_model import StagedModel

if TYPE_CHECKING:
    import torch

    Draw = Callable[[Mask, int, Mapping[str, int]], torch.Tensor]


def shares_of(
    parts: Sequence[Mapping[Value, Any]], dims: Mapping[Value, int | None], reduction: str
) -> list[float]:
    """What each microbatch counts for in the loss of its batch."""
    if reduction == "sum":
        return [1.0] * len(parts)
    counts = [_items(part, dims) for part in parts]
    return [count / sum(counts) for count in counts]


def _items(part: Mapping[Value, Any], dims: Mapping[Value, int | None]) -> int:
    return next((x.shape[dims[v]] for v, x in part.items() if dims[v] is not None), 1)


def given_to(
    model: StagedModel, parts: Sequence[Mapping[Value, Any]], shares: Sequence[float], first: int,
    draw: Draw,
) -> list[dict[Any, Any]]:  # fmt: skip
    """The values of each microbatch, numbered from `first` on: masks are drawn when asked for."""
    import torch

    dtype = model.loss.tensor_type.dtype.to_torch()
    found: list[dict[Any, Any]] = []
    for b, (part, share) in enumerate(zip(parts, shares, strict=True), first):
        sizes = bind_inputs(model.graph, list(part.values())) if model.masks else {}
        values = _Given(model, draw, b, sizes)
        values.update((model.inputs[v], x) for v, x in part.items())
        values[Gradient(model.loss, HOST)] = torch.tensor(share, dtype=dtype)
        found.append(values)
    return found


class _Given(dict[Any, Any]):
    """A microbatch's values; masks are drawn where they are used, and not kept."""

    def __init__(
        self, model: StagedModel, draw: Draw, microbatch: int, sizes: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.model, self.draw = model, draw
        self.microbatch, self.sizes = microbatch, sizes

    def __missing__(self, value: Value) -> Any:
        return self.draw(self.model.masks[value], self.microbatch, self.sizes)
