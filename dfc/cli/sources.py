"""MODEL on the command line: a factory, a `.pt2`, graph text or a package."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError, did_you_mean
from dfc.origin import failure_of

if TYPE_CHECKING:
    from dfc.ir.graph import Graph
    from dfc.lang.source import Source as LangSource

_FORMS = "write FILE.py:FUNCTION, package.module:FUNCTION, a .pt2, a .dfc or a package folder"
_RETURNS = "return (module, args), (module, args, kwargs) or (module, args, kwargs, dynamic_shapes)"


@dataclass
class Source:
    """What was named, ready for `dfc.trace` and `dfc.compile`."""

    label: str
    kind: str  # "factory", "pt2", "graph" or "package"
    model: Any  # a module, or a Graph
    args: Sequence[Any] | None = None
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None

    def graph(self) -> Graph:
        """The graph as it is before any pass."""
        import dfc
        from dfc.ir.graph import Graph

        if isinstance(self.model, Graph):
            return self.model
        return dfc.trace(self.model, tuple(self.args or ()), self.kwargs, self.dynamic_shapes)

    def sizes(self, graph: Graph) -> dict[str, int]:
        """Those of the example, as far as there is one."""
        from dfc.calling import sizes_of_call

        if self.args is None or self.kind == "graph":
            return {}
        return sizes_of_call(graph, tuple(self.args), dict(self.kwargs or {}))


def is_package(text: str) -> bool:
    """A folder is a package, or pretends to be one."""
    return bool(text) and Path(text).is_dir()


def open_source(text: str, weights: str | None = None) -> Source:
    """Find and load what MODEL names; `weights` is a safetensors file for graph text.

    Raises:  DfcError D050..D052 for what is not there or not right, K040 (status 8) when the
             user's code raises, D020.. for a package; D041, D042, D044 for weights.
    """
    path = Path(text)
    if not text:
        raise DfcError("D050", "MODEL is empty", help=_FORMS)
    if path.is_dir():
        return _package(path)
    if path.suffix == ".dfc":
        graph = read_graph(path, weights)
        args, kwargs = _drawn(graph) if weights is not None else (None, None)
        return Source(path.stem, "graph", graph, args, kwargs)
    if path.suffix == ".pt2":
        return _exported(path)
    if path.is_file() and path.suffix == ".py":
        raise DfcError("D050", f"`{text}` needs a function", help=_candidates(path))
    place, colon, function = text.rpartition(":")
    if not colon or not function.isidentifier():
        if path.suffix == ".onnx" and path.is_file():
            help = "ONNX Runtime runs it; dfc compiles the PyTorch model that it was made from"
            raise DfcError("D050", f"dfc writes ONNX and does not read it: `{text}`", help=help)
        if path.exists():
            raise DfcError("D050", f"dfc cannot read `{text}`", help=_FORMS)
        raise DfcError("D050", f"there is no `{text}`", help=_near(path) or _FORMS)
    return _factory(place, function)


def _drawn(graph: Graph) -> tuple[list[Any], dict[str, Any]]:
    """Arguments at random, for a graph that has numbers and no example to be proved on."""
    from dfc.cli.inputs import random_inputs
    from dfc.ir import tree

    leaves = iter(random_inputs(graph, {}, 0, None))
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for a in graph.arguments:
        value = tree.build(a.tree, leaves, {})
        if a.keyword_only:
            kwargs[a.name] = value
        else:
            args.append(value)
    graph.notes.append(
        "graph text has no example: it was proved and measured on inputs drawn for it"
    )
    return args, kwargs


def read_graph(path: Path, weights: str | None = None) -> Graph:
    """Graph text as a valid graph, with the numbers of a safetensors file or without any.

    Raises:  DfcError P and V families, of status 2; D050 when the file cannot be read; D041 and
             D044 for weights that are not there, D042 for others than the text's digests name.
    """
    import dfc
    import dfc.ops  # the verifier looks ops up
    from dfc.ir.verify import verify

    graph = dfc.parse(read_text(path), str(path))
    try:
        verify(graph)
    except DfcError as e:
        raise DfcError.of(e.diagnostics, status=2) from e
    digests = {p: p.data.sha256() for p in graph.parameters.values() if p.data is not None}
    for p in graph.parameters.values():
        p.data = None  # text names digests; the numbers are not here
    if weights is not None:
        from dfc.package import attach_weights

        attach_weights(graph, Path(weights))
        for p, digest in digests.items():
            if p.data is not None and p.data.sha256() != digest:
                message = f"{weights}: the numbers of !{p.name} are not those that {path} names"
                help = "take the file that belongs to it, or the digest out of the text"
                raise DfcError("D042", message, help=help)
    return graph


def read_text(path: Path) -> str:
    """A text file.

    Raises:  DfcError D050.
    """
    try:
        return read_data(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise DfcError("D050", f"`{path}` is not UTF-8 text: byte {e.start} is wrong") from None


def read_data(path: Path) -> bytes:
    """The bytes of a file, of no more than graph text may have.

    Raises:  DfcError D050, P007.
    """
    from dfc.lang.graph_parser import MAX_BYTES

    try:
        if path.exists() and not path.is_file():
            raise DfcError("D050", f"`{path}` is no regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise DfcError("D050", f"there is no `{path}`", help=_near(path)) from None
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise DfcError("D050", f"cannot read `{path}`: {why.lower()}") from None
    if len(data) > MAX_BYTES:
        raise DfcError("P007", f"`{path}` has more than {MAX_BYTES} bytes")
    return data


def read_source(name: str) -> LangSource:
    """Text of the language by file name, or what stands on stdin for `-`.

    Raises:  DfcError D050, P007, P009.
    """
    from dfc.lang.graph_parser import MAX_BYTES
    from dfc.lang.source import Source as Text

    if name != "-":
        return Text.of_bytes(read_data(Path(name)), name)
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DfcError("P007", f"stdin has more than {MAX_BYTES} bytes")
    return Text.of_bytes(data, "<stdin>")


def _near(path: Path) -> str | None:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder `{folder}`"
    names = sorted(p.name for p in folder.iterdir() if p.name != path.name)
    return did_you_mean(path.name, [n for n in names if _alike(path, Path(n))])


def _alike(wanted: Path, other: Path) -> bool:
    """A suffix that two names share makes them no more alike."""
    return wanted.suffix != other.suffix or bool(did_you_mean(wanted.stem, [other.stem]))


# Packages and exported programs


def _package(path: Path) -> Source:
    from dfc.package import read_package

    package = read_package(path)
    if not package.probes:
        return Source(path.stem, "package", package.graph)
    args, kwargs = call_of(package.graph, package.probes[0].inputs)
    return Source(path.stem, "package", package.graph, args, kwargs)


def call_of(graph: Graph, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call from the graph's flat inputs."""
    from dfc.ir import tree
    from dfc.ir.interpret import bind_inputs

    rest = iter(leaves)
    bindings = bind_inputs(graph, leaves)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for a in graph.arguments:
        value = tree.build(a.tree, rest, bindings)
        if a.keyword_only:
            kwargs[a.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _exported(path: Path) -> Source:
    import torch

    if not path.is_file():
        raise DfcError("D050", f"there is no `{path}`", help=_near(path))
    if not zipfile.is_zipfile(path):
        raise DfcError("D050", f"`{path}` is no exported program: it is no zip archive")
    try:
        program = torch.export.load(path)
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DfcError("D050", f"`{path}` is no exported program: {reason}") from e
    args, kwargs = program.example_inputs or ((), {})
    return Source(
        path.stem, "pt2", program.module(), args, kwargs, _shapes_of(program, args, kwargs)
    )


def _shapes_of(program: Any, args: Any, kwargs: Any) -> Any:
    """The dynamic dimensions of an exported program, by flat input."""
    import torch
    import torch.utils._pytree as pytree

    dims: dict[str, Any] = {}

    def dim(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return None
        bounds = program.range_constraints.get(size.node.expr)
        if bounds is None:
            return torch.export.Dim.AUTO
        name = str(size.node.expr)
        high = int(bounds.upper) if str(bounds.upper).isdigit() else None
        low = max(int(bounds.lower), 1)
        return dims.setdefault(name, torch.export.Dim(name, min=low, max=high))

    wanted = set(program.graph_signature.user_inputs)
    shapes: list[Any] = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in wanted:
            value = node.meta.get("val")
            found = (
                {i: d for i, s in enumerate(value.shape) if (d := dim(s)) is not None}
                if isinstance(value, torch.Tensor)
                else {}
            )
            shapes.append(found or None)
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if len(leaves) != len(shapes) or not dims:
        return None
    given_args, given_kwargs = pytree.tree_unflatten(shapes, spec)
    return given_kwargs if not given_args else given_args if not given_kwargs else None


# Factories


def _factory(place: str, function: str) -> Source:
    module, own = load_module(place)
    label = f"{place}:{function}"
    make = getattr(module, function, None)
    if make is None:
        raise no_function(module, place, function)
    if not callable(make):
        raise DfcError("D051", f"`{label}` is a {type(make).__name__}, not a function")
    if isinstance(make, type):
        raise DfcError(
            "D051", f"`{label}` is a class", help=f"write a function around it: {_RETURNS}"
        )
    try:
        made = make()
    except (Exception, SystemExit) as e:
        raise failure_of(e, f"`{label}`", own) from e
    return _checked(function, label, made)


def no_function(module: Any, place: str, name: str) -> DfcError:
    """The error of a function that a module does not have, with those that it has."""
    known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    own = [n for n in known if getattr(vars(module)[n], "__module__", "") == module.__name__]
    own = [n for n in own if not isinstance(vars(module)[n], type)]
    has = ", ".join(f"`{n}`" for n in own[:6]) + (" and others" if len(own) > 6 else "")
    help = did_you_mean(name, known) or (f"it has {has}" if own else None)
    return DfcError("D051", f"`{place}` has no function `{name}`", help=help)


def load_module(place: str) -> tuple[Any, str]:
    """A module by file or by name, and its file."""
    path = Path(place)
    if path.suffix == ".py" or path.is_file():
        if not path.is_file():
            raise DfcError("D050", f"there is no `{place}`", help=_near(path))
        return load_file(path.absolute()), str(path.absolute())
    if not place:
        raise DfcError("D050", "no file or module stands before the colon", help=_FORMS)
    if not all(part.isidentifier() for part in place.split(".")):
        raise DfcError("D050", f"there is no `{place}`", help=_near(path) or _FORMS)
    if "" not in sys.path and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as e:
        if e.name and (place == e.name or place.startswith(e.name + ".")):
            raise DfcError(
                "D050", f"there is no module `{place}`", help="run dfc where it can be imported"
            ) from None
        raise failure_of(e, f"`{place}`", "") from e
    except (Exception, SystemExit) as e:
        raise failure_of(e, f"`{place}`", "") from e
    return module, str(module.__file__ or "")


_files: dict[Path, Any] = {}  # by `--use` and as MODEL, a file is one module


def load_file(path: Path) -> Any:
    """Import a file as `python file.py` would: what stands beside it can be imported."""
    if path in _files:
        return _files[path]
    name = path.stem if path.stem.isidentifier() else "model"
    if name in sys.modules:
        name = f"_dfc_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except DfcError:
        raise  # a pass or an op in it is defined wrongly: it says where
    except (Exception, SystemExit) as e:
        raise failure_of(e, f"`{path.name}`", str(path)) from e
    _files[path] = module
    return module


def _candidates(path: Path) -> str:
    """The functions of a file that take no arguments, without running it."""
    try:
        body = ast.parse(read_text(path)).body
    except SyntaxError:
        return _FORMS
    names = [
        n.name
        for n in body
        if isinstance(n, ast.FunctionDef) and len(n.args.args) == len(n.args.defaults)
    ]
    shown = " or ".join(f"`{path}:{n}`" for n in names[:3])
    return f"write {shown}" if names else _FORMS


def _checked(name: str, label: str, made: Any) -> Source:
    import torch

    def wrong(what: str) -> DfcError:
        return DfcError("D052", f"`{label}` returned {what}", help=_RETURNS)

    if not isinstance(made, (tuple, list)):
        raise wrong(f"a {type(made).__name__}, not a tuple")
    if not 2 <= len(made) <= 4:
        raise wrong(f"a tuple of {len(made)}")
    module, args, kwargs, shapes = (*made, None, None)[:4]
    if not isinstance(module, torch.nn.Module) and (
        isinstance(module, type) or not callable(module)
    ):
        raise wrong(f"a {type(module).__name__} where the module should be")
    if not isinstance(args, (tuple, list)):
        raise wrong(f"a {type(args).__name__} where the tuple of arguments should be")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise wrong(f"a {type(kwargs).__name__} where the dict of keyword arguments should be")
    return Source(name, "factory", module, tuple(args), kwargs, shapes)
