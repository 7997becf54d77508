"""Graph to an `nn.Module` that trains: called like the model, its weights by the model's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dfc.calling import build_outputs, flat_inputs
from dfc.emit.fx import to_fx
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Parameter

# op -> which operands are its weights: what is trained of constants that passes have made
_WEIGHTS = {
    "aten.linear": (1, 2), "dfc.linear_gelu": (1, 2), "aten.conv1d": (1, 2), "aten.conv2d": (1, 2),
    "aten.conv3d": (1, 2), "aten.convolution": (1, 2), "aten.layer_norm": (1, 2),
    "aten.embedding": (0,), "dfc.skip_layer_norm": (2, 3, 4),
}  # fmt: skip


class TrainableGraph(nn.Module):
    """A graph whose weights are `nn.Parameter`s, under the names that they have in the model.

    Needs:  weights; a graph that writes to none of them.
    Keeps:  the graph: the parameters are copies, until they are read back; what the model froze is
            none of them, unless it froze all, as for inference.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        refuse_own_gradients(graph)
        self._dfc_graph = graph
        module = to_fx(graph)
        self._dfc_trained: dict[str, nn.Parameter] = {}
        self._dfc_places: dict[str, tuple[nn.Module, str]] = {}
        asks = any(p.kind == "parameter" and p.tensor_type.dtype.has_derivative
                   for p in graph.parameters.values())  # fmt: skip
        chosen = set(trainable(graph, frozen=not asks))
        for i, p in enumerate(graph.parameters.values()):
            if p not in chosen:
                continue
            assert p.data is not None
            own = nn.Parameter(p.data.tensor().detach().clone())
            del module._buffers[f"p{i}"]
            module.register_parameter(f"p{i}", own)
            self._dfc_trained[p.name] = own
            self._dfc_places[p.name] = _register(self, p.name, own)
        self._dfc_run = [module]  # in a list: its parameters are ours already, by better names

    def weights(self) -> Mapping[str, nn.Parameter]:
        """The parameters by the names that they have in the graph."""
        return self._dfc_trained

    def displaced(self) -> list[str]:
        """The weights that are no longer where they were: what is there instead is never read."""
        places = self._dfc_places.items()
        return [
            name for name, (module, attribute) in places
            if module._parameters.get(attribute) is not self._dfc_trained[name]
        ]  # fmt: skip

    def flat(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The graph's outputs, then what it writes, for its inputs in order."""
        found: Sequence[Any] = self._dfc_run[0](*inputs)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = flat_inputs(self._dfc_graph, args, kwargs)
        results = self.flat(inputs)
        outputs = results[: len(self._dfc_graph.outputs)]
        return build_outputs(self._dfc_graph, inputs, iter(outputs))


def _register(root: nn.Module, name: str, parameter: nn.Parameter) -> tuple[nn.Module, str]:
    """Put a parameter where its dotted name says; the module and the attribute that it became."""
    path = name.split(".")
    while len(path) > 1:
        inner = root._modules.get(path[0])
        if inner is None:
            if hasattr(root, path[0]):  # a weight that a pass has made of another's
                path = ["_".join(path)]
                break
            inner = nn.Module()
            root.add_module(path[0], inner)
        root, path = inner, path[1:]
    free = path[0]
    while hasattr(root, free):
        free += "_"
    root.register_parameter(free, parameter)
    return root, free


def refuse_own_gradients(graph: Graph) -> None:
    """
    Raises:  DfcError N079 (exit status 2) for a graph of code that defines gradients itself.
    """
    if graph.own_gradients:
        more = len(graph.own_gradients) - 1
        told = f"{graph.own_gradients[0]}{f' (and {more} more)' if more else ''}"
        message = f"the model defines gradients itself, which its graph does not know: {told}"
        help = (
            "a torch.library.custom_op with register_autograd keeps its gradient; one that is "
            "straight through may be written as x + (f(x) - x).detach(); hooks are to be removed"
        )
        raise DfcError("N079", message, help=help, status=2)


def trainable(graph: Graph, frozen: bool = False) -> Sequence[Parameter]:
    """Float and complex parameters that are read, and constants that are a layer's weights.

    With `frozen` those too that ask for no gradient.
    """
    kinds = ("parameter", "frozen") if frozen else ("parameter",)
    weights = {
        node.inputs[i]
        for node in graph.walk()
        for i in _WEIGHTS.get(node.op.removesuffix(".default"), ())
    }
    written = {m.target for m in graph.mutations}
    return [
        p for p in graph.parameters.values()
        if p.use_count and p.tensor_type.dtype.has_derivative and p not in written
        and (p.kind in kinds or (p.kind == "constant" and p in weights))
    ]  # fmt: skip
