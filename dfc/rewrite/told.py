"""What is known of rules and nodes, told: in words for people, as data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfc.counting import counted

if TYPE_CHECKING:
    from dfc.rewrite.explain import NearMiss, RuleReport, Site
    from dfc.rewrite.story import Group, Story

INDENT = " " * 13  # of what is told below a name


def rule_lines(report: RuleReport, explained: int) -> list[str]:
    from dfc.rewrite.explain import modules_text

    name, applied, count = report.rule.full_name, len(report.matched), report.count
    lines = [f"{name}: matched {applied} of {count}" if count else f"{name}: nothing is near it"]
    if report.matched:
        lines.append(f"  matched    {modules_text(report.matched) or 'the model itself'}")
    for other, sites in report.taken.items():
        where = modules_text(sites) or "the model itself"
        lines.append(f"  but first  `{other}` takes {len(sites)}: {where}")
    for miss in report.misses[:explained]:
        lines += _miss_lines(miss)
    if explained < len(report.misses):
        rest = len(report.misses) - explained
        lines.append(f"  ... and {rest} more kinds of near misses (--all shows them)")
    return lines


def _miss_lines(miss: NearMiss) -> list[str]:
    from dfc.rewrite.explain import modules_text

    where = modules_text(miss.sites)
    lines = [f"  near miss  {f'{where}: ' if where else ''}{miss.sites[0]}"]
    ops = f"{min(miss.matched, miss.size)} of {miss.size} ops stand"
    if miss.condition:
        lines.append(f"{INDENT}{ops}, then `{miss.condition}` fails: {miss.reason}")
    else:
        lines.append(f"{INDENT}{ops}, then {miss.reason}{_blocked_at(miss)}")
    bound = ", ".join(f"{k} = {v}" for k, v in miss.bound.items())
    if bound:
        lines.append(f"{INDENT}with {bound}")
    if miss.fix:
        lines.append(f"{INDENT}the nearest fix: {miss.fix}")
    else:
        lines.append(f"{INDENT}no single change was found that lets it match")
    return lines


def _blocked_at(miss: NearMiss) -> str:
    """The Python line of the node in the way, if the reason has not said it."""
    loc = miss.refusal.blocker.loc if miss.refusal.blocker else None
    if loc is None or not loc.file or loc.file in miss.reason:
        return ""
    return f" (at {loc.file}:{loc.line})"


def story_lines(story: Story) -> list[str]:
    lines = [story.value]
    t = story.traced
    if t is not None:
        inside = f" in {t.module}" if t.module else ""
        lines.append(f"  traced       as {t.op} at {t.place or 'an unknown place'}{inside}")
    else:
        lines.append("  traced       not: a pass made it")
    for e in story.events:
        lines.append(f"  {e.step:<12} {e.text}")
    if story.final is None:
        lines.append("  at the end it is gone")
        return lines
    kept = "unchanged" if not story.events else "there"
    lines.append(f"  at the end   {kept}: {story.final}")
    for engine, why in story.engines.items():
        lines.append(f"  {engine:<12} {'takes it' if not why else f'does not take it: {why}'}")
    for name, refusal in story.nearest:
        from dfc.lang.wording import expression_text

        c = refusal.condition
        failed = (
            f"`{expression_text(c)}` fails: {refusal.reason}" if c is not None else refusal.reason
        )
        ops = len(set(refusal.nodes))
        lines.append(
            f"  not fused    by `{name}`: {counted(ops, 'op stands', 'ops stand')}, then {failed}"
        )
    if not story.nearest:
        lines.append("  no rule comes near it")
    return lines


def short_story(story: Story) -> str:
    start = f"{story.value} ({story.traced.op if story.traced else 'made'})"
    changed = [e for e in story.events if e.outcome != "kept"]
    kept = [e for e in story.events if e.outcome == "kept"][-1:]
    if not changed:
        return f"{start}: unchanged" + "".join(f" ({e.step}: {e.text})" for e in kept)
    return f"{start}: " + "; then ".join(f"{e.step}: {e.text}" for e in changed)


def _site_data(s: Site) -> dict[str, str]:
    return {"value": s.value, "op": s.op, "module": s.module, "place": s.place}


def rule_data(report: RuleReport) -> dict[str, Any]:
    return {
        "rule": report.rule.full_name,
        "matched": [_site_data(s) for s in report.matched],
        "taken": {k: [_site_data(s) for s in v] for k, v in report.taken.items()},
        "near_misses": [
            {
                "sites": [_site_data(s) for s in m.sites],
                "ops": m.matched,
                "of": m.size,
                "condition": m.condition,
                "reason": m.reason,
                "bound": m.bound,
                "fix": m.fix.text if m.fix else None,
                "tried": m.fix.tried if m.fix else None,
            }
            for m in report.misses
        ],
    }


def group_data(g: Group) -> dict[str, Any]:
    return {
        "outcome": g.outcome,
        "reason": g.reason,
        "nodes": [
            {**_site_data(s), "into": d.into} for s, d in zip(g.sites, g.decisions, strict=True)
        ],
    }


def story_data(story: Story) -> dict[str, Any]:
    return {
        "value": story.value,
        "traced": _site_data(story.traced) if story.traced else None,
        "events": [{"pass": e.step, "outcome": e.outcome, "text": e.text} for e in story.events],
        "final": _site_data(story.final) if story.final else None,
        "engines": story.engines,
        "nearest_rules": [{"rule": n, "reason": r.reason} for n, r in story.nearest],
    }
