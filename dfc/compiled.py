"""A compiled model: called like the original, saved as a package, exported as ONNX."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dfc.calling import build_outputs, flat_checked, flat_inputs, own_outputs
from dfc.counting import counted
from dfc.ending import noticed
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter
from dfc.planning.engine import Engine, Holding, Runner
from dfc.report import Report

if TYPE_CHECKING:
    from dfc.explaining import Explanation
    from dfc.planning.pipeline import Plan
    from dfc.rewrite.probe import Probes


class Compiled:
    """What `dfc.compile` and `dfc.load` return.

    Buffers that the model writes to live here: each call continues from the last one's state.
    Results never share memory with inputs or weights, and have no gradients. Threads may call one
    at once where the model writes to no buffers. A copy by `copy.deepcopy` has the same weights and
    a state of its own; to another process it goes as a package.
    """

    def __init__(
        self,
        graph: Graph,
        engine: Engine,
        runner: Runner | None,
        report: Report,
        probes: Sequence[Any] = (),
        device: str = "cpu",
        recipe: str = "",
        emits: Sequence[tuple[str, Mapping[str, Any]]] = (),
        passes: Sequence[Any] | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.graph = graph
        self.engine = engine
        self.report = report
        self.probes = list(probes)
        self.device = device
        self.recipe = recipe  # resolved, as text
        self.emits = tuple(emits)
        self.passes = None if passes is None else tuple(passes)  # as applied; None: not known
        self.plan = plan  # where `partition` was a step
        self._runner = runner
        self._state = self._initial_state()
        self._outputs = len(graph.outputs)
        self._owned: frozenset[int] | None = None

    def __repr__(self) -> str:
        where = "" if self.device == "cpu" else f" on {self.device}"
        return (
            f"<dfc.Compiled: {counted(len(self.graph), 'node')}, run by {self.engine.name}{where}>"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        """What runs is shared: it keeps nothing from one call to the next."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        shared = vars(self)
        twin.__dict__.update(shared, _state={k: v.clone() for k, v in self._state.items()})
        twin.report = deepcopy(self.report, memo)
        return twin

    def __copy__(self) -> Compiled:
        twin = object.__new__(type(self))
        twin.__dict__.update(vars(self))
        return twin

    def __reduce__(self) -> NoReturn:
        help = "write it by `compiled.save(path)`, and `dfc.load(path)` it there"
        raise DfcError("K024", "a compiled model cannot be pickled", help=help, status=2)

    def _initial_state(self) -> dict[str, Any]:
        """The current value of each mutated parameter."""
        return {
            m.target.name: m.target.data.tensor().clone().to(self.device)
            for m in self.graph.mutations
            if isinstance(m.target, Parameter) and m.target.data is not None
        }

    @property
    def state(self) -> Mapping[str, Any]:
        """The buffers that calls write to, by name, as the last call left them."""
        return dict(self._state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; inputs that lie elsewhere are moved to its device, results stay there.

        Warns:   when an input asks for a gradient, which would end here unseen.
        Raises:  DfcError K010..K016 when the arguments do not fit, K family when running fails.
        """
        inputs = flat_inputs(self.graph, args, kwargs)
        _warn_of_gradients(inputs)
        # Copied before the state is written back: a result may be what is written to.
        results = own_outputs(self.run_flat(inputs), inputs, self.owned)
        for m, value in zip(self.graph.mutations, results[self._outputs :], strict=True):
            if isinstance(m.target, Parameter):
                self._state[m.target.name] = value.clone()
            else:
                inputs[self.graph.inputs.index(m.target)].copy_(value)
        return build_outputs(self.graph, inputs, iter(results[: self._outputs]))

    def run_flat(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat inputs to output leaves and mutations, without checks or state changes."""
        if self._runner is None:
            self.require_weights()
            raise DfcError("K021", "the model was opened without an engine", status=2)
        try:
            if self.device != "cpu":
                return self._runner(self._on_device(inputs))
            return self._runner([*inputs, *self._state.values()])
        except (RuntimeError, IndexError) as e:
            raise DfcError("K023", f"the `{self.engine.name}` engine failed: {e}") from e
        except KeyboardInterrupt:
            noticed()
            raise

    def require_weights(self) -> None:
        """Raises:  DfcError K021 for a model on the meta device."""
        missing = [p.name for p in self.graph.parameters.values() if p.data is None]
        if missing:
            raise DfcError(
                "K021",
                f"the model has no weights (`{missing[0]}` is on the meta device)",
                help="compile it with its weights: `dfc compile MODEL --weights FILE.safetensors`, "
                'or dfc.compile(..., weights="FILE.safetensors")',
                status=2,
            )

    @property
    def owned(self) -> frozenset[int]:
        """The addresses of the weights' memory."""
        if self._owned is None and isinstance(self._runner, Holding):
            memory = self._runner.memory()
            self._owned = frozenset(x.untyped_storage().data_ptr() for x in memory)
        if self._owned is None:
            self._owned = frozenset(
                p.data.tensor().untyped_storage().data_ptr()
                for p in self.graph.parameters.values()
                if p.data is not None
            )
        return self._owned

    def within(
        self,
        memory: str | int,
        *,
        device: str | None = None,
        inputs: Sequence[Any] | None = None,
        slots: int | None = None,
        placement: str = "even",
        host: str | int | None = None,
        say: Callable[[str], None] = lambda what: None,
    ) -> Compiled:
        """The same model in so much memory of a device ("2GiB"), by streaming weights to it.

        The memory is for weights and for what is computed of inputs as large as `inputs` (flat;
        default: the example). What does not fit comes from the package's file, or, to a GPU, from
        pinned memory of the host, while other layers compute. Parts are timed, and as few weights
        are streamed as the memory allows; `slots` and `placement` ("even", "tail") take choices
        from the planner. With a `host` memory no more of that is pinned: what it does not hold
        comes from the file, over both hops. It runs on PyTorch's operators, one call at a time,
        and is closed by `close`, or at the end of `with`.
        Raises:  DfcError Q010 for a size that is none, N064 (status 6) for one that is too small,
                 K070 for weights that are nowhere else, K021 for a model without weights, K074 for
                 a host's memory where the device is the host.
        """
        from dfc.arguments import check_given
        from dfc.lang.units import byte_count
        from dfc.planning.torch_device import check_device
        from dfc.runtime.engines import find_engine
        from dfc.runtime.tiers.within import Wanted, within

        below = None if host is None else byte_count(host)
        wanted = Wanted(byte_count(memory), slots, placement, below)
        self.require_weights()
        check_given(say=say)
        to = device or self.device
        check_device(to)
        if inputs is not None:
            inputs = flat_checked(self.graph, inputs)
        elif self.probes:
            inputs = self.probes[0].inputs
        found = Compiled(
            self.graph, find_engine("eager"), None, self.report, self.probes, to, self.recipe,
            self.emits, self.passes, self.plan,
        )  # fmt: skip
        flat = None if inputs is None else found._on_device(inputs)
        found._runner = within(with_state_inputs(self.graph), wanted, to, flat, say)
        return found

    def _on_device(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs and state as the runner takes them."""
        import torch

        moved = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in inputs]
        return [*moved, *self._state.values()]

    @property
    def runner(self) -> Runner | None:
        """What runs the graph's flat inputs; None without weights."""
        return self._runner

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what the runner has open: threads and files of streamed weights. It is then over."""
        if isinstance(self._runner, Holding):
            self._runner.close()

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the package.

        Raises:  DfcError D010.. when the target exists or cannot be written.
        """
        from dfc.package import write_package

        write_package(self, path, force=force)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        contrib: bool = False,
        stages: str | int | Mapping[Node, int] | None = None,
        **options: Any,
    ) -> None:
        """Write plain ONNX, checked and run in ONNX Runtime against the probes first.

        With `contrib` it is written for ONNX Runtime alone, with operators of its own. With
        `stages` it is a folder of one file a stage, which `dfc run` executes as a pipeline:
        "separate" takes the stages of a partitioned model, a number so many of equal time here,
        a mapping gives each node its own.
        Raises:  DfcError X family when an op has no translation or the results differ.
        """
        from dfc.compress.integers import saturating
        from dfc.emit.onnx_export import export_onnx
        from dfc.emit.onnx_stages import export_stages
        from dfc.planning.microbatches import batch_of
        from dfc.planning.schedules import forward_of

        probes = [(p.inputs, p.original) for p in self.standard().ready()]
        options |= {"probes": probes, "force": force, "contrib": contrib}
        if stages is None:
            try:
                export_onnx(self.graph, path, **options)
            except DfcError as e:
                why = saturating(self.graph) if e.code == "X003" else ""
                if not why:
                    raise
                one = e.diagnostics[0]
                raise DfcError(one.code, one.message, notes=(*one.notes, why), status=4) from e
            return
        placed = self._stages(stages)
        export_stages(
            self.graph, path, stage_of=placed, batch=batch_of(self.graph),
            program=None if placed or self.plan is None else forward_of(self.plan.program),
            beside=self._write_example, **options,
        )  # fmt: skip

    def _write_example(self, folder: Path) -> None:
        """What the stages are run and measured on; their proof is done."""
        from dfc.emit.onnx_stages import PROBES
        from dfc.package import write_probes

        for probe in self.probes[:1]:
            write_probes(folder / PROBES, [replace(probe, original=None, witness=None)])

    def _stages(self, wanted: str | int | Mapping[Node, int]) -> Mapping[Node, int] | None:
        """The stage of each node; None where the nodes know it themselves."""
        from dfc.planning.balanced import balanced

        if wanted == "separate":
            return None
        if isinstance(wanted, str):
            help = 'write stages="separate", or a number'
            raise DfcError("X005", f"`{wanted}` are no stages", help=help, status=2)
        if not isinstance(wanted, int):
            return wanted
        if not self.probes:
            help = "compile it with example arguments, or partition it"
            raise DfcError("X005", "there are no inputs to time its nodes on", help=help, status=2)
        return balanced(self.graph, wanted, self.probes[0].inputs)

    def standard(self) -> Probes:
        """What engines and files are held to: the original's results, or, where the recipe changes
        those on purpose or a package holds none, the graph's own."""
        from dfc.rewrite.probe import Probes, own_probes

        own = own_probes(self.probes, self.graph)
        if self.report.lossy:
            return own
        pairs = zip(self.probes, own.probes, strict=True)
        return Probes(self.graph, [p if p.original is not None else mine for p, mine in pairs])

    def emit(self, stem: str | os.PathLike[str], *, force: bool = False) -> list[str]:
        """Write what the recipe's `emit` lines ask for: STEM.onnx, STEM.stages (a folder),
        STEM.dfc, or their own names.

        Raises:  DfcError D010.. for the files, X family for what ONNX cannot say.
        """
        from dfc.publish import publish_file

        written: list[str] = []
        for format, options in self.emits:
            path = emitted_path(stem, format, options)
            rest = {k: v for k, v in options.items() if k != "file"}
            if format == "onnx":
                self.export(path, force=force, **rest)
            else:
                with publish_file(path, force=force) as temp:
                    temp.write_text(str(self.graph), encoding="utf-8")
            written.append(path)
        return written

    def explain(
        self,
        model: Any,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        dynamic_shapes: Any = None,
        *,
        rule: str | None = None,
        pass_: str | None = None,
        node: str | None = None,
        all: bool = False,
    ) -> Explanation:
        """Why a rule, a pass or a node of the model went as it did when this was compiled.

        The model, or the graph, is given again, since its weights are not kept here, and goes once
        more through the passes that were kept. Answers are those of `dfc.explain`.
        Raises:  DfcError as `dfc.explain`, and Q050 for a loaded package.
        """
        from dfc.explaining import explain

        if self.passes is None:
            raise DfcError(
                "Q050",
                "a loaded package does not know which passes were applied to it",
                help="call `dfc.explain(model, ...)`, or look at `.report`",
            )
        return explain(
            model, args, kwargs, dynamic_shapes,
            rule=rule, pass_=pass_, node=node, passes=self.passes, all=all,
            target=self.recipe if self.plan is not None else None,
        )  # fmt: skip

    def __str__(self) -> str:
        return str(self.report)


def _warn_of_gradients(inputs: Sequence[Any]) -> None:
    """Where autograd is on, and a layer before this one would be trained through it."""
    import torch

    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs):
        text = "a compiled model gives no gradients to its inputs: call it under torch.no_grad()"
        warnings.warn(text, stacklevel=3)


def emitted_path(stem: str | os.PathLike[str], format: str, options: Mapping[str, Any]) -> str:
    """Where an `emit` line writes: beside the stem, under its own name if it has one."""
    suffix = ".stages" if "stages" in options else {"onnx": ".onnx", "graph": ".dfc"}[format]
    path = Path(stem)
    return str(path.with_name(options["file"]) if "file" in options else f"{path}{suffix}")


def with_state_inputs(graph: Graph) -> Graph:
    """The graph with mutated parameters as extra inputs after the others: engines hold no state."""
    targets = [m.target for m in graph.mutations if isinstance(m.target, Parameter)]
    if not targets:
        return graph
    lifted, twin = graph.copy_with_map()
    mutations = [(m.target, m.value) for m in lifted.mutations]
    for target in targets:
        p = twin[target]
        v = lifted.add_input(lifted.fresh_name(f"state_{p.name}"), p.type)
        lifted.replace_uses(p, v)
        mutations = [(v if t is p else t, v if x is p else x) for t, x in mutations]
    lifted.set_outputs(lifted.outputs, lifted.output_tree, mutations)
    for target in targets:
        lifted.drop_parameter(target.name)
    return lifted
