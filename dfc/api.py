"""The story in one screen: trace, carry out a recipe, prove, choose an engine, and call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dfc.ops  # noqa: F401 - makes the ops known
from dfc.arguments import check_given
from dfc.compiled import Compiled, with_state_inputs
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.planning.host import is_another, machine_text, this_machine
from dfc.planning.torch_device import check_device
from dfc.recipe.bench import ENGINE_RTOL, find_engine
from dfc.recipe.quantities import weight_bytes
from dfc.rewrite.pass_ import Pass

if TYPE_CHECKING:
    from dfc.planning.machine import Machine
    from dfc.planning.pipeline import Plan

Progress = Callable[[str], None]
ELSEWHERE = (
    "`{}` was chosen by measuring on another machine ({}): `dfc tune PACKAGE` measures on this one"
)


def trace(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Graph:
    """Capture a model as a graph, with torch.export's own argument names.

    Raises:  DfcError T family when the model cannot be captured.
    """
    from dfc.capture.torch_export import trace as capture

    return capture(model, args, kwargs, dynamic_shapes)


def parse(text: str, file: str = "<string>") -> Graph:
    """Read graph text.

    Raises:  DfcError P family with `file:line:col`; Q055 for what is no text.
    """
    check_given(text=text)
    from dfc.lang.graph_parser import parse_graph

    return parse_graph(text, file)


def compile(
    model: Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    recipe: Any = None,
    target: str | os.PathLike[str] | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Callable[..., Any]] | None = None,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    budget: str | int | float | None = None,
    passes: Sequence[str | Pass] | None = None,
    engine: str | None = "auto",
    verify: str | None = None,
    strict: bool = False,
    device: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    reproducers: str | os.PathLike[str] | None = None,
    print_after: Callable[[str, Graph], None] | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Trace (unless given a graph), carry out a recipe, prove, and build for an engine.

    `args`, `kwargs` and `dynamic_shapes` are torch.export's.

    What to do is one of
      recipe    a preset ("O0" to "O3"; the default is "simplify"), the path of a `.dfc`
                file, its text, or a plan; with `target`, a path or text, `settings` as in
                {"fuse.limit": 3}, and `budget` for its holes: "60s", or a number of tries
      passes    names or `Pass` objects, in order, and nothing else

    What a recipe names is passed here, because text never holds code:
      data      {"val": batches}: whatever the metrics and passes read, more than once
      metrics   {"top1": function}: called as `top1(run, data)` for `metric top1 on val`, and as
                `top1(run)` where the recipe names no data; `run` is called like the model, and the
                result is a number
      functions {"distil": train}: called as `train(module, data)` for `recover by distil using
                texts`; `module` is called like the model, and trained in place

    `engine` is a name, several separated by commas, or "auto": the fastest that is right on the
    example is kept ("auto" tries inductor on GPUs alone: it compiles for long); `device` is "cpu",
    "cuda", "cuda:1", or None: where the example is; `verify` is "each",
    "end" or "none", in place of what the recipe says; under `strict` a wrong rewrite is an error
    instead of being left out, told in the report, and written below `reproducers` for `dfc run` to
    show again (default: $DFC_REPRODUCERS, else the user's cache; "none" writes nothing); `weights`
    is a safetensors file for what the model has on the meta device, read as it is needed.

    Raises:  DfcError; dfc.RequirementMissed (status 5) when a `require` of the recipe does not
             hold, with `.compiled` and `.report`.
    """
    from dfc.recipe.compilation import Compilation
    from dfc.recipe.sources import chosen_plan
    from dfc.reproducer import writer

    check_given(
        model=model, kwargs=kwargs, recipe=recipe, data=data, metrics=metrics, functions=functions,
        settings=settings, passes=passes, weights=weights, print_after=print_after,
        progress=progress, engine=engine,
    )  # fmt: skip
    device = device or _device_of(args, kwargs)
    check_device(device)
    if passes is not None and (recipe, target, settings) != (None, None, None):
        raise DfcError("Q055", "give `passes` or `recipe`, not both")
    plan, guarded = chosen_plan(recipe, passes, target, settings)
    return Compilation(
        plan, guarded, data or {}, metrics or {}, budget, engine or "auto", verify, strict,
        device, print_after, progress or (lambda what: None), writer(reproducers), functions or {},
    ).run(model, args, kwargs, dynamic_shapes, weights)  # fmt: skip


def _device_of(*given: Any) -> str:
    """Where the first tensor among the arguments lies; on the host without one."""
    import torch

    leaves = torch.utils._pytree.tree_leaves(given)
    found = (x.device for x in leaves if isinstance(x, torch.Tensor) and x.is_cuda)
    return str(next(found, "cpu"))


def load(
    path: str | os.PathLike[str],
    *,
    engine: str | None = None,
    device: str = "cpu",
    memory: str | int | None = None,
    host: str | int | None = None,
) -> Compiled:
    """Read a package and build it for an engine (default: the one that it was compiled for).

    With `memory` ("2GiB") it never takes more of the device than that: weights that do not fit are
    streamed (`Compiled.within`), by the engine "eager"; with a `host` memory as well, from a device
    that is not the host, what that does not hold is read from the file.
    Raises:  DfcError D family for a damaged package, and those of `Compiled.within`.
    """
    if memory is None:
        if host is not None:
            help = 'write dfc.load(path, memory="8GiB", host="16GiB", device="cuda")'
            raise DfcError("K074", "`host` goes with `memory`", help=help, status=2)
        return opened(path, engine=engine, device=device)
    if engine not in (None, "eager"):
        message = f"the `{engine}` engine cannot stream weights: `eager` can"
        raise DfcError("K073", message, help="leave out the engine, or the memory", status=2)
    return opened(path, engine="eager", device=device, build=False).within(memory, host=host)


def opened(
    path: str | os.PathLike[str],
    *,
    engine: str | None = None,
    device: str = "cpu",
    build: bool = True,
) -> Compiled:
    """A package as it was read, with an engine's runner or without any."""
    from dfc.package import read_package

    check_given(path=path, engine=engine)
    check_device(device)
    package = read_package(Path(path))
    report = package.report
    name = engine or package.engine
    if engine is None and is_another(report.machine, this_machine(device)):
        report.notes.append(ELSEWHERE.format(name, machine_text(report.machine)))
    has_data = all(p.data is not None for p in package.graph.parameters.values())
    found = find_engine("eager" if name == "auto" else name)
    runner = found.build(with_state_inputs(package.graph), device) if has_data and build else None
    return Compiled(
        package.graph, found, runner, report, package.probes, device, package.recipe,
        plan=package.plan,
    )  # fmt: skip


def plan(
    model: Any,
    target: Any = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    objective: str = "throughput",
    devices: Sequence[str] = (),
    max_stages: int | None = None,
    microbatches: int = 8,
    train: bool = False,
    schedule: str = "auto",
    stages_per_device: int | None = None,
    sizes: Mapping[str, int] | None = None,
    pins: Mapping[str, str] | None = None,
    together: Sequence[str | Sequence[str]] = (),
    engine: str | Mapping[str, str] | None = None,
    measured: Callable[[Any], float | None] | None = None,
    measured_on: str = "",
    seconds: float = 15.0,
    stream: bool = False,
    recompute: str = "never",
) -> Plan:
    """How a model would run as stages on several devices: nothing is run, no weights are needed.

    `objective` is what is made small: the time between two microbatches ("throughput"), the time of
    one ("latency"), the bytes of the device that holds most ("memory"), or the devices' seconds
    times their prices ("cost"); a plan tells all four.

    `model` is a model with its arguments (torch.export's), or a graph. `target` is the path or text
    of a target, a `Machine`, or None for this host; `devices` names those that may be used, all by
    default, and there are at most `max_stages` stages. A device has `stages_per_device` of them, or
    as many as is best with the schedule: "interleaved", "breadth_first" and "interleaved_zb" have
    any number, "zb_v" and "dualpipe_v" two; "auto" chooses among all. `pins` gives selectors a
    device, as in {"layers.0.**": "gpu0"}; each of `together` is selectors whose nodes share a
    stage. `sizes` are those of one microbatch; others are as in `args`, or the least that the model
    takes. Where stages run on an `engine`, or on one for each
    kind of device, as in {"cuda": "inductor", "cpu": "openvino"}, nodes are only where the engine
    takes them.
    `measured(node)` gives seconds in place of the model's, or None, on devices of the kind
    `measured_on` ("cpu", "cuda"), or on all. Where no exact method is quick
    enough, `seconds` bounds the search for a better bound.

    With `stream`, a stage may have more weights than its device holds: they come from the host's
    memory, or to a processor from disk, once for each microbatch; what the host does not hold of
    them comes from disk as well.

    With `train`, stages may keep of each microbatch what they take alone, and run their forward
    again before their backward pass, or keep what leaves cheap operators alone to run again:
    `recompute` is "never", "always", "selective", or "auto", where as few do as leave devices room,
    each in the better way, if that makes the model fit or a step shorter.

    Raises:  DfcError N040.. for what the target or the model lacks, N060 (status 6) when the model
             does not fit, with what would make it fit.
    """
    from dfc.calling import sizes_of_call
    from dfc.planning.devices import wanted
    from dfc.planning.limits import limits_of
    from dfc.planning.model import Wish
    from dfc.planning.partition import Effort
    from dfc.planning.pipeline import plan as make
    from dfc.planning.tier_plan import host_memory, stream_hops

    machine = _machine_of(target)
    graph = model if isinstance(model, Graph) else trace(model, args or (), kwargs, dynamic_shapes)
    usual = {} if args is None else sizes_of_call(graph, args, kwargs or {})
    limits = limits_of(graph, (pins or {}).items(), together)
    some = machine.only(devices) if devices else machine
    return make(
        graph, some, objective=wanted(objective),
        sizes=usual | dict(sizes or {}),
        wish=Wish(microbatches=microbatches, trains=train, recompute=recompute), schedule=schedule,
        stages_per_device=stages_per_device,
        effort=Effort(seconds=seconds), measured=measured or (lambda node: None),
        limits=replace(limits, supports=_taken_by(engine)), max_stages=max_stages,
        measured_on=measured_on, hops=stream_hops(some, machine) if stream else {},
        host=host_memory(machine) if stream else None,
    )  # fmt: skip


def _taken_by(engine: str | Mapping[str, str] | None) -> Callable[[Any, Any], str | None]:
    """Why a node cannot be on a device, by what the device computes in and the engine takes."""
    from dfc.planning.model import by_dtype

    if engine is None:
        return by_dtype
    names = {"cpu": engine, "cuda": engine} if isinstance(engine, str) else dict(engine)
    engines = {kind: find_engine(name) for kind, name in names.items()}

    def supports(node: Any, device: Any) -> str | None:
        found = engines.get(device.kind)
        if found is not None and device.kind not in found.devices:
            return f"`{found.name}` does not run on `{device.kind}`"
        return by_dtype(node, device) or (found.supports(node) if found else None)

    return supports


def _machine_of(target: Any) -> Machine:
    """A target in any form as the planner's machine.

    Raises:  DfcError N045 for a text without a target, or with several, and for what is none.
    """
    from dfc.planning.here import here
    from dfc.planning.machine import Machine

    if target is None:
        return here()
    if isinstance(target, Machine):
        return target
    if isinstance(target, (str, os.PathLike)):
        from dfc.recipe.machines import read_machine

        return read_machine(target)
    if not hasattr(target, "machine"):
        message = f"a target is a path, a text or a Machine, not of type {type(target).__name__}"
        raise DfcError("N045", message, help="None is this host", status=2)
    return target.machine()  # type: ignore[no-any-return]


__all__ = ["ENGINE_RTOL", "Compiled", "compile", "load", "parse", "plan", "trace", "weight_bytes"]
