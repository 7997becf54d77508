"""How much of the zoo is fused, as a table: `python -m tests.zoo.fusion [NAME...]` writes it.

Sites, which `fusion_sites.py` finds and says what they are, are counted twice: in the captured
graph after `SIMPLIFY`, passes that neither fuse nor fold (so that dead and duplicate code is no
site), and in the graph after the passes in question. Whether results stay right is not asked here:
`tests.zoo.coverage` does, and a rewrite that a proof takes back is a failure there.

A site is `whole` from the start, `fused` by the passes, or `left`: still spelled out, or gone
without one more whole op in its place. A batch norm is fused when it is gone, too: into the
convolution before it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfc.ir.graph import Graph
from tests.zoo import Case, cases
from tests.zoo.fusion_sites import Site, sites

os.environ.setdefault("HF_HUB_OFFLINE", "1")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "fusion.md"
KINDS = ("attention", "norm", "activation", "mlp")
SIMPLIFY = ("canonicalize", "remove_noops", "cse", "dce")
# What is counted: the default passes (dead code goes last: what nobody reads must not keep
# a value alive that a rule would do without), all rules that dfc ships, and cleaning up.
PASSES = (
    "canonicalize", "remove_noops", "fold_constants", "fold_batch_norm", "remove_noops",
    "cse", "dce", "fuse", "remove_noops", "cse", "dce",
)  # fmt: skip


@dataclass
class Count:
    """The sites of one kind in one model."""

    whole: int = 0
    fused: int = 0
    left: int = 0

    @property
    def sites(self) -> int:
        return self.whole + self.fused + self.left

    def __str__(self) -> str:
        return f"{self.whole}/{self.fused}/{self.left}" if self.sites else ""

    @classmethod
    def parse(cls, text: str) -> Count:
        return cls(*map(int, text.split("/"))) if text else cls()


@dataclass
class Left:
    """Sites of one form that are left in one model."""

    name: str
    kind: str
    form: str
    count: int
    module: str
    reason: str


@dataclass
class Row:
    """One model's sites; `unsited` are modules whose class promises a site that was not found."""

    name: str
    family: str
    counts: dict[str, Count] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    unsited: list[str] = field(default_factory=list)


def compare(name: str, family: str, before: Graph, after: Graph) -> Row:
    """What became of the sites of a simplified graph once passes have made `after` of it."""
    row = Row(name, family)
    old, new = sites(before), sites(after)
    for kind in KINDS:
        was = [s for s in old if s.kind == kind]
        still = [s for s in new if s.kind == kind and not s.whole]
        spelled = [s for s in was if not s.whole]
        grown = _steady(new, kind) - _steady(old, kind)
        frozen = sum(s.form == "frozen batch norm" for s in spelled) - sum(
            s.form == "frozen batch norm" for s in still
        )
        gone = len(spelled) - len(still)
        fused = max(min(gone, max(grown, 0) + max(frozen, 0)), 0)
        lost = max(gone - fused, 0)
        whole = len(was) - len(spelled)
        row.counts[kind] = Count(whole, fused, len(still) + lost)
        row.left += _grouped(name, kind, still)
        if lost:
            gone = "gone, nothing in its place"
            row.left.append(Left(name, kind, spelled[0].form, lost, "", gone))
    return row


def _steady(found: Sequence[Site], kind: str) -> int:
    """Whole ops of a kind, without batch norms, which folding takes away."""
    return sum(s.kind == kind and s.whole and s.form != "batch_norm" for s in found)


def _grouped(name: str, kind: str, left: Sequence[Site]) -> list[Left]:
    groups: dict[tuple[str, str], list[Site]] = {}
    for s in left:
        groups.setdefault((s.form, s.around), []).append(s)
    return [
        Left(name, kind, form, len(group), group[0].module, f"`{around}`")
        for (form, around), group in groups.items()
    ]


_PROMISES = {
    "attention": re.compile(r"(Attention|Attn)(?!.*(Output|Intermediate|Layer|Block|Embed))"),
    "norm": re.compile(r"Norm(?!.*(Gate|alize|Conv|Linear))"),
}


def unsited(model: Any, before: Graph) -> list[str]:
    """The cross-check: modules that ran, are called attention or norm, and have no such site."""
    ran = {n.loc.module for n in before.walk() if n.loc and n.loc.module}
    found = {k: {s.module for s in sites(before) if s.kind == k} for k in _PROMISES}
    missing: Counter[str] = Counter()
    for path, module in model.named_modules():
        cls = type(module).__name__
        for kind, promise in _PROMISES.items():
            below = path + "."
            if (
                not path
                or not promise.search(cls)
                or not any(r == path or r.startswith(below) for r in ran)
            ):
                continue
            if not any(f == path or f.startswith(below) for f in found[kind]):
                missing[cls] += 1
    return [f"{n} {cls}" for cls, n in missing.items()]


def examine(case: Case, passes: Sequence[Any] | None = None) -> Row | None:
    """Count one case's sites before and after the passes (default: `PASSES`).

    None for a model that cannot be captured: `docs/coverage.md` says why.
    """
    import dfc
    from dfc.rewrite.driver import run_passes
    from dfc.rewrite.pass_ import find_pass

    built = case.build()
    try:
        graph = dfc.trace(built.model, built.args, built.kwargs, built.dynamic_shapes)
    except dfc.DfcError:
        return None
    before = run_passes(graph, [find_pass(p) for p in SIMPLIFY], mode="none").graph
    chosen = [find_pass(p) if isinstance(p, str) else p for p in passes or PASSES]
    after = run_passes(graph, chosen, mode="none").graph
    row = compare(case.name, case.family, before, after)
    row.unsited = unsited(built.model, before)
    return row


# the document

_TITLES = {"attention": "attention", "norm": "norm", "activation": "activation", "mlp": "MLP"}


def document(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    shown = [r for r in rows if any(c.sites for c in r.counts.values())]
    total = {k: [sum(getattr(r.counts[k], f) for r in rows) for f in ("whole", "fused", "left")]
             for k in KINDS}  # fmt: skip
    lines = [
        "# What is fused in the models of the zoo",
        "",
        "Written by `python -m tests.zoo.fusion`; `tests/zoo/fusion_sites.py` says what is a site.",
        "",
        f"{len(shown)} of the {len(rows)} models that are captured have a site.",
        "",
        "| sites | all | whole from the start | fused by passes | left | whole or fused |",
        "|---|---|---|---|---|---|",
    ]
    for kind, (whole, fused, left) in total.items():
        all_ = whole + fused + left
        share = f"{(whole + fused) / all_:.1%}" if all_ else ""
        lines.append(f"| {_TITLES[kind]} | {all_} | {whole} | {fused} | {left} | {share} |")
    lines += [
        "",
        "## By model: whole from the start / fused by passes / left",
        "",
        f"| model | family | {' | '.join(_TITLES.values())} |",
        "|---|---|---|---|---|---|",
    ]
    for r in shown:
        lines.append(f"| {r.name} | {r.family} | {' | '.join(str(r.counts[k]) for k in KINDS)} |")
    lines += [
        "",
        "## Sites that are left",
        "",
        "The reason is the operators around the site, along its first operand and first user.",
        "",
        "| model | sites | form | first module | reason |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        for x in r.left:
            cells = (r.name, f"{x.count} {_TITLES[x.kind]}", x.form, x.module, x.reason)
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Modules named like attention or norm in which no site was found",
        "",
        "| model | modules |",
        "|---|---|",
    ]
    lines += [f"| {r.name} | {', '.join(r.unsited)} |" for r in rows if r.unsited]
    bare = [r.name for r in rows if r not in shown]
    lines += ["", "## Models without a site", "", ", ".join(bare)]
    return "\n".join(lines) + "\n"


def recorded() -> dict[str, Row]:
    """The rows of the document as it was last written."""
    rows: dict[str, Row] = {}
    kinds = {title: kind for kind, title in _TITLES.items()}
    section = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line
        cells = [c.strip() for c in line.split("|")[1:-1]]
        if section == "## Models without a site" and line and not line.startswith("#"):
            rows.update({n: Row(n, "", {k: Count() for k in KINDS}) for n in line.split(", ")})
        if not cells or cells[0] in ("model", "sites", "---"):
            continue
        if section.startswith("## By model"):
            counts = dict(zip(KINDS, map(Count.parse, cells[2:]), strict=True))
            rows[cells[0]] = Row(cells[0], cells[1], counts)
        elif section == "## Sites that are left":
            count, _, title = cells[1].partition(" ")
            left = Left(cells[0], kinds[title], cells[2], int(count), cells[3], cells[4])
            rows[cells[0]].left.append(left)
        elif section.startswith("## Modules"):
            row = rows.setdefault(cells[0], Row(cells[0], "", {k: Count() for k in KINDS}))
            row.unsited = cells[1].split(", ")
    return rows


def _one(name: str) -> tuple[str, Row | str | None]:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    case = next(c for c in cases() if c.name == name)
    try:
        return name, examine(case)
    except Exception as e:  # noqa: BLE001 - one model's failure is a finding, not the end
        return name, f"{type(e).__name__}: {str(e)[:500]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only models or families whose name contains one")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    options = parser.parse_args()
    chosen = [
        c.name
        for c in cases()
        if not options.names or any(n in c.name or n == c.family for n in options.names)
    ]
    rows = recorded() if options.names and DOCUMENT.exists() else {}
    failed = 0
    for i, (name, outcome) in enumerate(_stream(chosen, options.jobs), 1):
        rows.pop(name, None)
        if isinstance(outcome, Row):
            rows[name] = outcome
        failed += isinstance(outcome, str)
        told = outcome if isinstance(outcome, str) else _brief(outcome)
        print(f"{i:>4}/{len(chosen)} {name:32} {told}", file=sys.stderr, flush=True)
    ordered = [rows[c.name] for c in cases() if c.name in rows]
    DOCUMENT.write_text(document(ordered), encoding="utf-8")
    print("\n".join(document(ordered).splitlines()[4:12]))
    return 1 if failed else 0


def _brief(row: Row | None) -> str:
    if row is None:
        return "not captured"
    return "  ".join(f"{k} {c}" for k, c in row.counts.items() if c.sites) or "no site"


def _stream(names: Sequence[str], jobs: int) -> Iterator[tuple[str, Row | str | None]]:
    """Outcomes in order, from processes that are replaced before their memory grows."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, maxtasksperchild=40) as pool:
        yield from pool.imap(_one, names)


if __name__ == "__main__":
    sys.exit(main())
