"""Options of optimizers, by the parameters' names, as other processes are told of them.

An optimizer of the trainer's own process stands for those of the ranks: what a script, or a
scheduler of PyTorch's, changes in it is told to them before the next step.

Why:  a stage's optimizer need not have the groups that one of all parameters has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError, did_you_mean
from dfc.runtime.pipeline.named_factory import tupled
from dfc.runtime.pipeline.training_state import Slots

if TYPE_CHECKING:
    import torch

Options = dict[str, Any]
Named = Mapping[str, Options]  # of each parameter


def set_options(optimizers: Sequence[torch.optim.Optimizer], values: Mapping[str, Any]) -> None:
    """Change options of all groups.

    Raises:  DfcError N073 for an option that no optimizer has.
    """
    known = sorted({k for o in optimizers for g in o.param_groups for k in g if k != "params"})
    for name in values:
        if name not in known:
            raise DfcError("N073", f"the optimizer has no option `{name}`",
                           help=did_you_mean(name, known) or f"it has {', '.join(known)}",
                           status=2)  # fmt: skip
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(values)


def options_of(slots: Iterable[Slots]) -> Named:
    """The options of each parameter, which are those of its group."""
    return {n: {k: v for k, v in group.items() if k != "params"} for n, _, group in slots}


def changed_options(before: Named, now: Named) -> dict[str, Options]:
    """What has changed for each parameter.

    Raises:  DfcError N073 for what other processes cannot be told.
    """
    found = {
        name: {k: v for k, v in new.items() if k not in before[name] or before[name][k] != v}
        for name, new in now.items()
        if new != before[name]
    }
    try:
        json.dumps(found)
    except TypeError as e:
        message = f"an option of the optimizer cannot be told to the ranks: {e}"
        help = "options are numbers, words and lists"
        raise DfcError("N073", message, help=help, status=2) from None
    return found


def apply_options(slots: Iterable[Slots], changed: Named) -> None:
    """Change what `changed_options` found in the groups of these parameters.

    Raises:  DfcError N073 for a group whose parameters are in several ones elsewhere.
    """
    groups: dict[int, tuple[Options, list[str]]] = {}
    for name, _, group in slots:
        groups.setdefault(id(group), (group, []))[1].append(name)
    for group, (first, *others) in groups.values():
        for other in others:
            if changed.get(other) != changed.get(first):
                raise DfcError(
                    "N073", f"the options of `{first}` and `{other}` are changed apart, and the "
                    "optimizer of their stage has one group for both",
                    help="let the optimizer choose each parameter's group by that parameter alone",
                    status=2,
                )  # fmt: skip
        group.update({k: tupled(v) for k, v in changed.get(first, {}).items()})


def take_options(slots: Iterable[Slots], state: Named) -> None:
    """Take the options of a state."""
    for name, _, group in slots:
        group.update(state.get(name, {}))
