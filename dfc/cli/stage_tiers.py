"""What stages of a pipeline stream within the memory of their ranks, as data and as text."""

from __future__ import annotations

from typing import Any


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
                f"{count} microbatches is a pass"
            )
    slow = max(data["stages"], key=lambda s: s["seconds"])
    times = slow["tiers"]["break_even"]
    if times > 1 and count > 1:
        print_text(
            f"fewer microbatches bring less: with {times} times as large ones copies would hide "
            f"behind what stage {data['stages'].index(slow)} computes"
        )
