"""Weights that a module does not own: tensors given to it, others that come and go as it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dfc.emit.kernels import KernelCall
from dfc.ir.graph import Node, Parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Visit:
    """Weights that are there from before `first` runs until `last` has run.

    `take` gives their tensors, in order; after `leave` their memory may be written over.
    """

    first: Node
    last: Node
    weights: tuple[Parameter, ...]
    take: Callable[[], tuple[Tensor, ...]]
    leave: Callable[[], None]


@dataclass(frozen=True)
class Supply:
    """Where a module's weights come from: what is `held` is used as it is, visits do not overlap.

    Weights that are in neither are the module's own. `calls` run in place of nodes; they may read
    weights that are not the graph's.
    """

    held: Mapping[Parameter, Tensor] = field(default_factory=dict)
    visits: tuple[Visit, ...] = ()
    calls: Mapping[Node, KernelCall] = field(default_factory=dict)
