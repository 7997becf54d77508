"""Set weights of linear layers to 0 where that costs least: a mask, not a smaller model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dfc.compress.calibrate import batches_of
from dfc.compress.hessian import DAMPING, Hessian
from dfc.compress.selection import linear_layers
from dfc.compress.sequential import (
    Group,
    State,
    described,
    groups_of,
    layer_by_layer,
    weight_of,
)
from dfc.compress.sparse import Sparsity, magnitude, sparsegpt, wanda
from dfc.compress.sweep import BLOCK
from dfc.compress.weighted import CONVOLUTIONS, EXPERTS, reads_codes
from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter
from dfc.ir.weights import TensorData
from dfc.lang.selectors import Selector
from dfc.rewrite.pass_ import CHANGES, KEPT, Context, Data, Pass

if TYPE_CHECKING:
    from torch import Tensor

NO_SPEED = "stored and multiplied as before: no smaller file, no speed on this target"


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set a share of each linear layer's weights to 0, or 2 of every 4 neighbours.

    `magnitude` takes the smallest weights and needs no data; `wanda` weighs them by their inputs;
    `sparsegpt` also lets the weights that stay make good what is lost. With data, layers are taken
    in order, each on what the sparse layers before it give. The weights stay dense in memory and
    on disk, and no engine here is faster for zeros: use `prune` to make a model smaller.

    Needs:    linear layers with constant weights; data, unless by magnitude.
    Ensures:  each chosen layer has exactly the share of zeros, or the pattern in every row.
    Keeps:    names, shapes; weights that other ops read as well, embedding tables among them.
    Cost:     one run of the data; by sparsegpt outputs * inputs^2 multiplications for a layer.
    Raises:   DfcError D080..D084 for data that does not fit, D085 when there is none; D090..D092
              for what calibration shows of a layer; D093 when there is no linear layer; D095 for a
              ratio or pattern that cannot be, or does not divide a layer's inputs.
    Source:   Sun et al., Wanda, arXiv 2306.11695; Frantar, Alistarh, SparseGPT, arXiv 2301.00774.
    """

    name = "sparsify"
    numerics = CHANGES
    idempotent = False
    not_after = ("quantize",)
    phrases = {"": "select", "except": "exclude", "using": "data", "by": "method"}  # noqa: RUF012
    auto = {"method": ("wanda", "sparsegpt")}  # noqa: RUF012

    data: Data | None = None
    select: Selector | None = None  # only layers in this part of the model
    exclude: Selector | None = None  # and not in this
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    ratio: float | None = None  # the share of zeros; a half, where no pattern says it
    pattern: str = ""  # "2:4": 2 weights of every 4 neighbours stay
    damping: float = DAMPING  # of sparsegpt: the share of the Hessian's mean diagonal

    def run(self, graph: Graph, ctx: Context) -> int:
        sparsity = self._sparsity()
        layers, left = linear_layers(self.name, graph, self.select, self.exclude, ctx)
        chosen = set(layers)
        for layer in layers:
            weight = weight_of(layer)
            assert weight is not None
            other = next((n for n in weight.users if n not in chosen), None)
            if other is not None:
                name = other.results[0].name if other.results else other.op
                left[layer] = f"!{weight.name} is read by %{name} ({other.op}) as well"
        for layer, reason in left.items():
            ctx.decided(layer, KEPT, reason)
        layers = [n for n in layers if n not in left]
        self._check_divides(layers, sparsity)
        self._tell(graph, ctx)
        groups = groups_of(graph, layers)
        return _put(graph, groups, self._sparse(graph, groups, sparsity, ctx), sparsity, ctx)

    def _tell(self, graph: Graph, ctx: Context) -> None:
        """What one might expect to become sparse and does not, and options that nothing reads."""
        meant = set(self.select.nodes_left(graph)) if self.select else set(graph.nodes)
        meant -= set(self.exclude.nodes_left(graph)) if self.exclude else set()
        coded = sum(reads_codes(n) for n in graph.nodes if n in meant)
        if coded:
            what = counted(coded, "layer reads", "layers read")
            ctx.note(f"sparsify: {what} codes and stay as they are: sparsify before `quantize`")
        others = [n for n in graph.nodes if n in meant and n.op in CONVOLUTIONS | EXPERTS]
        if others:
            more = f" and {len(others) - 1} more" if others[1:] else ""
            what = f"{described(others[0])}{more} stay dense"
            ctx.note(f"sparsify: it takes linear layers alone, no convolutions or experts: {what}")
        unread = ["damping"] if self.method != "sparsegpt" and self.damping != DAMPING else []
        unread += [f"using {self.data}"] if self.method == "magnitude" and self.data else []
        if unread:
            ctx.note(f"sparsify: `{self.method}` does not read `{'`, `'.join(unread)}`")

    def _sparsity(self) -> Sparsity:
        if not self.pattern:
            ratio = 0.5 if self.ratio is None else self.ratio
            if not 0 < ratio < 1:
                raise DfcError(
                    "D095", f"`ratio` is a number between 0 and 1, got {ratio:g}",
                    help="ratio=0.5 sets half of each layer's weights to 0",
                )  # fmt: skip
            return Sparsity(ratio)
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        kept, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < kept < of or BLOCK % of:
            raise DfcError(
                "D095", f"`pattern` says how many of how many weights stay, got `{self.pattern}`",
                help='try "2:4" or "4:8"; the second number is a power of two up to 128',
            )  # fmt: skip
        if self.ratio not in (None, 1 - kept / of):
            message = f"`pattern={self.pattern}` sets {1 - kept / of:.0%} to 0, `ratio` "
            help = "give one of them: a pattern says both how many become 0 and where"
            raise DfcError("D095", f"{message}{self.ratio:.0%}", help=help)
        return Sparsity(zeros=of - kept, of=of)

    def _check_divides(self, layers: list[Node], sparsity: Sparsity) -> None:
        for layer in layers:
            weight = weight_of(layer)
            assert weight is not None
            inputs = weight.tensor_type.shape[1]
            if sparsity.of and inputs % sparsity.of:
                message = f"its {inputs} inputs are no multiple of {sparsity.of}"
                help = f'leave it out: `except "{layer.loc.module if layer.loc else "..."}"`'
                raise DfcError("D095", f"{described(layer)}: {message}", help=help)

    def _sparse(
        self, graph: Graph, groups: list[Group], sparsity: Sparsity, ctx: Context
    ) -> Mapping[str, tuple[Tensor, str]]:
        """The new weights by name, each with what is to be told of it."""
        if self.method == "magnitude":
            return {
                name: (magnitude(p.data.tensor(), sparsity), "the smallest")
                for group in groups
                for name, p in group.weights.items()
                if p.data
            }
        if self.data is None:
            help = f"sparsify using calib by {self.method}; `by magnitude` needs no data"
            raise DfcError("D085", f"`sparsify` by {self.method} needs data", help=help)
        run = _Solved(self.method, sparsity, self.damping)
        layer_by_layer(graph, groups, batches_of(ctx, self.data, graph), ctx, run)
        return run.found


class _Solved:
    """The sparse weights by name, and what is to be told of each, as they are found."""

    def __init__(self, method: str, sparsity: Sparsity, damping: float) -> None:
        self.method, self.sparsity, self.damping = method, sparsity, damping
        self.key = f"{method} {sparsity!r} {damping!r}"
        self.found: dict[str, tuple[Tensor, str]] = {}

    def solve(self, group: Group, hessian: Hessian) -> None:
        for name, p in group.weights.items():
            assert p.data is not None
            self.found[name] = self._one(p.data.tensor(), hessian)

    def weights(self, group: Group) -> dict[str, Tensor]:
        return {name: self.found[name][0] for name in group.weights}

    def state(self, group: Group) -> State:
        return {name: self.found[name][1] for name in group.weights}, self.weights(group)

    def load(self, group: Group, state: State) -> None:
        words, tensors = state
        self.found |= {name: (tensors[name], words[name]) for name in group.weights}

    def _one(self, weight: Tensor, hessian: Hessian) -> tuple[Tensor, str]:
        seen = f"{counted(hessian.tokens, 'token')}"
        if self.method == "wanda":
            return wanda(weight, hessian, self.sparsity), f"least |w| * |x| on {seen}"
        sparse, used = sparsegpt(weight, hessian, self.sparsity, self.damping)
        more = f", damping {used.damping:g}" if used.damping != self.damping else ""
        if hessian.tokens < hessian.inputs:
            more += f", fewer than its {hessian.inputs} inputs"
        return sparse, f"compensated on {seen}{more}"


def _put(
    graph: Graph,
    groups: list[Group],
    found: Mapping[str, tuple[Tensor, str]],
    sparsity: Sparsity,
    ctx: Context,
) -> int:
    """Give the weights their new numbers; how many weights changed."""
    changed = 0
    for weight in _weights(groups):
        assert weight.data is not None
        sparse, how = found[weight.name]
        if bool((sparse == weight.data.tensor()).all()):
            reason = f"its weights are {sparsity} sparse already"
            for layer in weight.users:
                ctx.decided(layer, KEPT, reason)
            continue
        for layer in weight.users:
            ctx.decided(layer, "sparsified", f"{sparsity} zeros, {how}; {NO_SPEED}")
        weight.data = TensorData(weight.name, sparse)
        changed += 1
    return changed


def _weights(groups: list[Group]) -> Iterator[Parameter]:
    for group in groups:
        yield from group.weights.values()
