"""The values that a rule is tried on: random ones, and all that number types have in store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dfc.ir.expr import evaluate
from dfc.ir.types import TensorType
from dfc.rewrite.prove_sample import Case, Spec

Make = Callable[[torch.dtype, Sequence[int], torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """A way to fill a tensor. `finite`: no infinity and no NaN. `words` say it of a name."""

    words: str
    make: Make
    finite: bool = True


@dataclass(frozen=True)
class Plan:
    """One set of inputs: a kind for each name, and how the tensors lie in memory."""

    label: str
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    other: Kind | None = None  # of the names that `kinds` does not have
    layout: str = ""  # "transposed", "strided" or "expanded"
    seed: int = 0

    def kind(self, name: str) -> Kind:
        return self.kinds.get(name) or self.other or NORMAL

    @property
    def finite(self) -> bool:
        kinds = [*self.kinds.values(), *((self.other,) if self.other else ())]
        return all(k.finite for k in kinds)


def _normal(dtype: torch.dtype, shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(tuple(shape), generator=g) < 0.5
    if dtype.is_complex:
        parts = torch.randn((*shape, 2), generator=g, dtype=torch.float64)
        return torch.view_as_complex(parts).to(dtype)
    if not dtype.is_floating_point:
        low = 0 if dtype in _UNSIGNED else -5
        return torch.randint(low, 6, tuple(shape), generator=g).to(dtype)
    return torch.randn(tuple(shape), generator=g, dtype=torch.float64).to(dtype)


def _wide(dtype: torch.dtype, shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
    """Many magnitudes at once: the small beside the large is what rounding loses."""
    if not dtype.is_floating_point:
        return _extreme(dtype, shape, g)
    sign = torch.randint(0, 2, tuple(shape), generator=g) * 2 - 1
    power = torch.rand(tuple(shape), generator=g, dtype=torch.float64) * 8 - 4
    return (sign * 10**power).to(dtype)


def _near_zero(dtype: torch.dtype, shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
    """All elements small, as beside an `eps` that they are usually much larger than."""
    x = _normal(dtype, shape, g)
    return x * 1e-3 if dtype.is_floating_point else x


def _small(dtype: torch.dtype, shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
    """Whole and half numbers, many of them equal: ties in rounding and in comparing."""
    if dtype == torch.bool:
        return _normal(dtype, shape, g)
    low = 0 if dtype in _UNSIGNED else -4
    whole = torch.randint(low, 5, tuple(shape), generator=g)
    return (whole * 0.5).to(dtype) if dtype.is_floating_point else whole.to(dtype)


def _indices(dtype: torch.dtype, shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
    """What may be an index into anything with two elements."""
    return torch.randint(0, 2, tuple(shape), generator=g).to(dtype)


def _extreme(dtype: torch.dtype, shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
    """The largest and smallest numbers of the type, of either sign."""
    if dtype == torch.bool:
        return torch.ones(tuple(shape), dtype=dtype)
    if dtype.is_floating_point:
        info = _limits(dtype)
        some = [info.max, info.min, info.tiny, -info.tiny, 1.0, -1.0]
        table = torch.tensor(some, dtype=torch.float64).to(dtype)
    elif dtype.is_complex:
        return _normal(dtype, shape, g) * 1e30
    else:
        limits = torch.iinfo(dtype)
        table = torch.tensor([limits.max, limits.min, 1, 0], dtype=torch.int64).to(dtype)
    return table[torch.randint(len(table), tuple(shape), generator=g)]


def _limits(dtype: torch.dtype) -> torch.finfo:
    """The limits of a type; for f64 those of f32, since there is no wider type to be the witness
    of what overflows on the way."""
    return torch.finfo(torch.float32 if dtype == torch.float64 else dtype)


def _filled(value: float) -> Make:
    def make(dtype: torch.dtype, shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
        return torch.full(tuple(shape), value, dtype=torch.float64).to(dtype)

    return make


def _largest(sign: int) -> Make:
    def make(dtype: torch.dtype, shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
        if not dtype.is_floating_point:
            return _extreme(dtype, shape, g)
        return torch.full(tuple(shape), sign * _limits(dtype).max, dtype=dtype)

    return make


def _denormal(dtype: torch.dtype, shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
    if not dtype.is_floating_point:
        return _small(dtype, shape, g)
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    count = torch.randint(-9, 10, tuple(shape), generator=g, dtype=torch.int64)
    return (count.double() * step).to(dtype)


def _sprinkled(*values: float) -> Make:
    """Random numbers with some of these among them."""

    def make(dtype: torch.dtype, shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
        x = _normal(dtype, shape, g)
        if not dtype.is_floating_point:
            return x
        table = torch.tensor(values, dtype=torch.float64).to(dtype)
        drawn = table[torch.randint(len(values), tuple(shape), generator=g)]
        where = torch.rand(tuple(shape), generator=g) < 0.2
        flat = where.view(-1)
        if flat.numel():
            flat[int(torch.randint(flat.numel(), (1,), generator=g))] = True
        return torch.where(where, drawn, x)

    return make


_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_INF, _NAN = float("inf"), float("nan")
NORMAL = Kind("random", _normal)
_EVERYWHERE = (
    Kind("0 everywhere", _filled(0.0)),
    Kind("-0 everywhere", _filled(-0.0)),
    Kind("1 everywhere", _filled(1.0)),
    Kind("-1 everywhere", _filled(-1.0)),
    Kind("numbers of many magnitudes", _wide),
    Kind("halves and whole numbers", _small),
    Kind("numbers near 0.001", _near_zero),
    Kind("denormal numbers", _denormal),
    Kind("the largest and smallest finite numbers", _extreme),
    Kind("inf, -inf and NaN among random numbers", _sprinkled(_INF, -_INF, _NAN), finite=False),
)
_ALONE = (
    Kind("0 everywhere", _filled(0.0)),
    Kind("-0 everywhere", _filled(-0.0)),
    Kind("inf everywhere", _filled(_INF), finite=False),
    Kind("-inf everywhere", _filled(-_INF), finite=False),
    Kind("NaN everywhere", _filled(_NAN), finite=False),
    Kind("the largest number everywhere", _largest(1)),
    Kind("the most negative number everywhere", _largest(-1)),
    Kind("inf here and there", _sprinkled(_INF), finite=False),
    Kind("NaN here and there", _sprinkled(_NAN), finite=False),
    Kind("denormal numbers", _denormal),
    Kind("numbers of many magnitudes", _wide),
)
_WHOLE = (
    Kind("0 everywhere", _filled(0.0)),
    Kind("1 everywhere", _filled(1.0)),
    Kind("small numbers", _small),
    Kind("indices", _indices),
    Kind("the largest and smallest numbers", _extreme),
)
_LAYOUTS = ("transposed", "strided", "expanded")


THOROUGH, BRIEF, QUICK = "thorough", "brief", "quick"


def plans(names: Mapping[str, TensorType], care: str = THOROUGH) -> Iterator[Plan]:
    """The sets of inputs, the plain ones first: some forty, half a dozen or two."""
    yield Plan("random inputs", seed=1)
    floats = [n for n, t in names.items() if t.dtype.is_float]
    everywhere = _EVERYWHERE if floats else _WHOLE
    if care == QUICK:
        yield Plan(f"every input = {everywhere[-1].words}", other=everywhere[-1], seed=2)
        return
    if care == BRIEF:
        for kind in dict.fromkeys((everywhere[0], everywhere[4], *everywhere[-2:])):
            yield Plan(f"every input = {kind.words}", other=kind, seed=2)
        yield Plan("random inputs, transposed in memory", layout="transposed", seed=3)
        return
    for seed in (4, 5):
        yield Plan("random inputs", seed=seed)
    for layout in _LAYOUTS:
        yield Plan(f"random inputs, {layout} in memory", layout=layout, seed=6)
    for kind in everywhere:
        yield Plan(f"every input = {kind.words}", other=kind, seed=7)
    for name, type_ in names.items():
        for kind in _ALONE if type_.dtype.is_float else _WHOLE:
            yield Plan(f"{name} = {kind.words}", {name: kind}, seed=8)


def tensor(
    name: str, type_: TensorType, shape: Sequence[int], plan: Plan, salt: int = 0
) -> torch.Tensor:
    """The values of one input under a plan; the same for the same arguments."""
    generator = torch.Generator().manual_seed(plan.seed * 1000 + salt)
    x = plan.kind(name).make(type_.dtype.to_torch(), shape, generator)
    return laid_out(x, plan.layout)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (for "expanded": some of them, repeated) with other strides."""
    if not layout or not x.numel() or not x.dim():
        return x
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), dtype=x.dtype)
    view = wide[..., 1::2]
    view.copy_(x)
    return view


def constants(
    case: Case, plan: Plan, sizes: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """The numbers of the constants, those of a tail by name and number."""
    found: dict[str, torch.Tensor] = {}
    for i, (name, g) in enumerate(case.items()):
        if not isinstance(g, Spec) or not g.constant:
            continue
        shape = [int(evaluate(d, sizes or {})) for d in g.type.shape]  # type: ignore[arg-type]
        found[name] = tensor(name, g.type, shape, plan, i)
        for k in range(8):
            found[f"{name}_{k}"] = tensor(name, g.type, shape, plan, 100 * i + k + 10)
    return found
