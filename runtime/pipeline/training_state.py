"""What training has made, by the parameters' names alone: it can go on with other stages.

A tied weight is there once. A slot is what an optimizer keeps for a parameter, options are those of
its group (`lr`, `betas`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError

if TYPE_CHECKING:
    import torch

Slots = tuple[str, Any, Any]  # a parameter's name, its optimizer, its group there
State = Mapping[str, Any]  # `weights`, `buffers`, `step`, `seed`, `slots`, `options`


def slots_of(
    parameters: Mapping[str, torch.nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[Slots]:
    """Every parameter that is optimized, with its optimizer and group."""
    names = {id(p): name for name, p in parameters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield names[id(p)], optimizer, group


def optimizer_state(slots: Iterable[Slots], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`slots` and `options` of each parameter; the tensors are the optimizers' own."""
    state: dict[str, Any] = {"slots": {}, "options": {}}
    for name, optimizer, group in slots:
        state["slots"][name] = dict(optimizer.state.get(parameters[name], {}))
        state["options"][name] = {k: v for k, v in group.items() if k != "params"}
    return state


def restore(
    parameters: Mapping[str, torch.nn.Parameter], buffers: Mapping[str, torch.Tensor],
    slots: Iterable[Slots], state: State,
) -> None:  # fmt: skip
    """Write a state into parameters, buffers and optimizers.

    Raises:  DfcError N075 (exit status 2) before anything is written: for another model's, and for
             one of another optimizer.
    """
    import torch

    check_state(state)
    weights = state["weights"]
    refuse_other(parameters, weights)
    held = state.get("buffers", {})
    refuse_other(buffers, {name: x for name, x in held.items() if name in buffers})
    slots = list(slots)
    for name, optimizer, _ in slots:
        refuse_other_optimizer(name, optimizer, state["options"].get(name, {}))
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
        for name, x in buffers.items():
            x.copy_(held[name])
    for name, optimizer, group in slots:
        held = state["slots"].get(name, {})
        group.update(state["options"].get(name, {}))
        optimizer.state[parameters[name]] = _placed(held, parameters[name], group)


def _placed(slots: Mapping[str, Any], like: torch.Tensor, group: Mapping[str, Any]) -> Any:
    """Copies of slots on their parameter's device, as optimizers keep them.

    Source:  torch.optim.Optimizer: `step` stays on the host where kernels are not recorded with it.
    """
    counted = group.get("capturable") or group.get("fused")

    def placed(name: str, x: torch.Tensor) -> torch.Tensor:
        device = like.device if name != "step" or counted else x.device
        return x.detach().to(device, copy=True)

    return {k: placed(k, x) if hasattr(x, "detach") else x for k, x in slots.items()}


def write_into(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]
) -> None:
    """Copy weights into a module's parameters of the same names, and what was written to buffers
    into these; other buffers stay as they are.

    Raises:  DfcError N075 (exit status 2) before anything is written.
    """
    import torch

    parameters = dict(model.named_parameters())
    refuse_other(parameters, {n: x for n, x in weights.items() if n in parameters})
    with torch.no_grad():
        for name, p in parameters.items():
            if p.data_ptr() != weights[name].data_ptr():  # else it was not trained
                p.copy_(weights[name])
        for name, x in model.named_buffers():
            if name in buffers:
                x.copy_(buffers[name])


def check_state(state: object) -> None:
    """
    Raises:  DfcError N075 (exit status 2) for what is no trainer's state.
    """
    if not isinstance(state, Mapping) or not {"weights", "slots", "options"} <= state.keys():
        help = "give what `state_dict()` returned; `load(FOLDER)` reads a checkpoint"
        message = "the state has no weights and slots of optimizers: it is no trainer's"
        raise DfcError("N075", message, help=help, status=2)


def refuse_other(parameters: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """
    Raises:  DfcError N075 (exit status 2) for weights of another model.
    """
    missing = sorted(set(parameters) - set(weights))
    extra = sorted(set(weights) - set(parameters))
    if missing or extra:
        said = f"lacks `{missing[0]}`" if missing else f"has `{extra[0]}`, which the model lacks"
        help = "a model of which other weights are frozen: `load_into` gives it what was trained"
        raise DfcError("N075", f"the state {said}: it is another model's", help=help, status=2)
    for name, p in parameters.items():
        if p.shape != weights[name].shape:
            raise DfcError("N075", f"`{name}` is {list(p.shape)} here and "
                           f"{list(weights[name].shape)} in the state", status=2)  # fmt: skip


def refuse_other_optimizer(
    name: str, optimizer: torch.optim.Optimizer, held: Mapping[str, Any]
) -> None:
    """
    Raises:  DfcError N075 (exit status 2) for options of a parameter that another kind of optimizer
             has. Some more or some less may be its version's, or a scheduler's (`initial_lr`).
    """
    own = optimizer.param_groups[0].keys() - {"params"}
    extra, missing = sorted(held.keys() - own - {"initial_lr"}), sorted(own - held.keys())
    if not extra or not missing:
        return
    raise DfcError(
        "N075", f"the state of `{name}` is another optimizer's: it has `{extra[0]}`, and no "
        f"`{missing[0]}` as {type(optimizer).__name__}",
        help="make the optimizer that it was saved with; for the weights alone load its "
        "`model.safetensors` into the model, and trace that", status=2,
    )  # fmt: skip


def on_host(state: Any, copy: bool = False) -> Any:
    """A state, or a part of one, in this machine's memory: what lies elsewhere is copied, and what
    is there where asked for."""
    if isinstance(state, Mapping):
        return {k: on_host(v, copy) for k, v in state.items()}
    return state.detach().to("cpu", copy=copy) if hasattr(state, "detach") else state
