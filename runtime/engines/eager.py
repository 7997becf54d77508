"""The reference engine: PyTorch runs the graph operator by operator. It always works."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.ir.graph import Graph, Node, Value
from dfc.planning.engine import Engine, Runner

if TYPE_CHECKING:
    from torch import fx

    from dfc.emit.kernels import Kernels

# What reads memory as it lies: its meaning changes with the layout.
_OF_LAYOUT = ("aten.as_strided", "aten.view.dtype", "aten.stride", "aten._reshape_alias")


class Eager(Engine):
    """Runs the graph as an `fx.GraphModule`."""

    name = "eager"
    devices = ("cpu", "cuda")

    def supports(self, node: Node) -> str | None:
        return None

    @property
    def variants(self) -> Mapping[str, Engine]:
        """The other forms of the graph: `eager:channels_last`, `eager:floats`, and each of them
        recorded, as `eager:cuda_graph` is.
        """
        from dfc.runtime.cuda_graph import CudaGraph

        images, floats = ChannelsLast(), Floats()
        return {
            "channels_last": images,
            "cuda_graph": CudaGraph(self),
            "channels_last:cuda_graph": CudaGraph(images),
            "floats": floats,
            "floats:cuda_graph": CudaGraph(floats),
        }

    def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Runner:
        return self.build_donating(graph, device, threads, ())

    def build_donating(
        self, graph: Graph, device: str, threads: int | None, donated: Collection[Value]
    ) -> Runner:
        from dfc.runtime.allocation import keep_pages
        from dfc.runtime.modes import as_captured

        if device == "cpu":
            keep_pages()
        # Not the module itself: where its code fails, fx imports what compiles models, which takes
        # a second or more, tells standard error, and loses the line.
        forward = self.module(graph, device, donated).forward

        def run(inputs: Sequence[Any]) -> list[Any]:
            with as_captured():
                return self.results(forward(*inputs))

        return run

    def results(self, found: Sequence[Any]) -> list[Any]:
        return list(found)

    def module(self, graph: Graph, device: str, donated: Collection[Value] = ()) -> fx.GraphModule:
        from dfc.emit.fx import to_fx
        from dfc.runtime.direct import call_directly

        module = to_fx(graph, device, self.kernels(device), donated=donated)
        call_directly(module)
        return module

    def kernels(self, device: str) -> Kernels:
        from dfc.runtime.kernels.graph import kernels

        return kernels(device)


class Floats(Eager):
    """Runs linear layers whose quantized weights meet floats as what they were: unpacked once.

    Why:  on a GPU `eager` reads such weights as they are stored, which takes a quarter of the
          memory; which of the two is faster depends on the device and on the number of rows.
    """

    name = "eager:floats"

    def kernels(self, device: str) -> Kernels:
        from dfc.runtime.kernels.graph import unpacked_kernels

        return unpacked_kernels(device)


class ChannelsLast(Eager):
    """Runs images with their channels last: what convolutions' kernels read without reordering.

    Why:  weights in that layout make PyTorch's convolutions answer in it, and elementwise
          operators keep it, so that only the first input is turned.
    """

    name = "eager:channels_last"

    def supports(self, node: Node) -> str | None:
        if node.op.startswith(_OF_LAYOUT):
            return "it reads memory as it lies, which is not in order when channels are last"
        return None

    def results(self, found: Sequence[Any]) -> list[Any]:
        """In order, as whoever takes their memory expects."""
        import torch

        return [x.contiguous() if isinstance(x, torch.Tensor) else x for x in found]

    def module(self, graph: Graph, device: str, donated: Collection[Value] = ()) -> fx.GraphModule:
        import torch

        from dfc.emit.fx import to_fx
        from dfc.errors import DfcError
        from dfc.runtime.direct import call_directly

        for node in graph.walk():
            reason = self.supports(node)
            if reason:
                raise DfcError("K003", f"engine `{self.name}` cannot run `{node.op}`: {reason}")
        module = to_fx(graph, device, self.kernels(device), donated=donated)
        for part in module.modules():
            if isinstance(part, torch.fx.GraphModule):
                _turn(part)
        call_directly(module)
        return module


def _turn(module: fx.GraphModule) -> None:
    """Convolutions' weights with channels last; views that copy where they must."""
    import torch

    aten = torch.ops.aten
    for node in module.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        elif node.op == "call_function" and "conv" in str(node.target) and len(node.args) > 1:
            weight = node.args[1]
            if getattr(weight, "op", None) != "get_attr":
                continue
            tensor = getattr(module, weight.target)
            if tensor.dim() == 4:
                turned = tensor.contiguous(memory_format=torch.channels_last)
                setattr(module, weight.target, turned)


ENGINE = Eager()
