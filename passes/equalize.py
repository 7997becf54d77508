"""Make weights easier to round: what one layer multiplies a channel by, the next takes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.calibrate import batches_of, observe
from dfc.compress.equalizing import ChannelPeak, Pair, balanced, pairs_of
from dfc.compress.producers import change_constant
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.lang.selectors import Selector
from dfc.rewrite.pass_ import CHANGES, KEPT, Context, Data, Numerics, Pass, Quota, close

if TYPE_CHECKING:
    from torch import Tensor

_SAME = 1e-3  # scales so close to 1 are not worth new constants


@dataclass(frozen=True)
class Equalize(Pass):
    """Scale the channels between two layers so that both have weights of one size in each.

    Channel i is divided by s = sqrt(r1 / r2), r1 and r2 being its largest weight in the layer that
    makes it and in the one that reads it. One scale for all channels then rounds both well: it is
    what `quantize` with one scale for a whole weight needs. Run it before `quantize`, and after
    `fold_batch_norm`.

    ReLU6 clips at 6 whatever the scale. With data its channels are scaled as far as no value that
    was seen comes to be clipped, and left alone where one was; without data they are left alone.

    Needs:    two convolutions or linear layers with constant weights, a ReLU or nothing between
              them, and no other reader.
    Ensures:  such a pair is balanced, or there is a reason why not.
    Keeps:    the graph's nodes; constants that something else reads.
    Cost:     a few passes over the weights; with data, one run of it.
    Source:   Nagel et al., data-free quantization, arXiv 1906.04721, section 4.1.
    """

    name = "equalize"
    idempotent = False
    phrases = {"": "select", "except": "exclude", "using": "data"}  # noqa: RUF012

    select: Selector | None = None  # only layers in this part of the model
    exclude: Selector | None = None  # and not in this
    data: Data | None = None  # for ReLU6
    rounds: int = 40  # at most: a scale between two layers moves those beside it
    limit: int | None = None  # scale at most this many pairs; bisects a miscompile
    skip: tuple[int, ...] = ()  # pairs by number that are left out: those found to be wrong

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        """With data, a ReLU6 may clip what calibration did not show: then it is no rounding."""
        return close(1e-5) if self.data is None else CHANGES

    def run(self, graph: Graph, ctx: Context) -> int:
        if self.rounds < 1:
            message = f"`rounds` is at least 1, got {self.rounds}"
            raise DfcError("Q012", message, status=2)
        pairs = self._pairs(graph, ctx)
        peaks = self._peaks(graph, pairs, ctx)
        quota = Quota(self.limit, self.skip)
        scales = balanced(pairs, peaks, self.rounds)
        for pair in pairs:
            scale = scales[pair]
            if bool(((scale - 1).abs() < _SAME).all()):
                ctx.decided(pair.first, KEPT, "its channels are balanced already")
            elif quota.allows(pair.first):
                _apply(graph, pair, scale, ctx)
        return quota.done

    def _pairs(self, graph: Graph, ctx: Context) -> list[Pair]:
        only = set(self.select.nodes_left(graph)) if self.select else None
        unwanted = set(self.exclude.nodes_left(graph)) if self.exclude else set()
        found = []
        for pair in pairs_of(graph, lambda node, reason: ctx.decided(node, KEPT, reason)):
            nodes = {pair.first, pair.second}
            if only is not None and not nodes <= only:
                ctx.decided(pair.first, KEPT, "it is not in `select`, or what reads it is not")
            elif nodes & unwanted:
                ctx.decided(pair.first, KEPT, "excluded by the step")
            elif pair.high is not None and self.data is None:
                reason = f"ReLU{pair.high:g} clips behind it: `using` data shows which channels"
                ctx.decided(pair.first, KEPT, reason)
            else:
                found.append(pair)
        return found

    def _peaks(self, graph: Graph, pairs: list[Pair], ctx: Context) -> Mapping[Pair, Tensor]:
        """The largest value of each channel before it is clipped."""
        observers = {p: ChannelPeak(p.axis) for p in pairs if p.high is not None}
        if not observers:
            return {}
        assert self.data is not None
        values = {p.first.results[0]: o for p, o in observers.items()}
        observe(graph, batches_of(ctx, self.data, graph), values, ctx, "equalize")
        return {p: o.peak for p, o in observers.items()}


def _apply(graph: Graph, pair: Pair, scale: Tensor, ctx: Context) -> None:
    first, second = pair.first, pair.second

    def rows(t: Tensor) -> Tensor:
        return t / scale.double().reshape(-1, *[1] * (t.dim() - 1))

    change_constant(graph, first, 1, "equalize", rows)
    if first.inputs[2] is not None:
        change_constant(graph, first, 2, "equalize", rows)
    change_constant(graph, second, 1, "equalize", lambda t: pair.scaled(t, scale.double()))
    low, high = float(scale.min()), float(scale.max())
    said = f"channels divided by {low:.3g} to {high:.3g}, taken back in %{_name(second)}"
    ctx.decided(first, "equalized", said)


def _name(node: Node) -> str:
    return node.results[0].name
