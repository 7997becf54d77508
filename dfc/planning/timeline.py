"""A simulated step as pictures: a Chrome or Perfetto trace, and an SVG timeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import floor, log10
from types import MappingProxyType
from typing import Any
from xml.sax.saxutils import escape

from dfc.lang.units import amount_text
from dfc.planning.actions import JOINED, Kind
from dfc.planning.simulate import Simulation

_COLOURS = {Kind.F: "#4c78a8", Kind.I: "#f58518", Kind.W: "#72b7b2", Kind.B: "#e45756",
            Kind.R: "#9c755f", Kind.S: "#bab0ac"}  # fmt: skip
_SEND = "#9d9d9d"
_WIDTH, _ROW = 1000, 26  # pixels of a step, and of a row
_PIXEL = 0.5  # the least width of a box
_EDGED = 2.0  # pixels of a box that has a white edge
_ROWS = 96  # in a picture
NO_NOTES: Mapping[str, str] = MappingProxyType({})


def chrome_trace(simulation: Simulation, names: list[str], unit: float = 1e6) -> dict[str, Any]:
    """Events for chrome://tracing and Perfetto; `unit` makes microseconds of a time."""
    tasks, ranks = simulation.tasks, len(simulation.program.ranks)
    lanes = [*names, *(f"{names[a]} to {names[b]}" for a, b in tasks.links)]
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "tid": i, "name": "thread_name", "args": {"name": name}}
        for i, name in enumerate(lanes)
    ]
    rows, lane = tasks.rows.tolist(), tasks.lane.tolist()
    starts = (simulation.start / simulation.scale * unit).tolist()
    ends = (simulation.end / simulation.scale * unit).tolist()
    for (kind, stage, b), at, start, end in zip(rows, lane, starts, ends, strict=True):
        what = Kind(kind & ~JOINED).name
        name = f"{what}({stage},{b})" if at < ranks else f"SEND {what}({stage},{b})"
        events.append({
            "ph": "X", "pid": 0, "tid": at, "name": name, "cat": what,
            "ts": start, "dur": end - start, "args": {"stage": stage, "microbatch": b},
        })  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def svg_timeline(
    simulation: Simulation, names: list[str], title: str, notes: Mapping[str, str] = NO_NOTES,
    told: Sequence[str] = (),
) -> str:  # fmt: skip
    """One row a device (and a link that takes time), one box an action, idle time pale.

    `notes` stand behind rows, by what a row is called (a link `a → b`), and what is `told` below.
    """
    tasks, ranks = simulation.tasks, len(simulation.program.ranks)
    alone = [name.partition(" (")[0] for name in names]  # a link is between devices, not stages
    every = [*names, *(f"{alone[a]} → {alone[b]}" for a, b in tasks.links)]
    lanes = every[:_ROWS]
    span = float(simulation.makespan) or 1.0
    left, top = 20 + 8 * max(len(n) for n in lanes), 34
    parts = [f'<text x="{left}" y="20" class="title">{escape(title)}</text>']
    for i, name in enumerate(lanes):
        y = top + i * _ROW
        parts.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect x="{left}" y="{y}" width="{_WIDTH}" height="{_ROW - 4}" class="idle"/>'
        )
        if note := notes.get(name):
            parts.append(f'<text x="{left + _WIDTH + 8}" y="{y + 16}">{escape(note)}</text>')
    shades = _shades(simulation)
    for task, x, w in _seen(simulation, len(lanes)):
        kind, stage, b = tasks.rows[task].tolist()
        lane = int(tasks.lane[task])
        what = Kind(kind & ~JOINED)
        colour = _COLOURS[what] if lane < ranks else _SEND
        y = top + lane * _ROW
        shade = shades.get(stage, "") if lane < ranks else ""
        edge = "box" if w > _EDGED else "box thin"  # an edge would hide it
        parts.append(
            f'<rect x="{left + x:.2f}" y="{y}" width="{w:.2f}" height="{_ROW - 4}" '
            f'fill="{colour}"{shade} class="{edge}"><title>{what.name}({stage},{b})</title></rect>'
        )
        if w > 4 + 7 * len(str(b)):  # dark digits on pale boxes
            words = "mb pale" if shade else "mb"
            parts.append(
                f'<text x="{left + x + w / 2:.2f}" y="{y + 15}" class="{words}">{b}</text>'
            )
    y = top + len(lanes) * _ROW
    parts += _axis(left, y, span)
    y += 44
    parts.append(_legend(left, y, simulation))
    if len(every) > len(lanes):
        told = [*told, f"{len(every) - len(lanes)} more rows have no room here: a trace has them"]
    for line in told:
        y += 20
        parts.append(f'<text x="{left}" y="{y}">{escape(line)}</text>')
    style = (
        "text{font:13px sans-serif;fill:#333}.title{font-weight:bold}.idle{fill:#f4f4f4}"
        ".box{stroke:#fff;stroke-width:.6}.thin{stroke:none}"
        ".mb{font-size:10px;fill:#fff;text-anchor:middle}.pale{fill:#333}"
        ".tick{font-size:11px;text-anchor:middle}"
    )
    right = 20 + 8 * max((len(notes.get(n, "")) for n in lanes), default=0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + _WIDTH + right}" '
        f'height="{y + 16}"><style>{style}</style>{"".join(parts)}</svg>\n'
    )


def _seen(simulation: Simulation, lanes: int) -> Iterator[tuple[int, float, float]]:
    """Tasks with where their boxes begin and how wide they are; of those thinner than half a pixel
    one in each half."""
    span = float(simulation.end.max(initial=0)) or 1.0
    drawn = [-1.0] * lanes
    for task, lane in enumerate(simulation.tasks.lane.tolist()):
        if lane >= lanes:
            continue
        x = float(simulation.start[task]) / span * _WIDTH
        end = float(simulation.end[task]) / span * _WIDTH
        if end - x < _PIXEL and x < drawn[lane]:
            continue
        w = max(end - x, _PIXEL)
        drawn[lane] = x + w
        yield task, x, w


def _axis(left: int, y: int, span: float) -> Iterator[str]:
    """Marks below the rows at round times, and one where the step ends."""
    step = 10.0 ** floor(log10(span / 4))
    step *= max(k for k in (1, 2, 5) if k * step <= span / 4)
    marks = [k * step for k in range(int(span / step) + 1)]
    while span - marks[-1] < 0.08 * span:  # their words would touch
        del marks[-1]
    for t in (*marks, span):
        x = left + t / span * _WIDTH
        words = amount_text(t, "time") if t else "0"
        parts = f'<path d="M{x:.1f} {y}v5" stroke="#333"/>'
        yield f'{parts}<text x="{x:.1f}" y="{y + 17}" class="tick">{words}</text>'


def _shades(simulation: Simulation) -> dict[int, str]:
    """The later stages of a device are lighter."""
    tasks, ranks = simulation.tasks, len(simulation.program.ranks)
    held: dict[int, set[int]] = {}
    for (_, stage, _), lane in zip(tasks.rows.tolist(), tasks.lane.tolist(), strict=True):
        if lane < ranks:
            held.setdefault(lane, set()).add(stage)
    return {
        stage: f' fill-opacity="{max(0.4, 1 - 0.3 * i):.1f}"'
        for stages in held.values()
        for i, stage in enumerate(sorted(stages))
        if i
    }


def _legend(left: int, y: int, simulation: Simulation) -> str:
    words = {Kind.F: "forward", Kind.I: "backward, inputs", Kind.W: "backward, weights",
             Kind.B: "backward", Kind.R: "forward again",
             Kind.S: "cheap operators again"}  # fmt: skip
    tasks, ranks = simulation.tasks, len(simulation.program.ranks)
    used = {k & ~JOINED for k in tasks.rows[tasks.lane < ranks, 0].tolist()}  # not messages
    parts, x = [], left
    for kind, word in words.items():
        if kind in used:
            parts.append(
                f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{_COLOURS[kind]}"/>'
            )
            parts.append(f'<text x="{x + 18}" y="{y}">{word}</text>')
            x += 34 + 8 * len(word)
    if simulation.tasks.links:
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{_SEND}"/>')
        parts.append(f'<text x="{x + 18}" y="{y}">sending</text>')
    return "".join(parts)
