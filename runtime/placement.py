"""Where ONNX Runtime ran each node: what fell back to the CPU, and the copies that this cost.

A session that is asked for a device takes it for what it has kernels for; the rest runs on the CPU
and says nothing. The profile of a run tells: each node with its provider, and each copy, which
ONNX Runtime inserts as a node of its own.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.ir.graph import Graph

CPU = "CPUExecutionProvider"
_COPIES = ("MemcpyFromHost", "MemcpyToHost")


@dataclass(frozen=True)
class Placement:
    """How many nodes ran where; `fallen` counts by op those on the CPU that were meant for another.

    Units:  the shares are of the time that nodes took.
    """

    meant_for: str
    nodes: Mapping[str, int]  # by provider, copies left out
    ops: Mapping[str, int]  # by op, as ONNX Runtime fused them
    fallen: Mapping[str, int]
    copies: Mapping[str, int]  # by kind
    fallen_share: float = 0.0
    copies_share: float = 0.0

    @property
    def is_whole(self) -> bool:
        return not self.fallen and not self.copies

    def __str__(self) -> str:
        total = sum(self.nodes.values())
        place = self.meant_for.removesuffix("ExecutionProvider")
        if self.is_whole:
            return f"all {total} nodes ran on {place}"
        parts = []
        if self.fallen:
            count = sum(self.fallen.values())
            parts.append(
                f"{count} of {total} nodes ran on the CPU instead of {place} "
                f"({_counts(self.fallen)}; {self.fallen_share:.0%} of the time)"
            )
        if self.copies:
            count = sum(self.copies.values())
            parts.append(f"{count} copies between them ({self.copies_share:.0%} of the time)")
        return ", ".join(parts)


def _counts(found: Mapping[str, int]) -> str:
    shown = [f"{n} {op}" for op, n in Counter(found).most_common(5)]
    return ", ".join(shown + (["..."] if len(found) > 5 else []))


def read_profile(path: Path | str, meant_for: str) -> Placement:
    """What ONNX Runtime's profile of one run or more says; nodes are counted once.

    Raises:  DfcError K026 for a file that is no such profile.
    """
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))
        ran = [
            (e["name"], e["args"]["op_name"], e["args"]["provider"], float(e["dur"]))
            for e in events
            if e.get("cat") == "Node" and str(e["name"]).endswith("_kernel_time")
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DfcError("K026", f"{path} is no profile of ONNX Runtime: {e}") from e
    return _placement(ran, meant_for)


def _placement(ran: Sequence[tuple[str, str, str, float]], meant_for: str) -> Placement:
    providers: dict[str, str] = {}
    ops: dict[str, str] = {}
    spent: Counter[str] = Counter()
    for name, op, provider, took in ran:
        providers[name], ops[name] = provider, op
        spent[name] += took  # type: ignore[assignment]
    copies = [n for n in ops if ops[n] in _COPIES]
    nodes = [n for n in ops if ops[n] not in _COPIES]
    fallen = [n for n in nodes if providers[n] == CPU != meant_for]
    whole = sum(spent.values()) or 1.0
    return Placement(
        meant_for,
        Counter(providers[n] for n in nodes),
        Counter(ops[n] for n in nodes),
        Counter(ops[n] for n in fallen),
        Counter(ops[n] for n in copies),
        sum(spent[n] for n in fallen) / whole,
        sum(spent[n] for n in copies) / whole,
    )


def placement(graph: Graph, inputs: Sequence[Any], device: str = "cpu") -> Placement:
    """Run a graph in ONNX Runtime as its engine does, and read where each node ran.

    Raises:  DfcError of the engine.
    """
    from dfc.runtime.engines.onnxruntime_ import providers_of, session

    with tempfile.TemporaryDirectory(prefix="dfc-profile-") as folder:
        made, _ = session(graph, device, profile=f"{folder}/run")
        for _ in range(2):
            if device == "cpu":
                made.run(inputs)
            else:
                made.run_on_device(inputs, device.partition(":")[0])
        return read_profile(made.end_profiling(), providers_of(device)[0])
