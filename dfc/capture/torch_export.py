"""Model to graph by `torch.export`: the way in, with what is known to help when it refuses.

Dynamic dimensions are traced as `Dim.AUTO`, so that a size the model's own code bakes in is
reported as a restriction instead of refusing the model; the user's names are put back afterwards.
Examples of size 1 in a dynamic dimension are enlarged first, because torch would bake the 1 in.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from dfc.capture.call_structure import (
    constant,
    flat_leaves,
    register_caches,
    register_example,
    tree_of,
)
from dfc.capture.convert import Converter, Names, package_path, refuse_leaked
from dfc.errors import DfcError, Span
from dfc.ir.expr import Expr, Scalar, Size, symbol
from dfc.ir.graph import Argument, Graph, ParameterData, Range, Value
from dfc.ir.interpret import solve
from dfc.ir.tree import Const, Leaf, Tree, leaf_count
from dfc.ir.types import INT, TensorType
from dfc.ir.weights import TensorData
from dfc.ops.symbolic import from_sympy

DynamicShapes = Mapping[str, Any] | Sequence[Any] | None
_RESERVED = frozenset({"inf", "nan", "True", "False", "None", "in"})


@dataclass(frozen=True)
class DimWish:
    """What the user said of one dimension of one input."""

    name: str | None
    low: int = 1
    high: int | None = None
    size: Size | None = None  # for a derived dimension such as `4*h`: the size in terms of `h`


@dataclass
class Request:
    """One tracing: the model, flat examples, and the wishes for their dimensions."""

    model: torch.nn.Module
    leaves: list[Any]
    spec: Any
    wishes: list[dict[int, DimWish]]
    notes: list[str] = field(default_factory=list)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = self.spec.unflatten(self.leaves)
        return args, kwargs


def trace(
    model: torch.nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = None,
) -> Graph:
    """Capture a model as a graph.

    Shapes:  `dynamic_shapes` is torch.export's: by argument name or position, then by dimension,
             a `Dim`, a name, `Dim.AUTO`/`Dim.DYNAMIC`, or None.
    Raises:  DfcError T001..T029 (exit status 3) when the model cannot be captured, T030.. (2) for
             arguments that make no sense.
    """
    module = model if isinstance(model, torch.nn.Module) else _FunctionModule(model)
    if not isinstance(args, (tuple, list)):
        raise DfcError(
            "T030", f"`args` must be a tuple of the model's arguments, got a {type(args).__name__}",
            help="write `(x,)` for one argument", status=2,
        )  # fmt: skip
    given = dict(kwargs or {})
    try:
        inspect.signature(module.forward).bind(*args, **given)
    except TypeError as e:
        raise _bad_call(module, e) from e
    register_example([*args, given])
    register_caches()
    leaves, spec = flat_leaves(args, given)
    request = Request(module, leaves, spec, wishes_of(module, args, given, dynamic_shapes))
    return _capture(request)


class _FunctionModule(torch.nn.Module):
    """A plain function as a module, so that torch.export takes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function
        self.__signature__ = inspect.signature(function)
        self.forward = function  # type: ignore[method-assign]


# What the user said of sizes


def wishes_of(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: DynamicShapes
) -> list[dict[int, DimWish]]:
    """The wishes for each flat leaf."""
    leaves, _ = flat_leaves(args, dict(kwargs))
    found: list[dict[int, DimWish]] = [{} for _ in leaves]
    if not shapes:
        return found
    from torch.export.dynamic_shapes import _combine_args, _tree_map_with_path

    try:
        combined = _combine_args(model, tuple(args), dict(kwargs))
    except (TypeError, ValueError) as e:
        raise _bad_call(model, e) from e
    if isinstance(shapes, Mapping) and "args" not in shapes:
        unknown = [k for k in shapes if k not in combined]
        if unknown and len(combined) and not (set(combined) & set(shapes)):
            raise DfcError(
                "T031", f"dynamic_shapes names `{unknown[0]}`, the arguments are {', '.join(combined)}",
                status=2,
            )  # fmt: skip
        shapes = {k: shapes.get(k) for k in combined}
    elif not isinstance(shapes, Mapping):
        combined = type(shapes)(combined.values())  # type: ignore[call-arg]
    by_id = {id(x): i for i, x in reversed(list(enumerate(leaves))) if isinstance(x, torch.Tensor)}
    taken: list[int] = []

    def visit(path: Any, leaf: Any, spec: Any) -> None:
        if isinstance(leaf, torch.Tensor) and spec:
            at = by_id[id(leaf)]
            # the same tensor passed twice keeps one entry a place
            while at in taken and any(x is leaf for x in leaves[at + 1 :]):
                at = next(i for i in range(at + 1, len(leaves)) if leaves[i] is leaf)
            taken.append(at)
            found[at] = _tensor_wishes(leaf, spec)
        elif isinstance(leaf, int) and spec is not None and not isinstance(leaf, bool):
            at = next(i for i, x in enumerate(leaves) if x is leaf and i not in taken)
            taken.append(at)
            found[at] = {-1: _wish(spec) or DimWish(None)}

    try:
        _tree_map_with_path(visit, combined, shapes, tree_name="inputs")
    except DfcError:
        raise
    except Exception as e:  # torch raises its own UserError class among others
        raise DfcError(
            "T031", f"dynamic_shapes does not fit the arguments: {first_line(e)}",
            help="give the same nesting as the arguments, with {dimension: Dim} at each tensor",
            status=2,
        ) from e  # fmt: skip
    return found


def _tensor_wishes(x: torch.Tensor, spec: Any) -> dict[int, DimWish]:
    items = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
    found: dict[int, DimWish] = {}
    for dim, wish in items:
        if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
            raise DfcError(
                "T031", f"dynamic_shapes names dimension {dim} of a tensor of rank {x.dim()}", status=2
            )
        made = _wish(wish)
        if made is not None:
            found[dim % x.dim()] = made
    return found


def _wish(wish: Any) -> DimWish | None:
    if wish is None or isinstance(wish, int):
        return None
    if isinstance(wish, str):
        return DimWish(_safe(wish))
    if type(wish).__name__ == "_DimHint":
        if "STATIC" in repr(wish):
            return None
        return DimWish(None, wish.min if wish.min is not None else 1, wish.max)
    name = getattr(wish, "__name__", None)
    if not isinstance(name, str):
        raise DfcError("T031", f"dynamic_shapes holds {wish!r}, which is no dimension", status=2)
    low, high = getattr(wish, "min", 1), getattr(wish, "max", None)
    root = getattr(wish, "root", None)
    if root is not None:  # a derived dimension, `2*B`
        inner = _wish(root)
        assert inner is not None and inner.name is not None
        return DimWish(inner.name, inner.low, inner.high, wish.fn(symbol(inner.name)))
    high = None if high is None or not isinstance(high, int) or high >= 2**62 else high
    return DimWish(_safe(name), max(int(low), 1), high)


def _safe(name: str) -> str:
    from dfc.ir.types import DTYPES
    from dfc.ops.symbolic import identifier

    name = identifier(name)
    reserved = name in _RESERVED or name in DTYPES or re.match(r"u[fb]?\d+\Z", name)
    return f"{name}_" if reserved else name


def enlarge(request: Request) -> Request:
    """Examples in which no dynamic dimension has size 1: torch would take the 1 for a constant."""
    small: dict[str, DimWish] = {}
    used = {int(s) for x in request.leaves if isinstance(x, torch.Tensor) for s in x.shape}
    plan: list[tuple[int, int, str]] = []
    for i, wishes in enumerate(request.wishes):
        for dim, wish in wishes.items():
            key = wish.name or f"{i}.{dim}"
            if wish.size is None and dim >= 0 and request.leaves[i].shape[dim] == 1 and (wish.high is None or wish.high > 1):
                small[key] = wish
                plan.append((i, dim, key))
    if not plan:
        return request
    sizes: dict[str, int] = {}
    for key, wish in small.items():
        free = [n for n in range(max(2, wish.low), 64) if n not in used]
        fits = [n for n in free if wish.high is None or n <= wish.high]
        sizes[key] = fits[0] if fits else wish.high or 2
        used.add(sizes[key])
    leaves = list(request.leaves)
    for i, dim, key in plan:
        leaves[i] = leaves[i].detach().repeat_interleave(sizes[key], dim)
    return Request(request.model, leaves, request.spec, request.wishes, request.notes)


# Exporting, with what is known to help


@dataclass(frozen=True)
class Attempt:
    """One way to call torch.export, and what to tell the user when it was the one that worked."""

    name: str
    run: Callable[[Request], ExportedProgram]
    note: str | None = None


def _capture(request: Request) -> Graph:
    """Try the plain way; then what helps: draft export, eager attention, strict mode, fixed sizes."""
    larger = enlarge(request)
    first: Exception | None = None
    for attempt in _ATTEMPTS:
        for r in (larger,) if attempt.name != "static" else (request,):
            before = list(request.notes)
            try:
                graph = _build(request, attempt.run(r), r)
            except (KeyboardInterrupt, SystemExit):
                raise
            except Exception as e:  # noqa: BLE001 - torch.export raises many unrelated classes
                request.notes[:] = before
                if _raised_by_user_code(e) and first is None and _fails_eagerly(r):
                    if r is larger and larger is not request and not _fails_eagerly(request):
                        first = first or e
                        continue  # the model takes only size 1: the static attempt settles it
                    raise _user_error(e) from e
                first = first or e
                continue
            if attempt.note:
                graph.notes.insert(0, attempt.note)
            return graph
    assert first is not None
    raise refusal(first) from first


def _plain(request: Request, **options: Any) -> ExportedProgram:
    args, kwargs = request.arguments()
    with _quiet(), _no_scalar_trap(), _no_useless_casts():
        return torch.export.export(
            request.model, args, kwargs, dynamic_shapes=_torch_shapes(request), **options
        )


def _decided(request: Request) -> ExportedProgram:
    """Let the example's values decide `if tensor:`, and check the decision at run time."""
    import torch._functorch.config

    original = torch.Tensor.__bool__

    def decide(tensor: torch.Tensor) -> bool:
        real = getattr(tensor, "real_tensor", None)
        if real is None:
            return original(tensor)
        value = original(real)
        holds = tensor.reshape(()) if value else tensor.reshape(()).logical_not()
        message = f"the model was traced for {value} here, and decides by it"
        torch.ops.aten._assert_async.msg(holds.to(torch.bool), message)
        return value

    torch.Tensor.__bool__ = decide  # type: ignore[assignment, method-assign]
    try:
        with torch._functorch.config.patch(fake_tensor_propagate_real_tensors=True):
            return _plain(request)
    finally:
        torch.Tensor.__bool__ = original  # type: ignore[method-assign]


def _below_autograd(request: Request, *, sizes: bool, functionalize: bool) -> Any:
    from dfc.capture.below_autograd import trace_below_autograd

    dynamic = [{d for d in w if d >= 0} if sizes else set() for w in request.wishes]
    with _quiet(), _no_useless_casts():
        return trace_below_autograd(
            request.model, request.leaves, request.spec, dynamic, functionalize
        )


def _draft(request: Request) -> ExportedProgram:
    args, kwargs = request.arguments()
    with _quiet():
        return torch.export.draft_export(
            request.model, args, kwargs, dynamic_shapes=_torch_shapes(request)
        )


def _eager_attention(request: Request) -> ExportedProgram:
    config = getattr(request.model, "config", None)
    if not hasattr(config, "_attn_implementation") or config._attn_implementation == "eager":
        raise DfcError("T002", "the model has no other attention implementation")
    before = config._attn_implementation
    request.model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        return _plain(request)
    finally:
        request.model.set_attn_implementation(before)  # type: ignore[operator]


def _batched_experts(request: Request) -> ExportedProgram:
    """Experts as batched products: the loop over the experts that were hit depends on data."""
    config = getattr(request.model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    choose = getattr(request.model, "set_experts_implementation", None)
    if config is None or choose is None or before == "batched_mm":
        raise DfcError("T002", "the model has no other implementation of its experts")
    choose("batched_mm")
    try:
        return _plain(request)
    finally:
        choose(before or "eager")


def _static(request: Request) -> ExportedProgram:
    fixed = Request(request.model, request.leaves, request.spec, [{} for _ in request.wishes])
    try:
        return _plain(fixed)
    except Exception:
        return _draft(fixed)


_ATTEMPTS = (
    Attempt("plain", _plain),
    # Guards that torch cannot prove become assertions, which may be over-strict and are dropped.
    Attempt("deferred", lambda r: _plain(r, prefer_deferred_runtime_asserts_over_guards=True)),
    Attempt(
        "decided",
        _decided,
        "a decision of the model depends on data: it was taken as the example takes it, "
        "and is checked at run time",
    ),
    Attempt(
        "draft",
        _draft,
        "a decision of the model depends on data: it was taken as the example takes it, "
        "and is checked at run time",
    ),
    Attempt(
        "eager attention",
        _eager_attention,
        "captured with the `eager` attention implementation: torch.export refuses the other",
    ),
    Attempt(
        "batched experts",
        _batched_experts,
        "captured with the `batched_mm` implementation of the experts: the other depends on data",
    ),
    *(
        Attempt(
            "below autograd",
            partial(_below_autograd, sizes=sizes, functionalize=functionalize),
            "captured below autograd, where composite operators are already taken apart: "
            "torch.export refuses transforms inside forward",
        )
        for sizes in (True, False)
        for functionalize in (False, True)
    ),
    Attempt("strict", lambda r: _plain(r, strict=True), "captured in strict mode"),
    Attempt(
        "static",
        _static,
        "captured with every size fixed to the example's: torch.export refuses dynamic ones",
    ),
)


def _torch_shapes(request: Request) -> Any:
    """The wishes in torch's form, every dimension AUTO."""
    specs: list[Any] = []
    for x, wishes in zip(request.leaves, request.wishes, strict=True):
        if -1 in wishes:
            specs.append(Dim.DYNAMIC)
        elif not isinstance(x, torch.Tensor) or not wishes:
            specs.append(None)
        else:
            specs.append(
                {
                    d: Dim.AUTO(min=w.low if w.low > 1 else None, max=w.high)
                    if w.size is None
                    else Dim.AUTO
                    for d, w in wishes.items()
                }
            )
    if not any(s is not None for s in specs):
        return None
    args, kwargs = _spec_tree(request.spec, iter(specs))
    return _combined(request, args, kwargs)


def _spec_tree(spec: Any, leaves: Iterator[Any]) -> Any:
    """Specs in the nesting of the arguments; torch wants instances of classes as lists."""
    if spec.is_leaf():
        return next(leaves)
    parts = [_spec_tree(child, leaves) for child in spec.children()]
    if spec.type is dict:
        return dict(zip(spec.context, parts, strict=True))
    return tuple(parts) if spec.type is tuple else parts


def _combined(request: Request, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Specs by argument name; a `*args` tuple under its own name."""
    from torch.export.dynamic_shapes import _combine_args

    example_args, example_kwargs = request.arguments()
    names = list(_combine_args(request.model, example_args, example_kwargs))
    signature = inspect.signature(request.model.forward)
    found: dict[str, Any] = {}
    pending = list(args)
    for p in signature.parameters.values():
        if p.kind is p.VAR_POSITIONAL and p.name in names:
            found[p.name] = tuple(pending)
            pending = []
        elif p.name in names and pending and p.name not in kwargs:
            found[p.name] = pending.pop(0)
    for k, v in kwargs.items():
        found[k] = v
    return {n: found.get(n) for n in names}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's warnings and logs off the user's terminal: what matters is reported by us."""
    loggers = [logging.getLogger(n) for n in ("torch", "torch.export", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _no_useless_casts() -> Iterator[None]:
    """`module.to(dtype)` inside forward does nothing when the module has that dtype already."""
    original = torch.nn.Module.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            tensors = [*self.parameters(), *self.buffers()]
            if all(x.dtype == args[0] or not x.is_floating_point() for x in tensors):
                return self
        return original(self, *args, **kwargs)

    torch.nn.Module.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.to = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _no_scalar_trap() -> Iterator[None]:
    import torch._dynamo

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield


# Errors in the user's words


def first_line(e: BaseException) -> str:
    text = str(e).strip()
    return text.splitlines()[0] if text else type(e).__name__


def _bad_call(model: torch.nn.Module, e: Exception) -> DfcError:
    signature = inspect.signature(model.forward)
    return DfcError(
        "T032",
        f"the arguments do not fit the model's forward: {first_line(e)}",
        help=f"it is called as forward{signature}",
        status=2,
    )


def _user_span(e: BaseException) -> Span | None:
    """The innermost line of the user's code in the traceback."""
    found: Span | None = None
    trace = e.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        short = package_path(file)
        ours = "/dfc/" in file or "/tests/" in file and "zoo" not in file
        if not short.startswith(("torch/", "functorch/", "<", "dfc/", "importlib")) and not ours:
            found = Span(short, trace.tb_lineno, text=_source_line(file, trace.tb_lineno))
        trace = trace.tb_next
    return found


def _source_line(file: str, line: int) -> str | None:
    import linecache

    return linecache.getline(file, line).rstrip("\n") or None


def _raised_by_user_code(e: Exception) -> bool:
    return not type(e).__module__.startswith("torch")


def _fails_eagerly(request: Request) -> bool:
    """Whether the model itself fails on the example, without any tracing."""
    import copy

    if any(p.is_meta for p in request.model.parameters()):
        return False
    args, kwargs = copy.deepcopy(request.arguments())
    state = {k: v.clone() for k, v in request.model.named_buffers()}
    try:
        with torch.no_grad():
            request.model(*args, **kwargs)
    except Exception:  # any failure of the user's code is the answer
        return True
    finally:
        with torch.no_grad():
            for name, buffer in request.model.named_buffers():
                if name in state and buffer.shape == state[name].shape:
                    buffer.copy_(state[name])
    return False


def _user_error(e: Exception) -> DfcError:
    return DfcError(
        "T003",
        f"the model itself fails on the example: {type(e).__name__}: {first_line(e)}",
        span=_user_span(e),
    )


_CAUSES = (
    (
        r"Eq\(u\d+, 1\)|Could not guard on data-dependent|data-dependent",
        "a decision of the model depends on the data of a tensor",
        "use torch.where or torch.cond instead of `if`, or torch._check to state what holds",
    ),
    (
        r"Unsupported input type|not registered|type <class",
        "an argument or result is of a class that torch does not know",
        "register it by torch.export.register_dataclass or torch.utils._pytree",
    ),
    (
        r"autograd|requires_grad|grad can be implicitly",
        "the model differentiates inside forward",
        "use torch.func.grad, or move the gradient out of the model",
    ),
    (
        r"Constraints violated|specialized|not equal to",
        "the model's own code fixes a size that was declared dynamic",
        "drop the dimension from dynamic_shapes",
    ),
)


def refusal(e: Exception) -> DfcError:
    """torch.export's refusal in the user's words."""
    if isinstance(e, DfcError):
        return e
    text = str(e)
    reason, help = "torch.export refuses the model", None
    for pattern, why, remedy in _CAUSES:
        if re.search(pattern, text):
            reason, help = why, remedy
            break
    user_code = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', text)
    span = _user_span(e)
    for file, line, source in reversed(user_code):
        short = package_path(file)
        if not short.startswith(("torch/", "functorch/", "<")):
            span = Span(short, int(line), text=source)
            break
    return DfcError("T001", f"{reason}: {first_line(e)}", span=span, help=help)


# From torch's program to ours


def _build(request: Request, program: ExportedProgram, used: Request) -> Graph:
    if _needs_functionalizing(program):
        # torch loses the module path of constants made inside modules: offer both names.
        for name, tensor in list(program.constants.items()):
            program.constants.setdefault(name.rpartition(".")[2], tensor)
        with _quiet():
            program = program.run_decompositions({})
    graph = Graph("main")
    names = Names()
    converter = Converter(graph, program.graph_module, names)
    _name_sizes(program, used, names, request.notes)
    arguments = _inputs(program, request, converter)
    converter.convert(list(program.graph.nodes))
    graph.arguments = arguments
    graph.ranges = _ranges(graph, names)
    graph.requires = _guards(program, graph, names)
    for condition in graph.requires[:3]:
        request.notes.append(f"the sizes must satisfy `{condition}`: the model's own code needs it")
    _outputs(program, converter)
    for note in request.notes:
        graph.notes.append(note)
    if request.model.training:
        graph.notes.append("the model is in training mode: call `.eval()` first for inference")
    return graph


def _needs_functionalizing(program: Any) -> bool:
    """Whether some node writes to its argument, or hides that it does."""
    if not isinstance(program, ExportedProgram):
        return False
    modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    for module in modules:
        for node in module.graph.nodes:
            target = node.target
            if isinstance(target, torch._ops.HigherOrderOperator):
                if _needs_retracing(target, node):
                    return True
                continue
            if not isinstance(target, torch._ops.OpOverload):
                if node.op == "call_function" and "functorch" in getattr(target, "__module__", ""):
                    return True
                continue
            if target is torch.ops.aten.detach_.default:
                continue  # nothing is written
            if target._schema.is_mutable or "batch_norm" in target._schema.name:
                return True
            if target._schema.name in ("aten::instance_norm", "aten::lstm", "aten::gru"):
                return True
    return False


def _needs_retracing(operator: Any, node: torch.fx.Node) -> bool:
    """Whether a wrapper changes what is inside it: autocast that is on, or one we do not know."""
    name = operator.name() if callable(getattr(operator, "name", None)) else str(operator)
    if name == "wrap_with_autocast":
        return bool(node.args[2])
    return name not in ("wrap_with_set_grad_enabled", "cond", "while_loop", "scan", "map_impl")


def _name_sizes(
    program: ExportedProgram, request: Request, names: Names, notes: list[str]
) -> None:
    """Give each of torch's symbols the user's name and range, and report what became fixed."""
    for s, bounds in program.range_constraints.items():
        names.ranges[str(s)] = _range(bounds)
    values = _input_values(program)
    by_name: dict[str, Range] = {}
    anonymous: list[tuple[Any, DimWish]] = []
    for x, wishes, value in zip(request.leaves, request.wishes, values, strict=True):
        for dim, wish in wishes.items():
            size = value if dim == -1 else value.shape[dim] if value is not None else None
            label = wish.name or f"dimension {dim}"
            if not isinstance(size, torch.SymInt):
                actual = x if dim == -1 else x.shape[dim]
                notes.append(f"`{label}` is fixed to {actual}: the model's own code bakes it in")
                continue
            expression = size.node.expr
            if expression.is_Integer:
                notes.append(f"`{label}` is fixed to {expression}: the model's own code bakes it in")
                continue
            if not expression.is_Symbol:
                continue
            if expression in names.known:
                continue
            if wish.name is None:
                anonymous.append((expression, wish))
                continue
            if wish.size is not None:
                names.known[expression] = wish.size
                by_name.setdefault(wish.name, (wish.low, wish.high))
                continue
            low, high = names.ranges.get(str(expression), (1, None))
            if low <= 2:
                low = wish.low  # torch says 2 for "not 0 or 1"; size 1 is probed
            if wish.name in by_name:
                a, b = by_name[wish.name]
                low, high = max(low, a), b if high is None else high if b is None else min(high, b)
            if high is not None and (wish.high is None or high < wish.high):
                notes.append(f"`{wish.name}` is at most {high}: the model's own code limits it")
            if low > max(wish.low, 1):
                notes.append(f"`{wish.name}` is at least {low}: the model's own code limits it")
            by_name[wish.name] = (low, high)
            names.add(expression, wish.name)
    for expression, wish in anonymous:
        if expression in names.known:
            continue
        name = names.fresh("s")
        low, high = names.ranges.get(str(expression), (1, None))
        by_name[name] = (wish.low if low <= 2 else low, high)
        names.add(expression, name)
    for value in values:
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt):
                for s in sorted(size.node.expr.free_symbols, key=str):
                    if s not in names.known:
                        name = names.fresh("s")
                        by_name[name] = names.ranges.get(str(s), (0, None))
                        names.add(s, name)
    names.ranges.update(by_name)


def _guards(program: ExportedProgram, graph: Graph, names: Names) -> tuple[Scalar, ...]:
    """What torch assumed of the input sizes beyond their ranges, and would be wrong without."""
    shape_env = next(
        (s.node.shape_env for v in _input_values(program) if isinstance(v, torch.Tensor)
         for s in v.shape if isinstance(s, torch.SymInt)),
        None,
    )  # fmt: skip
    found: dict[Scalar, None] = {}
    for guard in shape_env.guards if shape_env is not None else ():
        for expression in sympy.And.make_args(guard.expr.xreplace(shape_env.replacements)):
            if _says_nothing_new(expression) or _narrows(expression, graph, names):
                continue
            with contextlib.suppress(DfcError):  # an exotic guard is the model's own business
                condition = from_sympy(expression, names.known)
                if isinstance(condition, Expr) and condition.symbols <= set(graph.ranges):
                    found[condition] = None
    return tuple(found)


def _says_nothing_new(guard: sympy.Basic) -> bool:
    """Whether a guard only says "not 0 or 1", which probes settle."""
    if isinstance(guard, sympy.Ne):
        return any(a in (0, 1) for a in guard.args)
    if isinstance(guard, (sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt)):
        return any(a.is_Integer and a <= 2 for a in guard.args)
    return False


def _narrows(guard: sympy.Basic, graph: Graph, names: Names) -> bool:
    """Put a bound on one symbol into its range; whether the guard was one."""
    if not isinstance(guard, (sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt)):
        return False
    a, b = guard.args
    if not (a.is_Symbol and b.is_Integer):
        return False
    known = names.known.get(a)
    name = known.symbol if isinstance(known, Expr) else None
    if name is None or name not in graph.ranges:
        return False
    low, high = graph.ranges[name]
    limit = int(b)
    if isinstance(guard, (sympy.Le, sympy.Lt)):
        limit -= isinstance(guard, sympy.Lt)
        high = limit if high is None else min(high, limit)
    else:
        low = max(low, limit + isinstance(guard, sympy.Gt))
    if (low, high) != graph.ranges[name]:
        graph.notes.append(f"`{name}` is limited to {low}..{high}: the model's own code needs it")
        graph.ranges[name] = (low, high)
    return True


def _range(bounds: Any) -> Range:
    low = int(bounds.lower) if bounds.lower.is_Integer else 0
    high = int(bounds.upper) if bounds.upper.is_Integer and int(bounds.upper) < 2**62 else None
    return max(low, 0), high


def _input_values(program: ExportedProgram) -> list[Any]:
    """The fake value of each user input in order, None for constants."""
    placeholders = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    return [
        None if isinstance(s.arg, ConstantArgument) else placeholders[s.arg.name]
        for s in program.graph_signature.input_specs
        if s.kind == InputKind.USER_INPUT
    ]


def _ranges(graph: Graph, names: Names) -> dict[str, Range]:
    used: dict[str, None] = {}
    for v in graph.inputs:
        if isinstance(v.type, TensorType):
            for size in v.type.shape:
                if isinstance(size, Expr):
                    for name in sorted(size.symbols):
                        used.setdefault(name)
        elif v.type == INT:
            used.setdefault(v.name)
    return {name: names.ranges.get(name, (0, None)) for name in used}


def _inputs(
    program: ExportedProgram, request: Request, converter: Converter
) -> tuple[Argument, ...]:
    """Parameters, then the user's arguments with their structure."""
    graph, names = converter.graph, converter.names
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    owner = _Parameters(program, request.model)
    flat: list[Any] = []
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            flat.append((node, spec))
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            assert spec.target is not None
            converter.env[node] = owner.add(graph, names, node, spec)
        else:
            raise DfcError("T022", f"an input of kind {spec.kind.name} is not supported")
    used: set[str] = set()
    args_spec, kwargs_spec = program.call_spec.in_spec.children()
    signature = list(inspect.signature(request.model.forward).parameters.values())
    labels = _labels(signature, args_spec.num_children)
    pending = iter(flat)
    found: list[Argument] = []

    def argument(label: str, spec: Any, keyword_only: bool) -> None:
        def leaf() -> Const | None:
            node, input_spec = next(pending)
            return _input_leaf(converter, node, input_spec, label, used)

        found.append(Argument(label, tree_of(spec, leaf), keyword_only))

    for label, spec in zip(labels, args_spec.children(), strict=True):
        argument(label, spec, False)
    keyword_only = {p.name for p in signature if p.kind is p.KEYWORD_ONLY}
    for label, spec in zip(kwargs_spec.context or (), kwargs_spec.children(), strict=True):
        out_of_order = len(labels) < len(signature) and label != (
            signature[len(found)].name if len(found) < len(signature) else None
        )
        argument(label, spec, label in keyword_only or out_of_order or _any_keyword(found))
    return tuple(found)


def _any_keyword(found: Sequence[Argument]) -> bool:
    return any(a.keyword_only for a in found)


def _labels(signature: Sequence[inspect.Parameter], count: int) -> list[str]:
    labels: list[str] = []
    for p in signature:
        if p.kind is p.VAR_POSITIONAL:
            labels += [f"{p.name}_{i}" for i in range(count - len(labels))]
        elif p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            labels.append(p.name)
    return labels[:count]


def _input_leaf(
    converter: Converter, node: Any, spec: Any, label: str, used: set[str]
) -> Const | None:
    if isinstance(spec.arg, ConstantArgument):
        converter.env[node] = spec.arg.value
        return constant(spec.arg.value)
    value = node.meta["val"]
    graph, names = converter.graph, converter.names
    if isinstance(value, torch.SymInt):
        known = names.scalar(value)
        name = known.symbol if isinstance(known, Expr) else None
        if name is None or name in used:
            raise DfcError("T022", f"the integer argument `{label}` is tied to another size")
        used.add(name)
        graph.add_input(name, INT)
        converter.env[node] = symbol(name)
        return None
    if not isinstance(value, torch.Tensor):
        converter.env[node] = value
        return constant(value)
    wish = label if label not in graph._names else node.name
    from dfc.ops.symbolic import identifier

    converter.env[node] = graph.add_input(
        graph.fresh_name(identifier(wish)), names.type_of(value)
    )
    return None


class _Parameters:
    """The model's own tensors under their module names, tied ones once."""

    def __init__(self, program: ExportedProgram, model: torch.nn.Module) -> None:
        self.program = program
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.live: dict[str, torch.Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **self.buffers,
        }
        signature = program.graph_signature
        self.mutated = {
            *signature.buffers_to_mutate.values(),
            *getattr(signature, "parameters_to_mutate", {}).values(),
        }
        self.aliases: dict[int, list[str]] = {}
        for name, tensor in self.live.items():
            self.aliases.setdefault(id(tensor), []).append(name)
        self.made: dict[int, Value] = {}

    def add(self, graph: Graph, names: Names, node: Any, spec: Any) -> Value:
        name = str(spec.target)
        tensor = self.live.get(name)
        if tensor is None:
            tensor = self.program.state_dict.get(name)
        if tensor is None:
            tensor = self.program.constants[name]
        known = self.made.get(id(tensor))
        if known is not None:
            return known
        aliases = tuple(n for n in self.aliases.get(id(tensor), ()) if n != name)
        declared = names.type_of(tensor)
        assert isinstance(declared, TensorType)
        kind = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}.get(
            spec.kind, "constant"
        )
        data: ParameterData | None = None
        refuse_leaked(name, tensor)
        if not tensor.is_meta:
            # A buffer that the model writes to would change under us: small, so copied.
            data = TensorData(name, tensor.detach().clone() if name in self.mutated else tensor)
        made = graph.add_parameter(name, declared, kind, data, aliases)
        self.made[id(tensor)] = made
        return made


def _outputs(program: ExportedProgram, converter: Converter) -> None:
    (output,) = [n for n in program.graph.nodes if n.op == "output"]
    results = list(output.args[0])
    by_name = {n.name: n for n in program.graph.nodes}
    values: list[Value] = []
    mutations: list[tuple[Value, Value]] = []
    user: list[tuple[Any, Any]] = []
    for spec, x in zip(program.graph_signature.output_specs, results, strict=True):
        if spec.kind == OutputKind.USER_OUTPUT:
            user.append((spec, x))
        elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            target = _parameter(converter, str(spec.target))
            mutations.append((target, _value(converter, x)))
        elif spec.kind == OutputKind.USER_INPUT_MUTATION:
            mutations.append((converter.env[by_name[spec.target]], _value(converter, x)))
        else:
            raise DfcError("T022", f"an output of kind {spec.kind.name} is not supported")
    pending = iter(user)

    def leaf() -> Const | None:
        spec, x = next(pending)
        found = converter.scalar_or_none(x)
        if found is NotImplemented:
            values.append(_value(converter, x))
            return None
        if isinstance(found, Expr) and not found.symbols <= set(converter.graph.ranges):
            values.append(converter.scalar_value(found))
            return None
        return constant(spec.arg.value if isinstance(spec.arg, ConstantArgument) else found)

    tree = tree_of(program.call_spec.out_spec, leaf)
    mutations = [(t, v) for t, v in mutations if t is not v]
    converter.graph.set_outputs(values, tree, mutations)
    assert leaf_count(tree) == len(values)


def _value(converter: Converter, x: Any) -> Value:
    found = converter.single(x)
    assert found is not None
    return found


def _parameter(converter: Converter, name: str) -> Value:
    for p in converter.graph.parameters.values():
        if p.name == name or name in p.aliases:
            return p
    raise DfcError("T022", f"the buffer `{name}` is written to but never read")


__all__ = ["Leaf", "Tree", "solve", "trace"]
