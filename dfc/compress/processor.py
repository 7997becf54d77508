"""What the device that a model is made for computes in: it decides which codes and types pay.

A recipe's target says it (`dtypes=[f32, bf16, i8]`, a peak such as `peak_bf16`, or a device that
the catalogue knows); where it says nothing, this machine's processor stands in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

from dfc.planning.catalogue import CATALOGUE

_PEAK = "peak_"
_AT_LEAST = {"i8": 2.0}  # times the peak of f32: pairs of products in 16 bits reach twice
_CPU_FLAGS = {"i8": {"avx512_vnni", "avx_vnni", "avx512vnni"}, "bf16": {"avx512_bf16", "amx_bf16"}}
_FLAGS_OF_ARM = {"i8": {"asimddp", "i8mm"}, "bf16": {"bf16"}, "f16": {"fphp", "asimdhp"}}


class _Device(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


class _Target(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def devices(self) -> Sequence[_Device]: ...


@dataclass(frozen=True)
class Processor:
    """A device: its kind, and the types that its instructions multiply and add up.

    `i8` says that products of 8-bit integers are added in 32 bits, which never overflow.
    """

    words: str  # as messages name it
    kind: str  # cpu or cuda
    dtypes: frozenset[str]

    def computes(self, dtype: str) -> bool:
        return dtype in self.dtypes

    def __str__(self) -> str:
        return f"{self.words} computes in {', '.join(sorted(self.dtypes))}"


def processor_of(target: object | None) -> Processor:
    """The device of a target; of several, what all of them can; without one, this machine."""
    devices = cast(_Target, target).devices if target is not None else ()
    if not devices:
        return this_processor()
    found = [_processor(d) for d in devices]
    common = frozenset.intersection(*(p.dtypes for p in found))
    kind = found[0].kind if len({p.kind for p in found}) == 1 else "cpu"
    words = found[0].words if len(found) == 1 else f"target `{cast(_Target, target).name}`"
    return Processor(words, kind, common)


def declared(target: object | None) -> Processor | None:
    """The same, where each device of the target says what it computes in."""
    devices = cast(_Target, target).devices if target is not None else ()
    if not devices or any(_stated(d) is None for d in devices):
        return None
    return processor_of(target)


def _processor(d: _Device) -> Processor:
    known = CATALOGUE.get(d.kind)
    kind = known.kind if known else d.kind
    dtypes = _stated(d)
    if dtypes is None:  # it says nothing: what is at hand, or what every device can
        dtypes = this_processor().dtypes if kind == "cpu" else frozenset({"f32", "f16", "i8"})
    return Processor(f"device `{d.name}`", kind, dtypes)


def _stated(d: _Device) -> frozenset[str] | None:
    listed = d.facts.get("dtypes")
    if listed is not None:
        return frozenset({"f32", *listed})
    known = CATALOGUE.get(d.kind)
    peaks = dict(known.peaks) if known is not None else {}
    for fact, amount in d.facts.items():
        if fact == "peak" or fact.startswith(_PEAK):
            peaks[fact.removeprefix(_PEAK) if fact != "peak" else "f32"] = float(amount.value)
    if not set(peaks) - {"f32", "f64"}:
        return None
    f32 = peaks.get("f32", 0.0)
    return frozenset({"f32", *(t for t, peak in peaks.items() if peak > f32 * _AT_LEAST.get(t, 1))})


@cache
def this_processor() -> Processor:
    """This machine's CPU. Where the system does not tell, only what every one can."""
    import platform

    intel = platform.machine().lower() in ("x86_64", "amd64", "i686")
    flags, found = _flags(), {"f32"}
    for dtype, its in (_CPU_FLAGS if intel else _FLAGS_OF_ARM).items():
        if its & flags:
            found.add(dtype)
    if not intel:
        found.add("i8")  # ARM's instructions do not saturate
    return Processor("this machine's processor", "cpu", frozenset(found))


def _flags() -> set[str]:
    from pathlib import Path

    try:
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return set()
