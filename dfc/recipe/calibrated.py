"""What was measured of a machine as a target: its text, and that text's meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dfc.errors import DfcError
from dfc.lang.format import format_text
from dfc.lang.units import UNITS
from dfc.recipe.targets import DEVICES, LINK

if TYPE_CHECKING:
    from dfc.runtime.calibrate.device import Measured
    from dfc.runtime.calibrate.links import MeasuredLink
    from dfc.runtime.calibrate.sampling import Reading

# The units that a fact may be written in, the largest first.
_UNITS = {
    "bytes": ("GB", "MB", "KB", "B"),
    "bytes/s": ("TB/s", "GB/s", "MB/s", "KB/s"),
    "flops/s": ("TFLOPS", "GFLOPS", "MFLOPS", "KFLOPS"),
    "time": ("s", "ms", "us", "ns"),
    "number": ("",),
}
_NOISY = 0.1  # a spread that is worth telling
_UNSTEADY = 1.0  # one that is as large as the value itself


def fact_text(value: float, dimension: str) -> str:
    """A fact with four digits and the largest unit that leaves 1 or more: `23.41GB/s`."""
    units = _UNITS[dimension]
    unit = next((u for u in units if value >= UNITS[u][1]), units[-1])
    return f"{float(f'{value / UNITS[unit][1]:.4g}'):.12g}{unit}"


def doubt_text(r: Reading, dimension: str) -> str:
    """How sure a value is, where that is worth telling."""
    if not r.is_seen:
        return f"not told from nothing: below {fact_text(r.least, dimension)}"
    if is_unsteady(r):
        return "unsteady: measure again on a quiet machine"
    return f"quartiles {r.spread:.0%} apart" if r.spread > _NOISY else ""


def is_unsteady(r: Reading) -> bool:
    """Whether samples differ so much that the value says little."""
    return r.is_seen and r.spread > _UNSTEADY


def target_text(
    name: str,
    devices: Sequence[Measured],
    links: Sequence[MeasuredLink],
    notes: Sequence[str] = (),
) -> str:
    """A file with one target. What varied by more than a tenth says so behind it."""
    lines = ["dfc 1", "", *(f"# {note}" for note in notes), f"target {name} {{"]
    for d in devices:
        lines.append(f"  device {d.name} : {d.kind}(")
        lines += (f"    {line}" for line in _facts(d.facts, d.readings, DEVICES[d.kind]))
        lines.append("  )")
    for x in links:
        bandwidth = fact_text(x.bandwidth.value, LINK["bw"])
        latency = fact_text(x.latency.value, LINK["latency"])
        lines.append(f"  link {x.source} -> {x.sink} : {x.kind}(bw={bandwidth}, latency={latency})")
    return format_text("\n".join([*lines, "}", ""]), "target")


def require_word(name: str) -> None:
    """Refuse a name that a target cannot have, before anything is measured.

    Raises:  DfcError N049.
    """
    from dfc.recipe.sources import plan_of

    try:
        plan_of("O0", target=f"dfc 1\ntarget {name} {{\n  device a : cpu()\n}}\n")
    except DfcError as e:
        help = "a letter first, then letters, digits and `_`"
        raise DfcError("N049", f"a target cannot be called `{name}`", help=help) from e


def _facts(
    known: Mapping[str, float], readings: Mapping[str, Reading], dimensions: Mapping[str, str]
) -> Iterator[str]:
    """A line for each fact, in the order in which a target's facts are documented."""
    for fact, dimension in dimensions.items():
        if fact in known:
            yield f"{fact}={fact_text(known[fact], dimension)},"
        elif fact in readings:
            r = readings[fact]
            told = f"  # {doubt}" if (doubt := doubt_text(r, dimension)) else ""
            yield f"{fact}={fact_text(r.value, dimension)},{told}"
