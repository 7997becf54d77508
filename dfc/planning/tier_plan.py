"""A graph's plan of tiers before anything runs: by its operators' costs, and a link's rate."""

from __future__ import annotations

from dataclasses import replace

from dfc.errors import DfcError
from dfc.lang.units import amount_text
from dfc.planning.cost import Sizes, work_of
from dfc.planning.machine import Device, Machine
from dfc.planning.model import Modelled, live_bytes
from dfc.planning.streaming import Hop, Layer
from dfc.planning.tiers import Tiers, aligned, plan_tiers
from dfc.planning.weight_blocks import Cut, cut, weight_bytes

DISK = 1e9  # bytes a second, of a disk that was not measured
PCIE = 25e9  # of a link to a GPU that was not


def planned(
    parts: Cut, device: Device, hop: Hop, memory: int, sizes: Sizes,
    slots: int | None = None, placement: str = "even",
) -> Tiers:  # fmt: skip
    """What stays in so much memory of a device, and what is streamed.

    The memory is also for what is computed with inputs of these sizes.
    Raises:  DfcError N064 (status 6) for a memory that is too small.
    """
    whole = all_there(parts, device, hop, sizes)
    return plan_tiers(whole.layers, whole.weights, memory, hop, whole.fixed, slots, placement)


def all_there(parts: Cut, device: Device, hop: Hop, sizes: Sizes) -> Tiers:
    """The plan by which nothing is streamed, in a memory that is just large enough."""
    layers = [
        Layer(float(sum(work_of(n, sizes).seconds(device) for n in b.nodes)), b.bytes, b.name)
        for b in parts.blocks
    ]
    weights = [{p.name: weight_bytes(p) for p in b.weights} for b in parts.blocks]
    fixed = sum(aligned(weight_bytes(p)) for p in parts.stay)
    fixed += int(live_bytes(parts.graph, sizes))
    found = Tiers(tuple(layers), tuple(weights), (), hop, 0, fixed)
    return replace(found, memory=found.held_bytes)


def streamed_instead(model: Modelled, machine: Machine) -> str:
    """What a model that does not fit would take on the device with most memory; "" if nothing."""
    graph = model.groups[0][0].graph if model.groups else None
    if graph is None:
        return ""
    at = max(range(len(machine.devices)), key=lambda i: machine.devices[i].usable)
    device = machine.devices[at]
    memory, sizes = int(device.usable), model.sizes
    try:
        plan = planned(cut(graph), device, _hop(machine, at), memory, sizes)
    except DfcError:
        return ""  # not even so
    each, size = (amount_text(x, "bytes") for x in (plan.bytes_per_pass, memory))
    return (
        f"weights that are streamed to `{device.name}` (`dfc run --memory "
        f"{size.replace(' ', '')}`): {each} from {plan.hop.name} in each pass, which takes "
        f"{amount_text(float(plan.pass_seconds), 'time')} by the model"
    )


def stream_hops(machine: Machine, among: Machine | None = None) -> dict[str, Hop]:
    """How weights come to each device: parts of a processor share its disk.

    The devices are some of those `among` which the hosts are, or parts of them.
    """
    among = among or machine
    known = [d.name for d in among.devices]
    names = [d.name if d.name in known else d.name.rpartition(".")[0] for d in machine.devices]
    found = {}
    for i, d in enumerate(machine.devices):
        hop = _hop(among, known.index(names[i]))
        sharing = names.count(names[i]) if d.kind == "cpu" else 1
        found[d.name] = replace(hop, per_byte=hop.per_byte * sharing)
    return found


def host_memory(machine: Machine) -> int | None:
    """What the host of a machine's other devices holds; None where the target names none."""
    return max((int(d.usable) for d in machine.devices if d.kind == "cpu"), default=None)


def _hop(machine: Machine, at: int) -> Hop:
    """From the processor to a device, by its link; from a disk to a processor."""
    if machine.devices[at].kind == "cpu":
        return Hop(1 / DISK, name="disk")
    hosts = [i for i, d in enumerate(machine.devices) if d.kind == "cpu" and i != at]
    ways = [way for way in (machine.way(i, at) for i in hosts) if way is not None]
    best = max((way.bandwidth for way in ways), default=PCIE)
    return Hop(1 / min(best, 1e15), name="memory")
