"""What does not fit: by how much, and what would make it fit."""

from __future__ import annotations

from dataclasses import replace

from dfc.errors import DfcError
from dfc.ir.graph import Parameter
from dfc.ir.types import TensorType
from dfc.lang.units import amount_text
from dfc.planning.cost import bytes_of
from dfc.planning.machine import RESERVE, Device, Machine
from dfc.planning.model import Modelled, Wish
from dfc.planning.partition import Effort, partition
from dfc.planning.problem import INFINITE, Problem, loads
from dfc.planning.tier_plan import stream_hops, streamed_instead

_QUICK = Effort(seconds=3.0, gap=0.02)
_ROUNDED = 1.001  # what is told with four digits is still enough
_MOST = 64  # devices that are tried
# Bytes of a quantized weight: its code, and its part of a float32 scale, of a row or of 64 weights.
_QUANTIZED = (("int8", 1.01), ("int4", 0.5625))


def refusal(
    model: Modelled, machine: Machine, wish: Wish, whole: Machine | None = None
) -> DfcError:
    """Why a problem that has no partition has none: N060 (status 6) for too little memory, with
    what would do; N063 when pins and what the devices can run leave nothing. `machine` may be one
    row of the devices of the `whole`."""
    problem = replace(model.problem, objective="memory", idle=True)
    roomy = problem.with_stages([replace(s, memory=INFINITE) for s in problem.slots])
    try:
        least = partition(roomy, _QUICK)
    except DfcError:
        return DfcError(
            "N063", "no partition keeps to the pins, to what stays together, and to what the "
            "devices can run", help="leave some of them out",
        )  # fmt: skip
    held = loads(roomy, least.stage)
    worst = int(held.memory.argmax())
    need, room = float(held.memory[worst]), max(problem.slots[worst].memory, 0.0)
    device = machine.devices[worst]
    total = float(problem.weights.sum()) + sum(size for size, _ in problem.tied)
    what = "parameters, gradients and optimizer state" if wish.trains else "parameters"
    message = (
        f"the model does not fit: its {what} take {_bytes(total)}; the best split leaves "
        f"{_bytes(need)} on `{device.name}`, which has {_bytes(room)} free beside "
        f"{_bytes(model.live)} of activations and a reserve: {_bytes(need - room)} too much"
    )
    lacking = (whole or machine).no_way_back() if wish.trains else None
    if lacking is not None:
        message += f"; gradients have no way from `{lacking[0]}` to `{lacking[1]}`"
        help = f"write a link from `{lacking[0]}` to `{lacking[1]}`, or `<->` in place of `->`"
        return DfcError("N060", message, help=help, status=6)
    ways = [_larger(need, model.live, device), _more(roomy, model, device, len(machine.devices))]
    if wish.trains:
        ways.append(_smaller(wish))
    else:
        ways += [
            _fewer_bits(model, need, room),
            _streamed(model, machine),
            streamed_instead(model, machine),
        ]
    help = "; or ".join(filter(None, ways))
    return DfcError("N060", message, help=f"it would fit with {help}", status=6)


def _bytes(x: float) -> str:
    return amount_text(x, "bytes", decimal=True)  # as devices are sold, and the table tells them


def _larger(need: float, live: float, device: Device) -> str:
    memory = (need + live) / (1 - RESERVE) * _ROUNDED
    return f"{_bytes(memory)} of memory on each device in place of {_bytes(device.memory)}"


def _more(roomy: Problem, model: Modelled, device: Device, count: int) -> str:
    """How many devices like this one would do."""
    room = device.usable - model.live
    if room <= 0 or roomy.pins:
        return ""
    total = float(roomy.weights.sum()) + sum(size for size, _ in roomy.tied)
    like = roomy.slots[-1]
    wanted = max(count + 1, int(total // room))
    for k in (wanted, wanted + 1, wanted + 2, 2 * wanted):
        if k > _MOST:
            break
        tried = partition(roomy.with_stages([replace(like, memory=INFINITE)] * k), _QUICK)
        if tried.value <= room:
            return f"{k} devices like `{device.name}`"
    return ""


def _fewer_bits(model: Modelled, need: float, room: float) -> str:
    """Whether quantized weights would do, by their share of what all weights take."""
    nodes = (n for group in model.groups for n in group)
    weights = {v: v.type for n in nodes for v in n.operands if isinstance(v, Parameter)}
    total = sum(bytes_of(v, model.sizes) for v in weights)
    for name, each in _QUANTIZED:
        saved = sum(
            bytes_of(v, model.sizes) * max(0.0, 1 - each / t.dtype.itemsize)
            for v, t in weights.items()
            if isinstance(t, TensorType) and t.dtype.is_float and t.rank > 1
        )
        if need * (total - saved) <= room * total:
            return f"`quantize {name}`, with which its parameters take {_bytes(total - saved)}"
    return ""


def _streamed(model: Modelled, machine: Machine) -> str:
    """What stages would stream, where there are several, and what that takes at least."""
    if machine.devices[1:] and all(slot.memory > 0 for slot in model.problem.slots):
        rates = [1 / float(hop.per_byte) for hop in stream_hops(machine).values()]
        at = model.problem.device_of
        slots = [replace(s, stream=rates[d]) for s, d in zip(model.problem.slots, at, strict=True)]
        rooms = {d: s.memory for d, s in zip(at, slots, strict=True)}
        problem = replace(
            model.problem.with_stages(slots), objective="throughput", idle=not model.problem.looped
        )
        found = partition(problem, _QUICK)
        load = loads(problem, found.stage)
        beyond = [
            f"{_bytes(float(held - rooms[i]))} to `{d.name}`"
            for i, (held, d) in enumerate(zip(load.memory, machine.devices, strict=True))
            if held > rooms[i]
        ]
        largest = [
            max((problem.weights[v] for v, x in enumerate(found.stage) if at[x] == d), default=0.0)
            for d in range(len(rooms))
        ]  # of what comes at once
        if any(held > rooms[d] and largest[d] > rooms[d] for d, held in enumerate(load.memory)):
            return ""
        took = amount_text(load.bottleneck, "time")
        return (
            f"weights that are streamed within the pipeline (`--stream`): {' and '.join(beyond)} "
            f"for each microbatch, one every {took} at best"
        )
    return ""


def _smaller(wish: Wish) -> str:
    return "smaller microbatches" if wish.microbatches else ""
