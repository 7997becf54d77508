"""torch's exported program as a graph: sizes named, arguments structured, outputs bound."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from dfc.capture.attempts import quiet
from dfc.capture.batch_norm_sizes import need_several_values
from dfc.capture.call_structure import constant, tree_of
from dfc.capture.convert import Converter, Names, reads_tensor, refuse_leaked
from dfc.capture.no_gradients import keep_out_gradients
from dfc.capture.wishes import DimWish, Request
from dfc.errors import DfcError
from dfc.ir.caches import forgetful_note, hollow_caches
from dfc.ir.expr import Expr, Scalar, symbol
from dfc.ir.graph import Argument, Graph, ParameterData, Range, Value
from dfc.ir.tree import Const, leaf_count
from dfc.ir.types import INT, TensorType
from dfc.ir.weights import TensorData
from dfc.ops.symbolic import from_sympy, identifier


def build_graph(request: Request, program: ExportedProgram, used: Request) -> Graph:
    if _needs_functionalizing(program):
        # torch loses the module path of constants made inside modules: offer both names.
        for name, tensor in list(program.constants.items()):
            program.constants.setdefault(name.rpartition(".")[2], tensor)
        keep_out_gradients(program.graph_module)
        with quiet(), hollow_caches():
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
    need_several_values(graph)
    for condition in graph.requires[:3]:
        request.notes.append(f"the sizes must satisfy `{condition}`: the model's own code needs it")
    _outputs(program, converter)
    for note in [*dict.fromkeys(request.notes), *forgetful_note(graph.output_tree)]:
        graph.notes.append(note)
    if _dropped_checks(program):
        graph.notes.append("the model checks a value that it reads from a tensor: torch.export "
                           "dropped the check, so that nothing tells when it fails")  # fmt: skip
    if request.model.training:
        graph.notes.append("the model is in training mode: call `.eval()` first for inference")
    return graph


def _dropped_checks(program: Any) -> bool:
    """Whether torch knows more numbers from `torch._check` than the program still reads."""
    ranges = program.range_constraints.items()
    known = sum(str(s).startswith(("u", "zuf")) and r.lower == r.upper for s, r in ranges)
    nodes = program.graph.nodes
    read = sum(reads_tensor(n) and not n.meta.get("unbacked_bindings") for n in nodes)
    return bool(known > read)


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


def _name_sizes(program: ExportedProgram, request: Request, names: Names, notes: list[str]) -> None:
    """Give each of torch's symbols the user's name and range, and report what became fixed."""
    for s, bounds in program.range_constraints.items():
        low, high = _range(bounds)
        unbounded = str(s).startswith(("u", "zuf")) and not bounds.lower.is_Integer
        names.ranges[str(s)] = (-(2**63) if unbounded else low, high)
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
                notes.append(
                    f"`{label}` is fixed to {expression}: the model's own code bakes it in"
                )
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
    tensors = [v for v in _input_values(program) if isinstance(v, torch.Tensor)]
    sizes: list[Any] = [s for v in tensors for s in v.shape if isinstance(s, torch.SymInt)]
    if not sizes:
        return ()
    shape_env = sizes[0].node.shape_env
    found: dict[Scalar, None] = {}
    for guard in shape_env.guards:
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
            converter.env[node] = owner.add(graph, names, spec)
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
    converter.env[node] = graph.add_input(graph.fresh_name(identifier(wish)), names.type_of(value))
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

    def add(self, graph: Graph, names: Names, spec: Any) -> Value:
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
        fixed = declared.dtype.has_derivative and not tensor.requires_grad
        own = "frozen" if fixed else "parameter"
        kind = {InputKind.PARAMETER: own, InputKind.BUFFER: "buffer"}.get(spec.kind, "constant")
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
