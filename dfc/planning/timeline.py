"""A simulated step as pictures: a Chrome or Perfetto trace, and an SVG timeline."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from dfc.planning.actions import JOINED, Kind
from dfc.planning.simulate import Simulation

_COLOURS = {Kind.F: "#4c78a8", Kind.I: "#f58518", Kind.W: "#72b7b2", Kind.B: "#e45756",
            Kind.R: "#9c755f", Kind.S: "#bab0ac"}  # fmt: skip
_SEND = "#9d9d9d"
_MOST = 6000  # boxes in a picture: more are thinner than a pixel


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


def svg_timeline(simulation: Simulation, names: list[str], title: str) -> str:
    """One row a device (and a link that takes time), one box an action, idle time white."""
    tasks, ranks = simulation.tasks, len(simulation.program.ranks)
    alone = [name.partition(" (")[0] for name in names]  # a link is between devices, not stages
    lanes = [*names, *(f"{alone[a]} → {alone[b]}" for a, b in tasks.links)]
    shades = _shades(simulation)
    span = float(simulation.end.max(initial=0)) or 1.0
    left, width, row = 20 + 8 * max(len(n) for n in lanes), 1000, 26
    parts = [f'<text x="{left}" y="20" class="title">{escape(title)}</text>']
    for i, name in enumerate(lanes):
        y = 34 + i * row
        parts.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width}" height="{row - 4}" class="idle"/>')
    order = range(min(len(tasks.took), _MOST))
    for task in order:
        kind, stage, b = tasks.rows[task].tolist()
        lane = int(tasks.lane[task])
        x = left + float(simulation.start[task]) / span * width
        w = max(float(simulation.end[task] - simulation.start[task]) / span * width, 0.2)
        what = Kind(kind & ~JOINED)
        colour = _COLOURS[what] if lane < ranks else _SEND
        y = 34 + lane * row
        shade = shades.get(stage, "") if lane < ranks else ""
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="{row - 4}" fill="{colour}"{shade} '
            f'class="box"><title>{what.name}({stage},{b})</title></rect>'
        )
        if w > 4 + 7 * len(str(b)):  # dark digits on pale boxes
            words = "mb pale" if shade else "mb"
            parts.append(f'<text x="{x + w / 2:.2f}" y="{y + 15}" class="{words}">{b}</text>')
    height = 34 + len(lanes) * row + 34
    parts.append(_legend(left, height - 14, simulation))
    style = (
        "text{font:13px sans-serif;fill:#333}.title{font-weight:bold}.idle{fill:#f4f4f4}"
        ".box{stroke:#fff;stroke-width:.6}.mb{font-size:10px;fill:#fff;text-anchor:middle}"
        ".pale{fill:#333}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{height}">'
        f"<style>{style}</style>{''.join(parts)}</svg>\n"
    )


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
    used = {int(k) & ~JOINED for k in simulation.tasks.rows[:, 0].tolist()}
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
