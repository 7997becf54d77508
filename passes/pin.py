"""Say which device a part of the model must be on, for a `partition` that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.lang.selectors import Selector
from dfc.rewrite.pass_ import EXACT, Context, Pass

PINS = "pins"  # (selector, device) among the context's products


@dataclass(frozen=True)
class Pin(Pass):
    """`pin "layers.0.**" to gpu0`: whatever `partition` chooses, this part is on that device.

    Needs:    a device of the target, or of this host where there is none.
    Ensures:  a `partition` behind it puts the part on the device, or says why it cannot.
    Keeps:    the graph.
    Raises:   DfcError Q021 for a part that has no nodes.
    """

    name = "pin"
    numerics = EXACT
    phrases = {"": "select", "to": "device"}  # noqa: RUF012
    not_after = serves = ("partition",)

    select: Selector
    device: str

    def needs(self, target: Any) -> str | None:
        known = [d.name for d in target.devices]
        own = self.device.partition(".")[0]  # `gpu0.1` is the second part of it
        return None if own in known else f"no device `{own}`: it has {', '.join(known)}"

    def run(self, graph: Graph, ctx: Context) -> int:
        nodes = self.select.nodes_left(graph)
        if not nodes:
            raise DfcError("Q021", f"`{self.select}` finds nothing that could be pinned")
        for node in nodes:
            ctx.decided(node, "pinned", f"to `{self.device}` by the step")
        ctx.products[PINS] = (*ctx.products.get(PINS, ()), (self.select, self.device))
        return 0
