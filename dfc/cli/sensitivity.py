"""`dfc explain --sensitivity`: a table with bars, the same as SVG or HTML, or data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dfc.recipe.sensitivity import Effect, Sensitivity

SHOWN = 20  # layers, unless all are asked for
PLOTS = (".svg", ".html")
_BAR = 24  # characters of the longest bar
_WIDTH = 130


def tell(found: Sequence[Sensitivity], every: bool) -> None:
    """Print the tables."""
    from dfc.cli.tables import console

    out = console()
    if out.width < _WIDTH:
        out.width = _WIDTH
    for s in found:
        _print(out, s, every)


def check_output(output: str | None) -> None:
    """Refuse a file of another kind before anything is measured.

    Raises:  DfcError D057.
    """
    if output is not None and Path(output).suffix not in PLOTS:
        message = f"-o: `{output}` is no plot"
        raise DfcError("D057", message, help=f"name a file that ends in {' or '.join(PLOTS)}")


def write_plot(found: Sequence[Sensitivity], output: str, force: bool) -> None:
    """The tables as rich draws them: every layer, in a file that any browser shows."""
    import io
    import re

    from rich.console import Console

    from dfc.cli.outputs import write_text

    drawn = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True)
    for s in found:
        _print(drawn, s, every=True)
    title = "dfc: sensitivity"
    if output.endswith(".svg"):  # without rich's fonts, which a browser would fetch from the net
        text = re.sub(r"@font-face \{.*?\}\s*", "", drawn.export_svg(title=title), flags=re.DOTALL)
    else:
        text = drawn.export_html()
    write_text(output, text, force)


def _print(out: Console, s: Sensitivity, every: bool) -> None:
    from rich.measure import Measurement

    shown = s.layers if every else s.layers[:SHOWN]
    out.print(f"{s.label or s.step}: {s.step}", style="bold", markup=False)
    base = f", without the step {s.baseline:.4g}" if s.baseline is not None else ""
    out.print(f"each layer alone, the worst by {s.by} first, on {s.where}{base}", markup=False)
    table = _table(s, shown)
    whole = Measurement.get(out, out.options.update(max_width=1000), table).maximum
    out.width = max(out.width, whole)  # names of layers are looked for, and copied
    out.print(table)
    if len(shown) < len(s.layers):
        out.print(f"... and {len(s.layers) - len(shown)} more layers: --all shows them")
    out.print(_all_at_once(s), markup=False)
    out.print()


def _table(s: Sensitivity, shown: Sequence[Effect]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    head = _columns(s)
    for name in head:
        left = name in ("layer", "ops", "")
        table.add_column(
            name, justify="left" if left else "right", overflow="fold", no_wrap=name == ""
        )
    most = max((e.score for e in s.layers if e.score < float("inf")), default=0.0)
    for e in shown:
        table.add_row(*_row(e, head, most))
    return table


def _columns(s: Sensitivity) -> list[str]:
    first = s.layers[0]
    head = ["layer", "ops", ""]
    if s.baseline is not None:
        head += ["drop", "bound"] if first.bound is not None else ["drop"]
    head += ["rel. error", "cosine"]
    head += ["KL"] if first.kl is not None else []
    head += ["bytes"]
    return [*head, "before", "after"] if any(e.before_ms for e in s.layers) else head


def _row(e: Effect, head: Sequence[str], most: float) -> list[Any]:
    from rich.text import Text

    from dfc.cli.tables import ms_text

    values = {
        "layer": Text(e.layer or "(the model itself)"),
        "ops": Text(", ".join(_short(op) for op in e.nodes)),
        "": Text(_bar(e.score, most), style="red"),
        "drop": _number(e.drop, ".4f"), "bound": _number(e.bound, ".4f"),
        "rel. error": _number(e.relative, ".3g"), "cosine": _number(e.cosine, ".6f"),
        "KL": _number(e.kl, ".3g"), "bytes": _bytes(e.bytes),
        "before": ms_text(e.before_ms), "after": ms_text(e.after_ms),
    }  # fmt: skip
    return [values[name] for name in head]


def _short(op: str) -> str:
    parts = op.split(".")
    return parts[1] if len(parts) > 1 else op


def _bar(value: float, most: float) -> str:
    if value == float("inf"):
        return "█" * _BAR + "…"
    share = value / most if most > 0 else 0.0
    eighths = round(max(share, 0.0) * _BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)


def _bytes(n: int) -> str:
    from dfc.cli.tables import bytes_text

    return f"{'-' if n < 0 else '+' if n else ''}{bytes_text(abs(n))}"


def _all_at_once(s: Sensitivity) -> str:
    w = s.whole
    words = [f"relative error {w.relative:.3g}"]
    words += [f"cosine {w.cosine:.6f}"] if w.cosine is not None else []
    words += [f"KL {w.kl:.3g}"] if w.kl is not None else []
    if w.drop is not None:
        words.insert(0, f"drop {w.drop:.4f}")
        if w.bound is not None and w.agreement is not None:
            words.insert(1, f"95 % bound {w.bound:.4f}, agree {w.agreement:.1%}")
    return f"all {len(s.layers)} at once: {', '.join(words)}, {_bytes(w.bytes)}"
