"""What an engine may put in the place of a node when a graph is written for PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.ir.graph import Node, Value

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KernelCall:
    """A function, and what it is called with: values of the graph, tensors of its own, constants.

    It may read what the node's operands are computed from; then nobody computes them. Nor are those
    values computed that its one result is besides the node's: `also`, of nodes behind it.
    """

    function: Callable[..., Any]
    operands: tuple[Value | Tensor | float | None, ...]
    also: tuple[Value, ...] = ()


# None where the kernel does not take this node: it then means what its op means.
Kernel = Callable[[Node], KernelCall | None]
Kernels = Mapping[str, Kernel]  # by the name of the op
