"""Take out heads, hidden units, channels or whole layers, so that shapes really shrink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dfc.compress.axes import Axis
from dfc.compress.batches import batches_of
from dfc.compress.choice import counts, counts_by_time, keep_best
from dfc.compress.dimensions import BEFORE
from dfc.compress.groups import Group, Groups, find_groups
from dfc.compress.importance import by_activation, by_magnitude, by_taylor
from dfc.compress.reconstruction import by_reconstruction
from dfc.compress.refit import layers_of, refit
from dfc.compress.shrink import shrink
from dfc.compress.work import device_of, forecast, parts_of, work_of
from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.lang.selectors import Selector
from dfc.rewrite.pass_ import CHANGES, KEPT, Context, Data, Pass

if TYPE_CHECKING:
    from torch import Tensor

_AUTO = ("heads", "ffn", "channels")
_SHOWN = 6  # reasons in one error


@dataclass(frozen=True)
class Prune(Pass):
    """Remove the least important units of each dependency group: weights and shapes shrink.

    What belongs together is found on the graph: through residuals, concats, reshapes, grouped
    heads and tied weights. `what=auto` takes whole heads, hidden units and channels, which leave
    the rest as it was; `width`, over which a norm goes, and `head_dim` are taken when asked for.
    Needs:    weights; data for all measures but `magnitude`, and for `refit`.
    Ensures:  counts are multiples of `align` (heads are whole); weights keep their names.
    Keeps:    inputs and outputs; what is frozen, each with its reason.
    Raises:   DfcError Q070 for options, Q071 where nothing (that is selected) can be pruned, Q072
              where alignment leaves nothing to do, Q073 for data that is missing.
    """

    name = "prune"
    numerics = CHANGES
    idempotent = False
    not_after = ("quantize",)
    phrases = {"": "select", "by": "by", "using": "calib", "except": "exclude"}  # noqa: RUF012
    auto = {"ratio": (0.1, 0.2, 0.3, 0.5)}  # noqa: RUF012

    select: Selector | None = None  # prune what these modules make
    by: Literal["magnitude", "taylor", "activation", "reconstruction"] = "magnitude"
    calib: Data | None = None  # what is measured on: the example without it
    exclude: Selector | None = None  # keep what these modules make
    ratio: float = 0.3  # of the units goes; of the time, as it is predicted, with `scope=time`
    align: int = 8  # counts that hardware likes; odd ones run slower
    what: Literal["auto", "channels", "heads", "head_dim", "ffn", "width", "layers"] = "auto"
    scope: Literal["layer", "global", "time"] = "layer"  # of each group, of all, or of the time
    refit: bool = False  # least squares over the data for what reads the groups, in turn

    def run(self, graph: Graph, ctx: Context) -> int:
        self._check_options()
        if self.calib is None and ctx.examples and (self.by != "magnitude" or self.refit):
            ctx.tell(
                "prune: the example's inputs are all the data it has: `using DATA` names others"
            )
        if self.what == "layers":
            from dfc.compress.blocks import remove_blocks

            return remove_blocks(graph, self, ctx)
        groups = find_groups(graph)
        chosen = self._chosen(graph, groups, ctx)
        scores = self._scores(groups, chosen, ctx)
        wanted = self._counts(groups, scores, ctx)
        shrinking = [g for g in chosen if wanted[g] < g.size]
        self._tell(chosen, scores, wanted, ctx)
        if not shrinking:
            raise self._nothing_left(chosen)
        kept = {g: keep_best(scores[g], wanted[g]) for g in shrinking}
        self._apply(groups, kept, ctx)
        return len(shrinking)

    def _check_options(self) -> None:
        if not 0 < self.ratio < 1:
            help = "0.3 takes three units of ten; what is to go as a whole is `what=layers`"
            raise DfcError("Q070", f"`ratio` lies between 0 and 1, got {self.ratio:g}", help=help)
        if self.align < 1:
            raise DfcError("Q070", f"`align` is at least 1, got {self.align}")

    # What is pruned

    def _chosen(self, graph: Graph, groups: Groups, ctx: Context) -> list[Group]:
        """The groups that are asked for and can be pruned.

        Raises:  DfcError Q071.
        """
        inside = None if self.select is None else set(self.select.nodes_left(graph))
        outside = set() if self.exclude is None else set(self.exclude.nodes_left(graph))
        chosen, refused = [], []
        for g in groups.groups:
            nodes = {u.node for u in g.makers}
            if inside is not None and not nodes & inside:
                continue
            reason = "`except` names it" if nodes & outside else self._why_not(g)
            if reason is None:
                chosen.append(g)
                continue
            refused.append((g, reason))
            if g.size > 1:
                ctx.decided(g.node or g.members[0][0], KEPT, f"{g.kind}: {reason}")
        if not chosen:
            raise self._refused(refused)
        return chosen

    def _why_not(self, g: Group) -> str | None:
        if g.frozen:
            return g.frozen[0]
        if not g.makers and not g.readers:
            return "no layer makes or reads its units: removing them saves nothing"
        if any(p.data is None for p, _ in g.members):
            return "its weights have no numbers"
        if self.what != "auto":
            return None if g.kind == self.what else f"{g.kind} are not what is asked for"
        if g.kind not in _AUTO or not g.exact:
            return f"removing them changes what stays: `what={g.kind}` does it all the same"
        return None

    def _refused(self, refused: Sequence[tuple[Group, str]]) -> DfcError:
        several = [(g, reason) for g, reason in refused if g.size > 1]
        several.sort(key=lambda each: BEFORE not in each[1])  # the reason that can be mended, first
        notes = [f"`{g.name}`: {g.size} {g.kind}: {reason}" for g, reason in several[:_SHOWN]]
        if len(several) > _SHOWN:
            notes.append(f"and {len(several) - _SHOWN} more")
        what = "units" if self.what == "auto" else self.what
        if self.select is None:
            message = f"no {what} of this model can be pruned"
        elif refused:
            message = f"nothing that `{self.select}` selects can be pruned"
        else:
            message = f"what `{self.select}` selects makes no {what} of its own"
        help = "`dfc explain MODEL --pass prune` lists every group, and why others stay"
        if any(BEFORE in reason for _, reason in refused):
            help = f"{BEFORE}: compile the model anew, with the steps in this order"
        return DfcError("Q071", message, span=self._span(), notes=tuple(notes), help=help)

    def _nothing_left(self, chosen: Sequence[Group]) -> DfcError:
        g = chosen[0]
        message = (
            f"`align={self.align}` leaves nothing to prune: {self.ratio:.0%} of `{g.name}`, which "
            f"has {g.size} {g.kind}, is less than a multiple of {self.align}"
        )
        help = f"`align=1`, or a larger ratio than {self.ratio:g}"
        return DfcError("Q072", message, span=self._span(), help=help)

    def _span(self) -> Any:
        if self.select is None or self.select.source is None:
            return None
        return self.select.source.span(*self.select.what.at)

    # How much each unit matters

    def batches(self, graph: Graph, ctx: Context) -> Any:
        """The data that is named, else the examples.

        Raises:  DfcError Q073.
        """
        if self.calib is not None:
            return batches_of(ctx, self.calib, graph)
        if ctx.examples:
            return [list(x) for x in ctx.examples]
        needed = f"by {self.by}" if self.by != "magnitude" else "refit"
        help = "`data calib` in the recipe, `prune using calib`, and compile(..., data={...})"
        raise DfcError("Q073", f"`prune {needed}` needs data", help=help)

    def _scores(self, groups: Groups, chosen: list[Group], ctx: Context) -> dict[Group, Tensor]:
        if self.by == "magnitude":
            return by_magnitude(groups, chosen)
        batches = self.batches(groups.analysis.graph, ctx)
        ranks = {"taylor": by_taylor, "activation": by_activation}
        return ranks.get(self.by, by_reconstruction)(groups, chosen, batches, ctx)

    def _counts(
        self, groups: Groups, scores: dict[Group, Tensor], ctx: Context
    ) -> dict[Group, int]:
        """How many units of each group stay."""
        if self.scope != "time":
            return counts(scores, self.ratio, self.align, self.scope)
        if self.by not in (
            "taylor",
            "reconstruction",
        ):  # whose scores alone are of the outputs: a share of the group's
            scores = {g: s / s.sum() if s.sum() > 0 else s for g, s in scores.items()}
        parts = parts_of(groups.analysis, ctx.examples, device_of(ctx.target))
        return counts_by_time(scores, self.ratio, self.align, parts)

    # Doing it

    def _apply(self, groups: Groups, kept: dict[Group, list[bool]], ctx: Context) -> None:
        graph = groups.analysis.graph
        device = device_of(ctx.target)
        before = work_of(graph, ctx.examples, device)
        layers = layers_of(graph, kept) if self.refit else []
        whole = graph.copy()
        shrink(groups, kept)
        ctx.tell(f"prune: {forecast(before, work_of(graph, ctx.examples, device), device)}")
        if self.refit:
            masks = {g.axis: mask for g, mask in kept.items()}

            def stays(axis: Axis) -> list[bool]:
                return masks.get(axis) or [True] * int(axis.size)  # type: ignore[arg-type]

            refit(groups, whole, layers, stays, self.batches(whole, ctx), ctx)
            count = counted(len(layers), "layer was", "layers were")
            ctx.tell(f"prune: {count} refitted to the data, which read what was pruned")

    def _tell(
        self, chosen: list[Group], scores: dict[Group, Tensor], wanted: dict[Group, int],
        ctx: Context,
    ) -> None:  # fmt: skip
        if not ctx.asked:
            return
        for g in chosen:
            low, middle, high = (float(x) for x in _spread(scores[g]))
            weights = ", ".join(f"{p.name}[{d}]" for p, d in g.members[:4])
            more = f" and {len(g.members) - 4} more" if len(g.members) > 4 else ""
            about = (
                f"{g.name}: {g.size} {g.kind}, importance {low:.3g} .. {middle:.3g} .. {high:.3g}, "
                f"in {weights}{more}"
            )
            at = g.node or g.members[0][0]
            if wanted[g] < g.size:
                ctx.decided(at, "pruned", f"{wanted[g]} of {g.size} stay; {about}")
            else:
                ctx.decided(at, KEPT, f"a multiple of {self.align} leaves nothing to go; {about}")


def _spread(score: Tensor) -> Sequence[Tensor]:
    return score.min(), score.median(), score.max()
