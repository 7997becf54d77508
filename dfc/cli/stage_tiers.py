"""What stages of a pipeline stream within the memory of their ranks, as data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.counting import counted
from dfc.errors import DfcError


def rank_budgets(text: str) -> tuple[list[str], str | None]:
    """`--memory` of a pipeline as that of its ranks, and of their host: `1GiB,2GiB,host=4GiB`.

    Raises:  DfcError Q006 for other names, or none but the host's.
    """
    parts = [part.strip() for part in text.split(",")]
    hosts = [p.partition("=")[2].strip() for p in parts if p.partition("=")[0].strip() == "host"]
    ranks = [p for p in parts if "=" not in p]
    if not ranks or len(hosts) > 1 or len(ranks) + len(hosts) != len(parts):
        raise DfcError(
            "Q006", "the ranks of a pipeline have one memory each, and their host has one",
            help="give one for all, or one for each: --memory 1GiB,2GiB, or 1GiB,2GiB,host=4GiB",
        )  # fmt: skip
    return ranks, hosts[0] if hosts else None


def show_tiers(data: dict[str, Any]) -> None:
    """A table of stages, what each rank was brought, and what would be faster."""
    from dfc.cli.tables import print_table, print_text
    from dfc.lang.units import amount_text

    def size(x: float) -> str:
        return amount_text(x, "bytes")

    rows = []
    for i, s in enumerate(data["stages"]):
        t = s["tiers"]
        row = [str(i), size(t["memory"]), size(t["resident_bytes"])]
        if t["streamed"]:
            row += [f"{t['slots']} x {size(t['slot_bytes'])}", size(t["bytes_per_pass"]),
                    amount_text(t["pass_seconds"], "time"), t["limit"]]  # fmt: skip
        rows.append(row + ["-"] * (7 - len(row)))
    print_table(
        ["stage", "memory", "stay", "slots", "a microbatch brings", "planned", "limited by"],
        rows, right=range(6),
    )  # fmt: skip
    count = data["microbatches"]
    for rank, found in enumerate(data["streamed_bytes"]):
        if found:
            print_text(
                f"rank {rank} was brought {size(found)} of weights in the step: each of "
                f"{counted(count, 'microbatch')} is a pass"
            )
    if "host" in data:
        _show_host(data)
    slow = max(data["stages"], key=lambda s: s["seconds"])
    times = slow["tiers"]["break_even"]
    if times > 1 and count > 1:
        print_text(
            f"fewer microbatches bring less: with {times} times as large ones copies would hide "
            f"behind what stage {data['stages'].index(slow)} computes"
        )


def host_data(stages: Sequence[dict[str, Any]], host: str | None) -> dict[str, Any]:
    """What the host holds of what ranks on devices stream, where it has a budget."""
    if host is None:
        return {}
    from dfc.lang.units import byte_count

    held = sum(s["tiers"].get("below", {}).get("held_bytes", 0) for s in stages)
    return {"host": {"memory": byte_count(host), "held_bytes": held}}


def _show_host(data: dict[str, Any]) -> None:
    from dfc.cli.tables import print_text
    from dfc.lang.units import amount_text

    held, memory = (amount_text(data["host"][k], "bytes") for k in ("held_bytes", "memory"))
    each = [
        f"stage {i} {amount_text(s['tiers']['below']['bytes_per_pass'], 'bytes')}"
        for i, s in enumerate(data["stages"]) if s["tiers"].get("below")
    ]  # fmt: skip
    read = amount_text(sum(data["read_bytes"]), "bytes")
    told = f"; of a microbatch {', '.join(each)}" if each else ""
    print_text(f"the host holds {held} of {memory}: the step read {read} from disk{told}")
