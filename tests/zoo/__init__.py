"""The zoo: small models with fixed random weights that a front end for PyTorch must survive.

A case is a builder and the reason why it is here. To add one, write a function in the module of
its family and decorate it; the tests that walk `cases()` find it there.

Importing this package and listing its cases imports neither torch nor transformers: family
modules import them inside their builders.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import Dim
    from torch.nn import Module

Call = tuple[tuple[Any, ...], dict[str, Any]]

_FAMILIES = (
    "arithmetic",
    "attention",
    "awkward",
    "calling",
    "cnn",
    "control_flow",
    "data_dependent",
    "huggingface_audio",
    "huggingface_moe",
    "huggingface_recent",
    "huggingface_seq2seq",
    "huggingface_ssm",
    "huggingface_text",
    "huggingface_vision",
    "mutation",
    "numerics",
    "recurrent",
)
_registry: dict[str, Case] = {}


@dataclass(frozen=True)
class Built:
    """A model with everything `torch.export.export` asks for, and further calls to check it with.

    Calls:    `calls` are (args, kwargs) with other values than the example's, and with other
              sizes where `dynamic_shapes` says so, batch 1 among them.
    Why:      some models write into their buffers or into their inputs. Whoever runs a model
              twice copies the tensors first, or builds the case anew: that is deterministic.
    """

    model: Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    calls: tuple[Call, ...]

    @classmethod
    def of(
        cls,
        model: Module,
        make: Callable[..., tuple[Any, ...] | dict[str, Any]],
        *sizes: tuple[Any, ...],
        dynamic_shapes: Any = None,
    ) -> Built:
        """Call `make` with each of `sizes` for inputs, a tuple of args or a dict of kwargs.

        The first is the example, the others are the calls.
        """
        (args, kwargs), *calls = [_call(make(*size)) for size in sizes]
        return cls(model, args, kwargs, dynamic_shapes, tuple(calls))


def _call(inputs: tuple[Any, ...] | dict[str, Any]) -> Call:
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


@dataclass(frozen=True)
class Case:
    """A named model of the zoo; `build` gives the same weights and inputs each time."""

    name: str
    family: str
    reason: str
    builder: Callable[[], Built]
    training: bool = False

    def build(self) -> Built:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            built = self.builder()
        built.model.train(self.training)
        return built

    def __str__(self) -> str:
        return self.name


def zoo(
    reason: str, *, name: str | None = None, family: str | None = None, training: bool = False
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register a builder. Name and family are its function's and its module's unless given."""

    def register(builder: Callable[[], Built]) -> Callable[[], Built]:
        case = Case(
            name=name or builder.__name__,
            family=family or builder.__module__.rpartition(".")[2],
            reason=reason,
            builder=builder,
            training=training,
        )
        if case.name in _registry:
            raise ValueError(f"two zoo cases are called `{case.name}`")
        _registry[case.name] = case
        return builder

    return register


def cases(family: str | None = None) -> tuple[Case, ...]:
    """All cases, or those of one family, in the order in which they are written."""
    for module in _FAMILIES:
        importlib.import_module(f"{__name__}.{module}")
    return tuple(c for c in _registry.values() if family in (None, c.family))


def batch(max: int = 64) -> Dim:
    """The batch dimension of `dynamic_shapes`."""
    return dim("batch", max)


def sequence(max: int = 64) -> Dim:
    """The dimension of tokens, frames or samples of `dynamic_shapes`."""
    return dim("sequence", max)


def dim(name: str, max: int = 64, min: int = 1) -> Dim:
    from torch.export import Dim

    return Dim(name, min=min, max=max)
