"""Train what was pruned for a while: the user's own function, on the graph as an `nn.Module`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError, did_you_mean
from dfc.ir.graph import Graph, Parameter
from dfc.ir.weights import TensorData
from dfc.origin import failure_of
from dfc.rewrite.pass_ import CHANGES, Context, Data, Pass

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.emit.trainable import TrainableGraph


_SPARSE = 0.2  # the share of zeros from which on a matrix counts as sparse
_MERGE = (
    "the module computes with the weights that it was given: train those in place; what "
    "parametrizations and adapters add is copied into them first (`weight.data.copy_(merged)`)"
)


@dataclass(frozen=True)
class Recover(Pass):
    """Let a function that the caller passes by name train the weights, and read them back.

    The function is called with an `nn.Module` that is called like the model and has its weights by
    the model's names, and with the data, where the step names some.
    Needs:    weights; `functions={"distil": train}` in `dfc.compile`, or `--function`.
    Ensures:  the weights are those that the function left; ops and shapes are as before.
    Keeps:    the graph, when the function raises or leaves numbers that are not finite.
    Raises:   DfcError Q074 for a function that was not passed or takes other arguments, D084 for
              data; K040 (status 8) when the function raises, returns another module, or leaves
              weights that are not finite or of another shape.
    """

    name = "recover"
    numerics = CHANGES
    idempotent = False
    not_after = ("quantize",)
    phrases = {"": "function", "by": "function", "using": "calib"}  # noqa: RUF012

    function: str = ""  # its name, as it was passed
    calib: Data | None = None  # data that it is called with

    def run(self, graph: Graph, ctx: Context) -> int:
        if not self.function:
            return 0
        function = self._function(ctx)
        given = () if self.calib is None else (self._data(ctx),)
        from dfc.emit.trainable import TrainableGraph

        module = TrainableGraph(graph.copy())
        self._train(function, module, given)
        self._check_in_place(module)
        changed = self._changed(graph, module)
        filled = [n for n, new in changed.items() if _is_filled(graph.parameters[n], new)]
        if filled:
            more = f" and {len(filled) - 1} more" if filled[1:] else ""
            ctx.note(
                f"recover: `{self.function}` filled the zeros of `{filled[0]}`{more}, which was "
                "sparse: put back 0 after each step where it was 0 (`p.data.mul_(mask)`)"
            )
        for name, tensor in changed.items():
            p = graph.parameters[name]
            ctx.decided(p, "trained", f"by `{self.function}`")
            p.data = TensorData(name, tensor)
        others = _others(module)
        if others and not changed:
            message = f"function `{self.function}` added {others}, and changed no weight"
            raise DfcError("K040", message, help=_MERGE, status=8)
        if others:
            ctx.note(f"recover: {others}, which `{self.function}` added, are left aside")
        elif not changed:
            ctx.note(
                f"recover: `{self.function}` changed no weight of the module that it was given"
            )
        return len(changed)

    def _function(self, ctx: Context) -> Any:
        found = ctx.functions.get(self.function)
        if callable(found):
            self._check_arguments(found)
            return found
        help = did_you_mean(self.function, [*ctx.functions]) or (
            f'pass functions={{"{self.function}": train}} to dfc.compile, '
            f"or --function {self.function}=FILE.py:FUNCTION to `dfc compile`"
        )
        what = "is not passed" if found is None else f"is a {type(found).__name__}, not a function"
        raise DfcError("Q074", f"function `{self.function}` {what}", help=help)

    def _check_arguments(self, function: Any) -> None:
        given = ("module",) if self.calib is None else ("module", self.calib)
        try:
            inspect.signature(function).bind(*given)
        except TypeError as e:
            message = f"function `{self.function}` cannot be called as it is: {e}"
            help = f"it is called as {self.function}({', '.join(given)})"
            if self.calib is None:
                help += "; `using NAME` passes data too"
            raise DfcError("Q074", message, help=help) from None
        except ValueError:  # a builtin says nothing of its arguments
            pass

    def _data(self, ctx: Context) -> Any:
        """The data as it was passed: what a batch is, is between the user and their function."""
        assert self.calib is not None
        if self.calib not in ctx.data:
            help = did_you_mean(self.calib, [*ctx.data])
            raise DfcError("D084", f"data `{self.calib}` is not passed", help=help)
        return ctx.data[self.calib]

    def _train(self, function: Any, module: TrainableGraph, given: tuple[Any, ...]) -> None:
        import torch

        code = getattr(function, "__code__", None)
        try:
            with torch.enable_grad():
                returned = function(module, *given)
        except DfcError:
            raise
        except (Exception, SystemExit) as e:
            own = code.co_filename if code else ""
            raise failure_of(e, f"function `{self.function}`", own) from e
        if isinstance(returned, torch.nn.Module) and returned is not module:
            message = f"function `{self.function}` returned another module, which is not taken"
            help = "train the module that it is given, in place; what it returns is left aside"
            raise DfcError("K040", message, help=help, status=8)

    def _check_in_place(self, module: TrainableGraph) -> None:
        """Refuse a module with another tensor in a weight's place: the graph never reads that."""
        moved = module.displaced()
        if moved:
            message = f"function `{self.function}` put something else in the place of `{moved[0]}`"
            raise DfcError("K040", message, help=_MERGE, status=8)

    def _changed(self, graph: Graph, module: TrainableGraph) -> dict[str, Tensor]:
        """The weights that are not what they were, all of them checked before any is taken."""
        import torch

        found: dict[str, Tensor] = {}
        for name, trained in module.weights().items():
            data = graph.parameters[name].data
            assert data is not None
            old, new = data.tensor(), trained.detach().to(data.tensor())
            problem, help = "", "a smaller learning rate, or gradient clipping"
            if new.shape != old.shape:
                problem = f"gave it the shape {list(new.shape)}, it was {list(old.shape)}"
                help = "train its numbers: shapes are changed by `prune`"
            elif not bool(torch.isfinite(new).all()):
                count = int((~torch.isfinite(new)).sum())
                problem = f"left {count} of {new.numel()} numbers that are not finite in it"
            if problem:
                message = f"function `{self.function}` trained `{name}` and {problem}"
                raise DfcError("K040", message, help=f"{help}; the graph is as it was", status=8)
            if not torch.equal(old, new):
                found[name] = new.clone()
        return found


def _is_filled(before: Parameter, after: Tensor) -> bool:
    """Whether a matrix that had many zeros, as `sparsify` makes them, has lost most of them."""
    assert before.data is not None
    zeros, left = (float((t == 0).float().mean()) for t in (before.data.tensor(), after))
    return before.tensor_type.rank > 1 and _SPARSE <= zeros < 1 and left < zeros / 2


def _others(module: TrainableGraph) -> str:
    """Parameters that are no weights of the graph, in words; none: an empty text."""
    own = {id(p) for p in module.weights().values()}
    found = [n for n, p in module.named_parameters() if id(p) not in own]
    if len(found) < 2:
        return "".join(f"the new parameter `{n}`" for n in found)
    return f"the new parameters `{found[0]}` and {len(found) - 1} more"
