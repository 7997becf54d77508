"""Numbers with units: what they measure, and which may stand side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.lang.wording import number_text

# dimension and factor; the base units are byte, second, byte/s, flop/s, and 1 for shares
UNITS: Mapping[str, tuple[str, float]] = {
    "": ("number", 1.0),
    **{f"{p}B": ("bytes", 1000.0**i) for i, p in enumerate(["", "K", "M", "G", "T"])},
    **{f"{p}iB": ("bytes", 1024.0**i) for i, p in enumerate(["K", "M", "G", "T"], 1)},
    **{f"{p}B/s": ("bytes/s", 1000.0**i) for i, p in enumerate(["", "K", "M", "G", "T"])},
    **{f"{p}iB/s": ("bytes/s", 1024.0**i) for i, p in enumerate(["K", "M", "G", "T"], 1)},
    **{f"{p}FLOPS": ("flops/s", 1000.0**i) for i, p in enumerate(["", "K", "M", "G", "T", "P"])},
    "ns": ("time", 1e-9),
    "us": ("time", 1e-6),
    "ms": ("time", 1e-3),
    "s": ("time", 1.0),
    "min": ("time", 60.0),
    "h": ("time", 3600.0),
    "items/s": ("rate", 1.0),
    "tokens/s": ("rate", 1.0),
    "%": ("share", 0.01),
    "pp": ("points", 0.01),
    # Others as they are told: a table's figures may be written into a file.
    "kB": ("bytes", 1000.0),
    "kB/s": ("bytes/s", 1000.0),
    "µs": ("time", 1e-6),
}
# How a value of each dimension is written: the largest unit that leaves at least 1.
_WRITTEN = {
    "bytes": ("TiB", "GiB", "MiB", "KiB", "B"),
    "time": ("s", "ms", "µs", "ns"),
    "bytes/s": ("TB/s", "GB/s", "MB/s", "kB/s", "B/s"),
    "flops/s": ("PFLOPS", "TFLOPS", "GFLOPS", "MFLOPS", "KFLOPS", "FLOPS"),
    "rate": ("items/s",),
    "points": ("pp",),
    "share": ("%",),
}

_DECIMAL = ("TB", "GB", "MB", "kB", "B")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z/]*)")


@dataclass(frozen=True)
class Amount:
    """A number in base units, and what it measures; `text` is how it was written."""

    value: float
    dimension: str = "number"
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        if self.text:
            return self.text
        unit = next((u for u in _WRITTEN.get(self.dimension, ("",))[-1:]), "")
        return f"{self.value / UNITS[unit][1]!r}{unit}"


def amount_text(value: float, dimension: str, decimal: bool = False) -> str:
    """A value of base units as people write it: `12.0 GiB`, `3.4 ms`; with `decimal`, `12.9 GB`."""
    units = _DECIMAL if decimal and dimension == "bytes" else _WRITTEN.get(dimension)
    if units is None:
        return f"{value:.4g}"
    unit = next((u for u in units if abs(value) >= UNITS[u][1]), units[-1])
    return f"{value / UNITS[unit][1]:.4g} {unit}"


def amount(x: s.Number, source: Source) -> Amount | Diagnostic:
    """The amount that a number with its unit states, or what is wrong with the unit."""
    found = UNITS.get(x.unit)
    if found is None:
        help = did_you_mean(x.unit, [u for u in UNITS if u], 3)
        span = source.span(*x.at)
        return Diagnostic("Q010", f"unknown unit `{x.unit}`", span, help or "write 12GiB, 0.5pp")
    dimension, factor = found
    return Amount(x.value * factor if x.unit else x.value, dimension, number_text(x))


def byte_count(size: str | int) -> int:
    """A number of bytes, or text as `2GiB`.

    Raises:  DfcError Q010 for what is no size, or none that memory can have.
    """
    help = "write a number with a unit, as in 2GiB or 800MB"
    if isinstance(size, str):
        found = _SIZE.fullmatch(size.strip())
        unit = found[2] if found else ""
        if found is None or UNITS.get(unit, ("", 0))[0] not in ("bytes", "number"):
            known = [u for u, (of, _) in UNITS.items() if of == "bytes"]
            help = did_you_mean(unit, known) or help
            raise DfcError("Q010", f"`{size}` is no size of memory", help=help, status=2)
        value = float(found[1]) * UNITS[unit][1]
    elif isinstance(size, bool) or not isinstance(size, (int, float)):
        raise DfcError("Q010", f"{size!r} is no size of memory", help=help, status=2)
    else:
        value = size
    if not 0 < value < float("inf"):
        raise DfcError("Q010", f"`{size}` is no size of memory", help=help, status=2)
    return int(value)


def fits(a: str, b: str) -> bool:
    """Whether amounts of two dimensions may be compared or added.

    Shares, points and plain numbers are one family: a metric of 0.76, 76%, a loss of 0.5pp.
    """
    plain = {"number", "share", "points"}
    return a == b or (a in plain and b in plain)
