"""Flat inputs of a graph: read from files, drawn at random, or the example that a package keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError, did_you_mean

if TYPE_CHECKING:
    import torch

    from dfc.ir.graph import Graph


def input_names(graph: Graph) -> list[str]:
    """What files call each flat input: `ids`, or `past.0.key` inside a structure."""
    from dfc.ir import tree

    return [name for a in graph.arguments for name in tree.paths(a.tree, a.name)]


def output_names(graph: Graph) -> list[str]:
    """The same for each output: `logits`, `output.0`, or `output` when there is but one."""
    from dfc.ir import tree

    prefix = "output" if isinstance(graph.output_tree, tree.Seq) else ""
    return [name or "output" for name in tree.paths(graph.output_tree, prefix)]


def choose_inputs(
    graph: Graph,
    files: Sequence[str] | None,
    sizes: str | None,
    random: bool,
    seed: int,
    example: Sequence[Any] | None,
) -> tuple[list[Any], str]:
    """The inputs that the command line asks for, checked, and where they come from.

    Raises:  DfcError Q006, D053..D055 and K013..K016, all of status 2.
    """
    from dfc.calling import check_inputs

    if files and (random or sizes is not None):
        option = "--random" if random else "--size"
        help = f"leave out {option}, or `{files[0]}`"
        raise DfcError("Q006", f"{option} draws inputs, and `{files[0]}` holds some", help=help)
    if files:
        leaves, origin = read_inputs(graph, files), ", ".join(files)
    elif random or sizes is not None:
        bindings = parse_sizes(graph, sizes or "")
        leaves, origin = random_inputs(graph, bindings, seed, example), f"random, seed {seed}"
    elif example is not None:
        leaves, origin = list(example), "the example it was compiled with"
    else:
        raise DfcError(
            "D054",
            f"there are no inputs, and the package holds no example: it takes {_all(graph)}",
            help="name a .npz or .safetensors file, or draw them with --random",
        )
    return check_inputs(graph, leaves, input_names(graph)), origin


def on_device(leaves: Sequence[Any], device: str) -> list[Any]:
    """Tensors where the engine wants them."""
    import torch

    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in leaves]


# Files


def read_inputs(graph: Graph, files: Sequence[str]) -> list[Any]:
    """The inputs by name from `.npz` and `.safetensors` files, in order from `.npy` files.

    Raises:  DfcError D053 for a file that cannot be read, D054 for names that do not fit.
    """
    names = input_names(graph)
    given: dict[str, Any] = {}
    position = 0
    for file in files:
        for name, value in _read(Path(file)).items():
            if name is None or (name not in names and name == f"arr_{position}"):
                if position >= len(names):
                    raise DfcError(
                        "D054", f"`{file}` is one input too many: it takes {_all(graph)}"
                    )
                name, position = names[position], position + 1
            if name in given:
                raise DfcError("D054", f"the input `{name}` is given twice, again in `{file}`")
            given[name] = value
    unknown = [n for n in given if n not in names]
    if unknown:
        raise DfcError(
            "D054",
            f"there is no input `{unknown[0]}`: it takes {_all(graph)}",
            help=did_you_mean(unknown[0], names),
        )
    missing = [n for n in names if n not in given]
    if missing:
        raise DfcError(
            "D054",
            f"the input `{missing[0]}` is missing: it takes {_all(graph)}",
            help="`--random` draws all of them",
        )
    return [_leaf(v.type, given[n]) for v, n in zip(graph.inputs, names, strict=True)]


def _all(graph: Graph) -> str:
    shown = [f"{n}: {v.type}" for n, v in zip(input_names(graph), graph.inputs, strict=True)]
    return ", ".join(shown) or "none"


def _leaf(type: Any, value: torch.Tensor) -> Any:
    """A tensor; a Python number where the graph takes one."""
    from dfc.ir.types import ScalarType

    return value.item() if isinstance(type, ScalarType) and value.numel() == 1 else value


def _read(path: Path) -> dict[str | None, torch.Tensor]:
    """The tensors of a file by name; None for a file that holds one without a name."""
    if path.suffix not in (".npy", ".npz", ".safetensors"):
        raise DfcError("D053", f"`{path}` is no .npz, .npy or .safetensors file")
    if not path.is_file():
        what = f"`{path}` is no regular file" if path.exists() else f"there is no `{path}`"
        raise DfcError("D053", what)
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_numpy(path)
    except OSError as e:
        raise DfcError("D053", f"cannot read `{path}`: {e}") from e
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DfcError("D053", f"`{path}` is not a {path.suffix} file: {reason}") from e


def _read_safetensors(path: Path) -> dict[str | None, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: x for name, x in load_file(path).items()}


def _read_numpy(path: Path) -> dict[str | None, torch.Tensor]:
    import numpy as np
    import torch

    with path.open("rb") as file:  # what is neither NumPy calls a pickle that may be trusted
        if not file.read(8).startswith(b"PK" if path.suffix == ".npz" else b"\x93NUMPY"):
            raise ValueError("it is empty" if not file.tell() else "it does not begin as one")
    found: dict[str | None, torch.Tensor] = {}
    loaded = np.load(path, allow_pickle=False)
    named = {None: loaded} if path.suffix == ".npy" else {n: loaded[n] for n in loaded.files}
    for name, array in named.items():
        found[name] = torch.from_numpy(np.array(array, order="C"))
    return found


# Random


def parse_sizes(graph: Graph, text: str) -> dict[str, int]:
    """`B=4,S=16` as numbers.

    Raises:  DfcError D055.
    """
    known = sorted(graph.ranges)
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, equals, number = (p.strip() for p in part.partition("="))
        if not equals or not number.isdecimal():
            raise DfcError("D055", f"`{part}` is no size", help="write NAME=NUMBER, as in B=4,S=16")
        if name not in known:
            have = f"it has {', '.join(known)}" if known else "all its sizes are fixed"
            raise DfcError(
                "D055",
                f"there is no dynamic dimension `{name}`: {have}",
                help=did_you_mean(name, known),
            )
        if name in found:
            raise DfcError("D055", f"`{name}` is given twice: {found[name]} and {number}")
        low, high = graph.ranges[name]
        if int(number) < low or (high is not None and int(number) > high):
            shown = f"{low}..{high}" if high is not None else f"at least {low}"
            raise DfcError("D055", f"`{name}` is {number}, outside its range {shown}")
        found[name] = int(number)
    return found


def random_inputs(
    graph: Graph, sizes: Mapping[str, int], seed: int, example: Sequence[Any] | None
) -> list[Any]:
    """Inputs of the declared types: floats from a normal distribution, integers from the
    example's range (0 and 1 without one), booleans evenly."""
    import torch

    from dfc.ir.expr import Expr, evaluate
    from dfc.ir.interpret import bind_inputs
    from dfc.ir.types import TensorType

    usual = bind_inputs(graph, example) if example is not None else {}
    bindings: dict[str, Any] = {}
    for name, (low, high) in graph.ranges.items():
        plain = min(max(low, 2), high if high is not None else max(low, 2))
        bindings[name] = sizes.get(name, usual.get(name, plain))
    generator = torch.Generator().manual_seed(seed)
    found: list[Any] = []
    for i, v in enumerate(graph.inputs):
        like = example[i] if example is not None else None
        if not isinstance(v.type, TensorType):
            found.append(bindings.get(v.name, like if like is not None else 1))
            continue
        shape = [evaluate(s, bindings) for s in v.type.shape]
        if unknown := [s for s in shape if isinstance(s, Expr)]:
            raise DfcError("D055", f"the size {unknown[0]} of `{v.name}` follows from no dimension")
        sizes_ = [int(s) for s in shape if not isinstance(s, Expr)]
        try:
            found.append(_draw(sizes_, v.type.dtype.to_torch(), like, generator))
        except (RuntimeError, TypeError, MemoryError) as e:  # no such memory; more than 64 bits
            shown = " x ".join(map(str, sizes_))
            raise DfcError(
                "D055", f"`{v.name}` of {shown} elements cannot be drawn: is there the memory?"
            ) from e
    return found


def _draw(shape: list[int], dtype: torch.dtype, like: Any, generator: torch.Generator) -> Any:
    import torch

    if dtype.is_complex:
        return torch.complex(*torch.randn([2, *shape], generator=generator).unbind(0)).to(dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    low, high = 0, 1
    if isinstance(like, torch.Tensor) and like.numel():
        low, high = int(like.min()), int(like.max())
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
