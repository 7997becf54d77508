"""Store weights in eight or four bits; with that, where it is asked for, round activations too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dfc.compress.gathered_experts import group_gathered
from dfc.compress.grid import Grid
from dfc.compress.processor import Processor, declared, processor_of
from dfc.compress.selection import tell_nothing_left_out
from dfc.compress.weighted import (
    Weighted,
    as_linear,
    check_numbers,
    described,
    find_weighted,
    reads_codes,
)
from dfc.compress.weights import Stored, find, forget, read_codes, store
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.lang.selectors import Selector
from dfc.ops.linear_f8 import ROWS
from dfc.rewrite.pass_ import CHANGES, KEPT, Context, Data, Pass, Quota

if TYPE_CHECKING:
    from dfc.compress.grid import Rounded

_SMALLEST = 1024
_SMALLEST_GROUP = 16
_UNREAD = "quantize: the data `{}` was not read: `{}` rounds by the numbers at hand, {}"
_READS = {  # what would read it
    "int8": "`scheme=static` by data; `minimize latency` and `scheme=tune({0}, static)` in the "
    "recipe keep the faster of them, and for static transformers "
    "`smooth using {1} with multiply=yes` belongs before it",
    "int4": "`method=gptq` and `method=awq` by data",
    "fp8": "as fp8 always does",
}
_TOLD = 0.25  # of the weights' bytes that stay floats: a file shrinks by less than one expects
_ROUNDING = ("linear", "experts")  # what may read rows that are rounded to int8
_DEFAULT_GROUP = 32  # of four bits: with one scale a row they lose too much


@dataclass(frozen=True)
class Quantize(Pass):
    """Store weights of linear layers, experts, embeddings and convolutions as codes with scales.

    `weights` computes with the weights that the codes stand for. `dynamic` rounds what linear
    layers read to int8 as well, each row (or each group of it) by its own range, when the model
    runs. `static` rounds activations by ranges that calibration data decides (`range`: by default
    all that was seen for what linear layers read, the least square error for convolutions; in
    transformers, `smooth` before it with `multiply=yes`). `auto` is `static`
    for int8 with data and a convolution, where no `method` or `group` asks for another form, else
    `dynamic`; and `weights` where the target is a GPU.
    `fp8` stores eight-bit floats: `dynamic` rounds rows to them too, for GPUs that multiply them
    and by default there alone. Tables and experts get int8 rows: as many bytes, and nearer.

    Needs:    weights with numbers; for `static`, gptq and awq, calibration data (`using`).
    Ensures:  a layer reads codes, or there is a reason why not; no float weight that nothing reads
              is left. A table that several layers share is stored once.
    Keeps:    inputs, outputs, names of values; biases and norms; layers below `smallest` weights.
    Cost:     `rtn`: a few passes over each weight, one at a time.
    Raises:   DfcError D002 for a model without weights, D090 for numbers that are NaN or infinite,
              D096 when nothing is left to quantize, D097 for what no layer could have.
    Source:   reference of the storage: ONNX Runtime's MatMulNBits.
    """

    name = "quantize"
    numerics = CHANGES
    phrases: ClassVar[Mapping[str, str]] = {
        "": "to", "on": "select", "using": "data", "except": "exclude",
    }  # fmt: skip
    auto: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "to": ("int8", "int4"),
        "scheme": ("weights", "dynamic"),
        "group": (32, 64, 128),
    }

    to: Literal["int8", "int4", "fp8"] = "int8"
    scheme: Literal["auto", "weights", "dynamic", "static"] = "auto"
    data: Data | None = None
    select: Selector | None = None  # only layers in this part of the model
    exclude: Selector | None = None  # and not in this
    group: int | None = None  # numbers of a row that share a scale; none: the row, 32 for int4
    symmetric: bool = True  # no: a zero point for each group (int4)
    method: Literal["rtn", "gptq", "awq"] = "rtn"
    range: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"  # static
    format: Literal["e4m3", "e5m2"] = "e4m3"  # of fp8: more digits, or more range
    per: Literal["channel", "tensor"] = "channel"  # static, fp8: what has a weight scale of its own
    codes: Literal["auto", "full", "pairs", "seven"] = (
        "auto"  # auto: all, of static the processor's
    )
    correct: bool = True  # static: biases too, so that channels keep their means
    embeddings: bool = True  # tables too
    activations: Literal["auto", "float", "int8"] = "auto"  # what linear layers multiply
    smallest: int | None = None  # weights below so many numbers stay: 1024, in `static` none
    limit: int | None = None  # quantize at most this many weights; bisects
    skip: tuple[int, ...] = ()  # weights by number that are left out

    def run(self, graph: Graph, ctx: Context) -> int:
        self._check_options()
        grouped = group_gathered(graph, self._is_meant(graph))
        found, kept = find_weighted(graph)
        device = processor_of(ctx.target)
        scheme = self._scheme(found, device)
        if self.data is not None and scheme != "static" and self.method == "rtn":
            reads = _READS[self.to].format(scheme, self.data)
            ctx.note(_UNREAD.format(self.data, scheme, reads))
        self._check_codes(scheme)
        self._tell_what_is_not_read(scheme, ctx)
        if self.to == "fp8" and scheme == "dynamic" and not device.computes(ROWS):
            ctx.note(f"quantize: {device}, not in {ROWS}: rounding rows to it only costs time")
        if scheme == "static" and self._fold(graph, ctx):
            found, kept = find_weighted(graph)
        chosen = self._chosen(graph, found, kept, scheme, ctx)
        for node, reason in kept.items():
            ctx.decided(node, KEPT, reason)
        if not chosen:
            if any(map(reads_codes, graph.nodes)):  # a second run finds nothing to do
                ctx.note(self._nothing_more(graph, kept))
                return grouped
            raise self._nothing(graph, kept)
        check_numbers(chosen)
        self._tell_what_stays(graph, chosen, kept, ctx)
        quota = Quota(self.limit, self.skip)
        wanted = [w for w in chosen if quota.allows(w.node)]
        if scheme == "static":
            return self._calibrate(graph, wanted, ctx)
        self._quantize(graph, wanted, scheme, ctx)
        return quota.done or grouped

    def _fold(self, graph: Graph, ctx: Context) -> int:
        """A norm behind a layer is part of its weights: it decides their ranges."""
        from dfc.passes.fold_batch_norm import FoldBatchNorm

        return FoldBatchNorm().run(graph, replace(ctx, decisions=None))

    def _calibrate(self, graph: Graph, wanted: list[Weighted], ctx: Context) -> int:
        """The layers that can be rounded with what they read; tables by weights alone, and experts
        when the model runs: which rows they read is not known before.
        """
        layers = [as_linear(graph, w) for w in wanted]
        tables = [w for w in layers if _is_table(w)]
        experts = [w for w in layers if w.is_experts]
        nodes = [u.node for w in layers if w not in tables + experts for u in w.uses]
        done = int(find("scheme", "static", "apply")(graph, nodes, self, ctx)) if nodes else 0
        self._quantize(graph, tables, "weights", ctx)
        self._quantize(graph, experts, "dynamic", ctx)
        return done + len(tables) + len(experts)

    # Options

    def _check_options(self) -> None:
        g = self.group
        if g is not None and (g < _SMALLEST_GROUP or g & (g - 1)):
            near = max(_SMALLEST_GROUP, 1 << max(g, 1).bit_length() - 1)
            help = f"{near} or {near * 2}, for example; 32, 64 and 128 are usual"
            message = f"`group` is a power of two, at least {_SMALLEST_GROUP}: got {g}"
            raise DfcError("D097", message, help=help)
        if self.method != "rtn" and self.data is None:
            help = "pass it by name: `quantize int4 using calib`"
            raise DfcError("D080", f"the method `{self.method}` needs calibration data", help=help)
        if self.scheme == "static":
            self._check_static()
        if not self.symmetric and self.to != "int4":
            help = "with 256 codes a zero point gains nothing; `symmetric=no` is for int4"
            raise DfcError("D097", f"{self.to} weights have no zero point", help=help)
        if self.to == "fp8":
            self._check_float8()
        elif self.format != "e4m3":
            raise DfcError("D097", f"`format` is for fp8, not for {self.to}")

    def _check_static(self) -> None:
        """Refuse what calibrated layers have no form of."""
        words = ""
        if self.to != "int8":
            words = f"`scheme=static` is for int8: {self.to} has `weights` and `dynamic`"
        elif self.method != "rtn":
            words = f"`method={self.method}` is for `weights` and `dynamic`, not for `static`"
        elif self.group is not None:
            words = "`group` is for `weights` and `dynamic`: `static` has a scale for each `per`"
        if words:
            raise DfcError("D097", words)
        if self.data is None:
            help = "pass it by name: `quantize int8 using calib with scheme=static`"
            raise DfcError("D080", "the scheme `static` needs calibration data", help=help)

    def _tell_what_is_not_read(self, scheme: str, ctx: Context) -> None:
        """Options that say what this scheme has no place for: it may be one of several tried."""
        static, fp8 = scheme == "static", self.to == "fp8"
        given = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        reads = {
            "range": static, "correct": static, "per": static or fp8,
            "activations": not static and not fp8,
            "codes": static or fp8 or self._multiplied(scheme) == "int8",
        }  # fmt: skip
        unread = [n for n, read in reads.items() if not read and given[n][0] != given[n][1]]
        if unread:
            what = f"`{scheme}` {self.to} does not read"
            ctx.note(f"quantize: {what} `{'`, `'.join(unread)}`: it makes no difference here")

    def _check_codes(self, scheme: str) -> None:
        """Refuse codes that this scheme does not make."""
        if scheme == "static" or self.codes in ("auto", "full"):
            return
        if self.codes == "seven":
            help = "`codes=pairs` makes codes that 16-bit sums hold"
            raise DfcError("D097", "`codes=seven` is for `scheme=static`", help=help)
        if self.to != "int8" or self.method != "rtn":
            what = self.to if self.to != "int8" else f"`method={self.method}`"
            raise DfcError("D097", f"`codes=pairs` is for int8 rounded to nearest, not for {what}")

    def _check_float8(self) -> None:
        """Refuse what eight-bit floats have no form of."""
        words = ""
        if self.group is not None:
            words = "`group` is for int8 and int4: fp8 has a scale for each output (`per`)"
        elif self.method != "rtn":
            words = f"`method={self.method}` is for int8 and int4: fp8 is rounded to nearest"
        if words:
            raise DfcError("D097", words)

    def _scheme(self, found: list[Weighted], device: Processor) -> str:
        """Why:  on CPUs, rows in eight bits are multiplied two to ten times as fast as floats, and
        with weights of four bits the results are as near (0.0306 and 0.0304 of a Llama's layer).
        """
        if self.scheme != "auto":
            return self.scheme
        if self.to == "fp8":
            return "dynamic" if device.computes(ROWS) else "weights"
        has_convs = any(w.is_conv and not _not_calibrated(w) for w in found)
        plain = self.to == "int8" and self.method == "rtn" and self.group is None
        if plain and self.data is not None and has_convs:
            return "static"
        return "weights" if device.kind == "cuda" else "dynamic"

    def needs(self, target: object) -> str | None:
        device = declared(target)
        if self.to != "fp8" or self.scheme != "dynamic" or device is None or device.computes(ROWS):
            return None
        return (
            f"{device}, not in {ROWS}; `scheme=weights` stores weights alone, and runs everywhere"
        )

    def _multiplied(self, scheme: str) -> str:
        """What linear layers multiply."""
        if self.activations != "auto":
            return self.activations
        return "int8" if scheme == "dynamic" else "float"

    @property
    def bits(self) -> int:
        return 4 if self.to == "int4" else 8

    def grid(self, layer: Weighted, activations: str = "float") -> Grid:
        """Where the weights of a layer may lie; what multiplies floats has all codes."""
        group = self.group or (None if self.bits == 8 else _DEFAULT_GROUP)
        rounds = activations == "int8" and any(u.kind in _ROUNDING for u in layer.uses)
        return Grid(
            self.bits, None if layer.is_conv else group, self.symmetric,
            rounds and self.codes == "pairs",
        )  # fmt: skip

    # Choosing

    def _is_meant(self, graph: Graph) -> Callable[[Node], bool]:
        """Whether the step's words leave a node in."""
        only = set(self.select.nodes_left(graph) if self.select else graph.nodes)
        only -= set(self.exclude.nodes_left(graph) if self.exclude else ())
        return only.__contains__

    def _chosen(
        self, graph: Graph, found: list[Weighted], kept: dict[Node, str], scheme: str, ctx: Context
    ) -> list[Weighted]:
        """The weights that are quantized; for the others, `kept` is told why."""
        smallest = self.smallest
        if smallest is None:  # a small layer in floats would tear a region of integers apart
            smallest = 0 if scheme == "static" else _SMALLEST
        only = set(self.select.nodes_left(graph)) if self.select else None
        unwanted = set(self.exclude.nodes_left(graph)) if self.exclude else set()
        if not any(u.node in unwanted for w in found for u in w.uses):
            tell_nothing_left_out("quantize", graph, self.exclude, ctx)
        chosen = []
        for w in found:
            reason = self._why_not(w, only, unwanted, smallest)
            if reason is None:
                reason = _not_calibrated(w) if scheme == "static" else self._no_gain(w)
            if reason is None:
                chosen.append(w)
            else:
                kept.update(dict.fromkeys((u.node for u in w.uses), reason))
        return chosen

    def _why_not(
        self, w: Weighted, only: set[Node] | None, unwanted: set[Node], smallest: int
    ) -> str | None:
        n, k = w.shape
        nodes = {u.node for u in w.uses}
        if only is not None and not nodes & only:
            return "it is not in `select`"
        if nodes & unwanted:
            tied = f", and shares !{w.weight.name} with others" if len(nodes) > 1 else ""
            return f"excluded by the step{tied}"
        if not self.embeddings and _is_table(w):
            return "it is a table, and `embeddings` is no"
        if n * k < smallest:
            return f"it has {n * k} weights, less than `smallest` ({smallest})"
        if self.bits == 4 and w.is_conv:
            return "no engine has convolutions with weights of four bits"
        group = self.grid(w).group
        if group is not None and k < group:
            return f"its rows of {k} are shorter than a group of {group}"
        return None

    def _no_gain(self, w: Weighted) -> str | None:
        """Why codes with a scale for each row are no smaller than the floats, if they are not."""
        k, size = w.shape[1], w.weight.tensor_type.dtype.itemsize
        if self.bits == 8 and self.per == "channel" and k + size >= k * size:
            return f"its rows are {k} wide: with a scale for each, codes take as many bytes"
        return None

    def _tell_what_stays(
        self, graph: Graph, chosen: list[Weighted], kept: Mapping[Node, str], ctx: Context
    ) -> None:
        """Name the largest layer that stays for another reason than the user's own words."""
        meant = self._is_meant(graph)
        bytes_ = {n: _float_bytes(n.operands) for n in kept if meant(n)}
        stays = sum(bytes_.values())
        share = stays / max(1, stays + _float_bytes(w.weight for w in chosen))
        if share >= _TOLD:
            first = max(bytes_, key=lambda n: bytes_[n])
            others = f"; and {len(bytes_) - 1} more" if len(bytes_) > 1 else ""
            words = f"{described(first)}: {kept[first]}{others}"
            ctx.note(f"quantize: {share:.0%} of the weights' bytes stay floats: {words}")

    def _nothing_more(self, graph: Graph, kept: Mapping[Node, str]) -> str:
        """Why a graph that reads codes already stays as it is."""
        meant = self._is_meant(graph)
        stays = [f"{described(n)}: {reason}" for n, reason in kept.items() if meant(n)]
        if not stays:
            return "quantize: the layers that it could take read codes already"
        more = f"; and {len(stays) - 1} more" if len(stays) > 1 else ""
        return f"quantize: nothing is left beside layers that read codes already: {stays[0]}{more}"

    def _nothing(self, graph: Graph, kept: Mapping[Node, str]) -> DfcError:
        where = f" in `{self.select}`" if self.select else ""
        but = f" but those in `{self.exclude}`" if self.exclude else ""
        notes = tuple(f"{described(n)}: {reason}" for n, reason in list(kept.items())[:5])
        more = len(kept) - len(notes)
        help = "`dfc select MODEL 'op(linear) | op(embedding)'` lists layers and module paths"
        help = (self.select and self.select.deeper(graph)) or help
        if not kept:
            message = "the model has no linear layer, convolution or table to quantize"
            return DfcError("D096", message)
        return DfcError(
            "D096", f"nothing is left to quantize{where}{but}", help=help,
            notes=notes + ((f"and {more} more",) if more else ()),
        )  # fmt: skip

    # Doing

    def _quantize(self, graph: Graph, wanted: list[Weighted], scheme: str, ctx: Context) -> None:
        layers = [as_linear(graph, w) for w in wanted]
        if self.to == "fp8":
            layers = self._as_floats(graph, layers, scheme, ctx)
        activations = self._multiplied(scheme)
        found = self._encode(graph, layers, activations, ctx)
        for layer in layers:
            stored = store(graph, layer, found[layer.weight])
            for use in layer.uses:
                told = self._told(layer, stored, found[layer.weight]) if ctx.asked else ""
                made = read_codes(graph, use, stored, activations)
                ctx.decided(made, "quantized", told)
            forget(graph, layer.weight)

    def _as_floats(
        self, graph: Graph, layers: list[Weighted], scheme: str, ctx: Context
    ) -> list[Weighted]:
        """Store what multiplies as eight-bit floats; tables and experts, which are left."""
        from dfc.compress import float8

        others = [w for w in layers if _is_table(w) or w.is_experts]
        activations = "f8" if scheme == "dynamic" else "float"
        for layer in (w for w in layers if w not in others):
            stored = float8.store(graph, layer, self.format, self.per == "channel")
            words = f"{self.format}, off by {100 * stored.error:.2g} %"
            for use in layer.uses:
                made = float8.read(graph, use, stored, activations)
                before = layer.weight.tensor_type.nbytes
                ctx.decided(made, "quantized", f"{words}: {before} -> {stored.nbytes} bytes")
            forget(graph, layer.weight)
        return others

    def _encode(
        self, graph: Graph, layers: list[Weighted], activations: str, ctx: Context
    ) -> dict[Any, Rounded]:
        """Codes by weight. What a method is not for is rounded to nearest."""
        found: dict[Any, Rounded] = {}
        taken = [w for w in layers if self._method(w) == self.method]
        rest = [w for w in layers if w not in taken]
        for what in ("experts", "convolutions") if self.method != "rtn" else ():
            if any(w.is_experts if what == "experts" else w.is_conv for w in rest):
                words = f"rounded to nearest: `{self.method}` is not for them"
                ctx.note(f"quantize: {what} are {words}")
        for method, part in ((self.method, taken), ("rtn", rest)):
            encode = find("method", method, "encode")
            by_grid: dict[Grid, list[Weighted]] = {}
            for w in part:
                by_grid.setdefault(self.grid(w, activations), []).append(w)
            for grid, some in by_grid.items():
                found |= encode(graph, some, grid, ctx, self.data)
        return found

    def _method(self, layer: Weighted) -> str:
        """The method that a layer's codes are found by."""
        fits = _is_linear(layer) or (layer.is_experts and self.method == "gptq")
        return self.method if fits else "rtn"

    def _told(self, layer: Weighted, stored: Stored, found: Rounded) -> str:
        from dfc.compress.rtn import matrix_of

        before = int(layer.weight.tensor_type.nbytes)  # type: ignore[arg-type]
        w = matrix_of(layer)
        error = float((found.weight - w).norm() / w.norm().clamp(min=1e-30))
        tied = f", shared by {len(layer.uses)} layers" if len(layer.uses) > 1 else ""
        return (
            f"{found.grid} by {self._method(layer)}: {before} -> {stored.nbytes} bytes{tied}, "
            f"off by {100 * error:.2g} %"
        )


def _is_linear(w: Weighted) -> bool:
    return all(u.kind == "linear" for u in w.uses)


def _is_table(w: Weighted) -> bool:
    """Whether rows of it are looked up, whatever else reads it."""
    return any(u.kind == "embedding" for u in w.uses)


def _not_calibrated(w: Weighted) -> str | None:
    """Why a layer has no calibrated form, if it has none; tables are rounded by weights alone."""
    dtype = w.weight.tensor_type.dtype.name
    if _is_table(w) or w.is_experts:
        return None
    if any(isinstance(u.x, Parameter) for u in w.uses):
        return "what it reads is constant"
    if dtype == "f32":
        return None
    return (
        f"it computes with {dtype}, calibrated layers with f32: `quantize` belongs before "
        f"`autocast`; in a model of {dtype}, `scheme=dynamic` takes it"
    )


def _float_bytes(values: Iterable[Value]) -> int:
    """What those of them take that are weights, each once."""
    weights = {v for v in values if isinstance(v, Parameter)}
    types = (v.tensor_type for v in weights)
    return sum(int(t.nbytes) for t in types if t.rank > 1 and t.dtype.is_float)  # type: ignore[arg-type,misc]
