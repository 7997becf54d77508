"""Options of optimizers, group by group, as other processes are told of them.

An optimizer of the trainer's own process stands for those of the ranks: what a script, or a
scheduler of PyTorch's, changes in it is told to them before the next step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError, did_you_mean
from dfc.runtime.pipeline.named_factory import tupled

if TYPE_CHECKING:
    import torch

Options = dict[str, Any]


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


def options_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[Options]:
    """The options of each group of the first one."""
    groups = optimizers[0].param_groups
    return [{k: v for k, v in g.items() if k != "params"} for g in groups]


def changed_options(before: Sequence[Options], now: Sequence[Options]) -> list[Options]:
    """What has changed in each group.

    Raises:  DfcError N073 for what other processes cannot be told.
    """
    found = [
        {k: v for k, v in new.items() if k not in old or old[k] != v}
        for old, new in zip(before, now, strict=True)
    ]
    try:
        json.dumps(found)
    except TypeError as e:
        message = f"an option of the optimizer cannot be told to the ranks: {e}"
        help = "options are numbers, words and lists"
        raise DfcError("N073", message, help=help, status=2) from None
    return found


def apply_options(
    optimizers: Sequence[torch.optim.Optimizer], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Change what `changed_options` found; groups that changed alike stand for all others.

    Raises:  DfcError N073 for a stage whose optimizer has not as many groups.
    """
    alike = all(g == groups[0] for g in groups)
    for optimizer in optimizers:
        own = optimizer.param_groups
        if not alike and len(own) != len(groups):
            raise DfcError("N073", f"{len(groups)} groups of options were changed, and the "
                           f"optimizer of a stage has {len(own)}",
                           help="let the optimizer make as many groups of any parameters",
                           status=2)  # fmt: skip
        for i, group in enumerate(own):
            changed = groups[0] if alike else groups[i]
            group.update({k: tupled(v) for k, v in changed.items()})


def take_options(
    optimizers: Sequence[torch.optim.Optimizer], each: Iterable[Mapping[str, Any]]
) -> None:
    """Take the options on which those of all parameters agree."""
    options = list(each)
    for key, value in options[0].items() if options else ():
        if all(o.get(key) == value for o in options):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group[key] = value
