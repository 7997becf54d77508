"""A bench for versions of one model: built for engines, judged, timed, and the last choice made.

Engines are compared on the user's example. Runners are kept for a while, because a version is
measured against the one before it and then against the one after.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfc.compiled import Compiled, with_state_inputs
from dfc.compress.integers import saturating
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Parameter
from dfc.ir.types import TensorType
from dfc.recipe import short_products
from dfc.report import Report
from dfc.rewrite.pass_ import EXACT, Numerics

if TYPE_CHECKING:
    from dfc.planning.engine import Engine, Runner
    from dfc.runtime.measure import Comparison, Timing

# How far an engine's own kernels may be from the witness, of the largest element.
ENGINE_RTOL = 3e-5
# What `auto` tries. Inductor compiles for half a minute and more: by name, or by `dfc tune`.
CANDIDATES = ("eager", "onnxruntime", "openvino")
LAYOUTS = ("eager:channels_last",)  # and where there are images
# On a GPU, a small batch waits for Python unless its kernels are recorded; and what fuses kernels
# is so much faster there that the last choice waits for it.
RECORDED = ("eager:cuda_graph",)
RECORDED_LAYOUTS = ("eager:channels_last:cuda_graph",)
FINALISTS = ("inductor:cuda_graph",)
# Quantized weights that meet floats are read there as they are stored, for memory's sake; unpacked
# once they may be faster, from some number of rows on.
FLOATS = ("eager:floats", "eager:floats:cuda_graph")
# A graph of 16 bits without its casts, the type told to OpenVINO, which casts where it pays.
HINTED = ("openvino:hint",)
_IN_INTEGERS = ("onnxruntime", "openvino")  # engines that multiply calibrated codes
_KEPT = 6  # runners; each may hold the weights in a form of its own

Progress = Callable[[str], None]


@dataclass
class Ready:
    """A version of the model built for an engine, and how its results compare with the witness."""

    graph: Graph
    engine: Engine
    runner: Runner
    verdict: Any = None  # dfc.rewrite.agree.Verdict; None without an example

    @property
    def wrong(self) -> str | None:
        if self.verdict is None or self.verdict.agrees:
            return None
        why = saturating(self.graph) if self.engine.name.startswith(_IN_INTEGERS) else ""
        return f"{self.verdict.difference}{why and f'; {why}'}"


@dataclass
class Bench:
    """Builds and measures versions of one model.

    Needs:  `original` is the captured graph, which nobody changes; `probes` or None.
    """

    original: Graph
    probes: Any
    engine: str = "auto"
    device: str = "cpu"
    say: Progress = lambda what: None
    rtol: float = 0.0  # what the recipe allows beside what passes promise
    keep: int = _KEPT
    example: Sequence[Any] | None = None  # what is measured on; None: the first probe's inputs
    # Of versions, by their ids; the reference tells whether it is still that one.
    _promised: dict[int, tuple[Callable[[], Graph | None], Numerics]] = field(default_factory=dict)
    _standards: dict[int, tuple[Callable[[], Graph | None], Any]] = field(default_factory=dict)
    _leads: dict[int, tuple[Callable[[], Graph | None], str]] = field(default_factory=dict)
    _ready: OrderedDict[tuple[int, str], Ready] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        if self.engine != "auto":
            for name in self.engine.split(","):
                find_engine(name)  # an unknown one is no engine that refuses the graph

    def why_not(self) -> str | None:
        """Why nothing can be run, None when it can."""
        if any(p.data is None for p in self.original.parameters.values()):
            return "the model has no weights"
        return "there are no example inputs" if self.probes is None else None

    def ready(self, graph: Graph, engine: str) -> Ready:
        """A version built for an engine and judged.

        Raises:  DfcError when the engine refuses it, K023 when building or running it fails.
        """
        key = (id(graph), engine)  # the entry keeps the graph, so that no other gets its id
        found = self._ready.get(key)
        if found is None:
            made = find_engine(engine)
            try:
                runner = made.build(with_state_inputs(graph), self.device)
                found = Ready(graph, made, runner, self._judge(graph, runner))
            except RuntimeError as e:  # of a library or a device: the other engines may run it
                raise DfcError("K023", f"engine `{engine}` fails: {first_line(e)}") from e
            self._ready[key] = found
            while len(self._ready) > self.keep:
                self._ready.popitem(last=False)
        self._ready.move_to_end(key)
        return found

    def promise(self, graph: Graph, numerics: Numerics) -> None:
        """Note what the passes that made a version promise, so that engines are judged by it."""
        self._promised[id(graph)] = weakref.ref(graph), numerics

    def _numerics(self, graph: Graph) -> Numerics:
        known, numerics = self._promised.get(id(graph), (lambda: None, EXACT))
        return numerics if known() is graph else EXACT

    def _standard(self, graph: Graph) -> Any:
        """The probes that a version is held to on every engine: the original's results, or its own
        where they differ on purpose; on a device that is short of float32, eager mode's there.
        """
        changes = self._numerics(graph).kind == "changes"
        if not changes and not short_products.short_products(graph, self.device):
            return self.probes
        known, found = self._standards.get(id(graph), (lambda: None, None))
        if known() is not graph:
            found = own_probes(self.probes, graph) if changes else self.probes
            found = standard_on(self.device, found, graph)
            self._standards[id(graph)] = weakref.ref(graph), found
        return found

    def not_finite(self, graph: Graph) -> tuple[int, int]:
        """Numbers that a version gives as NaN or infinite and the original does not; of how many.

        Needs:  probes.
        """
        import torch

        standard, bad, whole = self._standard(graph), 0, 0
        if standard is self.probes:
            return 0, 0
        for own, given in zip(standard.ready(), self.probes.probes, strict=True):
            for x, o in zip(own.original or (), given.original or (), strict=False):
                if isinstance(x, torch.Tensor) and isinstance(o, torch.Tensor):
                    lost = ~x.isfinite().cpu()
                    if x.shape == o.shape:  # else its size is data's to decide, and so is its place
                        lost &= o.isfinite().cpu()
                    bad += int(lost.sum())
                    whole += x.numel()
        return bad, whole

    def _judge(self, graph: Graph, runner: Runner) -> Any:
        if self.probes is None:
            return None
        run = run_on(self.device, graph, runner)
        if self.example is not None:  # it may be larger than what the probes have
            run(self.example)
        rtol = max(self._numerics(graph).rtol, self.rtol)
        return judge_engine(self._standard(graph), graph, run, rtol)

    def candidates(self, graph: Graph | None = None) -> list[str]:
        """The engines that were named, or those that `auto` tries and whose library is here: for
        the original, and for a version besides in its own forms.
        """
        if self.engine != "auto":
            return self.engine.split(",")
        from dfc.runtime.engines import installed_engines

        found = [n for n in CANDIDATES if n in installed_engines()]
        found += forms(self.original, self.device)
        found += forms(graph, self.device) if graph is not None else []
        return list(dict.fromkeys(found))

    def finalists(self, graph: Graph) -> list[str]:
        """The candidates for a version, and what is worth its time once: for the result."""
        compiled = self.engine == "auto" and self.device.startswith("cuda")
        return list(dict.fromkeys([*self.candidates(graph), *(FINALISTS if compiled else ())]))

    def lead(self, graph: Graph | None = None) -> str:
        """The engine that a version is measured on: the one named, or the original's fastest; for
        a version of other arithmetic, its own.

        Raises:  DfcError K005 when none runs it.
        Why:     other arithmetic is other kernels: what is fastest with integers may be slowest
                 with floats.
        """
        is_other = graph is not None and self._numerics(graph).is_lossy
        version = graph if graph is not None and is_other else self.original
        candidates = self.candidates(version)
        if len(candidates) == 1:
            return candidates[0]
        known, name = self._leads.get(id(version), (lambda: None, ""))
        if known() is not version:
            name = self._fastest(version, candidates)
            self._leads[id(version)] = weakref.ref(version), name
        return name

    def _fastest(self, version: Graph, candidates: Sequence[str]) -> str:
        what = "the original" if version is self.original else "the version"
        right: list[str] = []
        for name in candidates:
            self.say(f"building {what} for {name}")
            if self.runs(version, name):
                right.append(name)
        if not right:
            which = "model as it was captured" if version is self.original else "rewritten graph"
            raise DfcError("K005", f"no engine runs the {which}")
        if len(right) == 1:
            return right[0]
        self.say("looking for the faster engine")
        timings = self.times([(version, n) for n in right], seconds=0.3)
        return min(zip(timings, right, strict=True), key=lambda x: x[0].p50_ms)[1]

    def runs(self, graph: Graph, engine: str) -> bool:
        """Whether an engine takes a version and gives its results; why not is told in the end,
        when the result is built for it.
        """
        try:
            return self.ready(graph, engine).wrong is None
        except DfcError:
            return False

    # Measuring

    def inputs(self) -> list[Any]:
        example = self.probes.probes[0].inputs if self.example is None else self.example
        return on_device(example, self.device)

    def runner(self, graph: Graph, engine: str) -> Runner:
        """A version as a function of the graph's inputs alone.

        Raises:  DfcError V033 when it gives other results on the engine.
        """
        found = self.ready(graph, engine)
        if found.wrong is not None:
            raise DfcError("V033", f"engine `{engine}` gives other results: {found.wrong}")
        state = on_device(state_of(graph), self.device)
        if not state:
            return found.runner
        return lambda inputs: found.runner([*inputs, *state])

    def times(self, versions: Sequence[tuple[Graph, str]], seconds: float = 1.0) -> list[Timing]:
        """Versions on engines, measured in alternating runs."""
        from dfc.runtime.measure import measure

        runners = {str(i): self.runner(g, name) for i, (g, name) in enumerate(versions)}
        found = measure(runners, self.inputs(), seconds=seconds, most=1000)
        return [found[str(i)] for i in range(len(versions))]

    def compare(
        self, before: Graph, after: Graph, question: str, engine: str | None = None, **limits: Any
    ) -> Comparison:
        """One version against another on an engine, or each on its lead, beyond noise."""
        versions = [(g, engine or self.lead(g)) for g in (before, after)]
        return self.compare_versions(versions[0], versions[1], question, **limits)

    def compare_engines(
        self, graph: Graph, before: str, after: str, question: str = "faster", **limits: Any
    ) -> Comparison:
        """One version on one engine against the same on another, beyond noise."""
        return self.compare_versions((graph, before), (graph, after), question, **limits)

    def compare_versions(
        self, before: tuple[Graph, str], after: tuple[Graph, str], question: str, **limits: Any
    ) -> Comparison:
        """A version on an engine against another one on another, beyond noise."""
        from dfc.runtime.measure import compare

        runners = self.runner(*before), self.runner(*after)
        apart = before[1] != after[1]
        return compare(*runners, self.inputs(), question=question, apart=apart, **limits)

    def callable(self, graph: Graph, engine: str) -> Compiled:
        """A version that is called like the model, with its state as it was at first."""
        found = self.ready(graph, engine)
        return Compiled(graph, found.engine, found.runner, Report(), device=self.device)


def own_probes(probes: Any, graph: Graph) -> Any:
    """The same inputs with a version's own results: it differs from the original on purpose."""
    from dfc.rewrite.probe import own_probes as own

    return own(probes.ready(), graph, probes.seed)


def judge_engine(standard: Any, graph: Graph, run: Runner, rtol: float) -> Any:
    """An engine's results for a graph against the probes, within what its kernels may differ by
    or what is promised."""
    from dfc.ops.rounding import ROUNDED_RTOL, rounds_values

    rounded = rounds_values(graph)
    rtol = max(ROUNDED_RTOL if rounded else ENGINE_RTOL, rtol)
    return standard.judge(run, rtol=rtol, rounded=rounded)


def standard_on(device: str, standard: Any, graph: Graph) -> Any:
    """What engines are held to on a device: where it is short of float32, PyTorch itself there."""
    if not short_products.short_products(graph, device):
        return standard
    eager = find_engine("eager").build(with_state_inputs(graph), device)
    return standard.as_run_by(run_on(device, graph, eager), short_products.RTOL)


def run_on(device: str, graph: Graph, runner: Runner) -> Runner:
    """A graph that is built for a device, with its state at first, from this machine's memory."""
    state = on_device(state_of(graph), device)

    def run(inputs: Sequence[Any]) -> list[Any]:
        return on_device(runner([*on_device(inputs, device), *state]), "cpu")

    return run


def forms(graph: Graph, device: str) -> list[str]:
    """The forms of a graph that are tried on a device beside the plain one."""
    images = has_images(graph)
    if device == "cpu":
        return [*(LAYOUTS if images else ()), *(HINTED if _may_hint(graph) else ())]
    unpacked = FLOATS if device.startswith("cuda") and has_packed_floats(graph) else ()
    return [*RECORDED, *(RECORDED_LAYOUTS if images else ()), *unpacked]


def _may_hint(graph: Graph) -> bool:
    from dfc.compress.widening import half_of_products
    from dfc.runtime.engines import installed_engines

    return half_of_products(graph) is not None and "openvino" in installed_engines()


def has_images(graph: Graph) -> bool:
    """Whether the layout of memory matters to a graph: it convolves images."""
    return any(
        n.op.startswith("aten.") and "conv" in n.op.split(".")[1]
        and any(isinstance(v.type, TensorType) and v.type.rank == 4 for v in n.operands)
        for n in graph.walk()
    )  # fmt: skip


def has_packed_floats(graph: Graph) -> bool:
    """Whether quantized weights of a graph are multiplied by floats."""
    return any(
        n.op in ("dfc.linear_w4", "dfc.linear_w8", "dfc.linear_f8")
        and n.attributes["activations"] == "float"
        for n in graph.walk()
    )


def first_line(error: BaseException) -> str:
    """What an error says, or its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def find_engine(name: str) -> Engine:
    from dfc.runtime.engines import find_engine as find

    return find(name)


def on_device(values: Sequence[Any], device: str) -> list[Any]:
    """The tensors among the values on a device; numbers as they are."""
    import torch

    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in values]


def state_of(graph: Graph) -> list[Any]:
    """The buffers that the model writes to, as they are at first."""
    return [
        m.target.data.tensor().clone()
        for m in graph.mutations
        if isinstance(m.target, Parameter) and m.target.data is not None
    ]
