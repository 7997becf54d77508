"""A trainer's state as a folder: what plain PyTorch loads, and all that training goes on from.

    model.safetensors       the model's weights and buffers, a tied one under each of its names
    optimizer.safetensors   what the optimizers keep: `layers.0.weight/exp_avg`
    training.json           the step, the seed, and the optimizers' options for each weight
    manifest.json           the digests of all

    model.load_state_dict(safetensors.torch.load_file("last/model.safetensors"))

It is written beside its place and renamed: there is always the last one that was complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.types import TensorType
from dfc.ir.weights import write_safetensors
from dfc.manifest import check_manifest, write_manifest
from dfc.publish import publish_folder
from dfc.runtime.pipeline.training_state import State
from dfc.runtime.pipeline.world import World

if TYPE_CHECKING:
    import torch

KIND = "checkpoint"
_WRITING = 1800.0  # seconds in which a rank has written what it has
_MODEL, _OPTIMIZER, _REST = "model.safetensors", "optimizer.safetensors", "training.json"


def write(folder: Path, state: State, model: Graph) -> None:
    """Write a state; an older checkpoint there is replaced.

    Raises:  DfcError D011.. for a place that cannot be written to, N076 for an optimizer whose
             options are not numbers, words or lists.
    """
    slots, numbers = {}, {}
    for name, held in state["slots"].items():
        slots.update({f"{name}/{slot}": x for slot, x in held.items() if hasattr(x, "nbytes")})
        numbers[name] = {s: _plain(x, s) for s, x in held.items() if not hasattr(x, "nbytes")}
    options = {
        name: {key: _plain(x, key) for key, x in group.items()}
        for name, group in state["options"].items()
    }
    buffers = state.get("buffers", {})
    rest = {"step": state["step"], "seed": state["seed"], "weights": list(state["weights"]),
            "buffers": list(buffers), "slots": numbers, "options": options}  # fmt: skip
    weights = model_state({**state["weights"], **buffers}, model)
    size = sum(x.nbytes for x in (*weights.values(), *slots.values()))
    with publish_folder(folder, force=True, expect_bytes=size + 1_000_000) as temp:
        for file, tensors in ((_MODEL, weights), (_OPTIMIZER, slots)):
            types = {name: TensorType.of(x) for name, x in tensors.items()}
            write_safetensors(temp / file, types, iter(tensors.values()))
        (temp / _REST).write_text(json.dumps(rest, indent=1), encoding="utf-8")
        write_manifest(temp, KIND)


def read(folder: Path, names: Collection[str] | None = None) -> State:
    """The state of a folder, or what it says of these weights.

    Raises:  DfcError D020.. for a folder that is no checkpoint, or was changed.
    """
    check_manifest(folder, kind=KIND)
    rest = json.loads((folder / _REST).read_text(encoding="utf-8"))
    chosen = [n for n in rest["weights"] if names is None or n in names]
    slots = {n: dict(rest["slots"][n]) for n in chosen if n in rest["slots"]}
    with safe_open(folder / _OPTIMIZER, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, _, slot = key.rpartition("/")
            if name in slots:
                slots[name][slot] = file.get_tensor(key)
    with safe_open(folder / _MODEL, framework="pt") as file:
        weights = {n: file.get_tensor(n) for n in chosen}
        buffers = {n: file.get_tensor(n) for n in rest.get("buffers", ())}
    options = {n: {k: _tupled(x) for k, x in group.items()} for n, group in rest["options"].items()}
    return {**rest, "weights": weights, "buffers": buffers, "slots": slots, "options": options}


def write_together(folder: Path, state: State, model: Graph, world: World, key: str) -> None:
    """Every rank's state as one; all ranks call it, and none returns before it is there.

    Needs:   a folder that all ranks see; `key` is a name in the store that is used once.
    Raises:  as `write`; on every rank what was wrong on one.
    """
    own = folder.with_name(f"{folder.name}.rank{world.rank}")
    parts = [folder.with_name(f"{folder.name}.rank{r}") for r in range(1, world.size)]
    with _told(world, f"{key}/parts"):
        if world.rank:
            write(own, state, Graph())  # its own weights alone
    with _told(world, f"{key}/whole"):
        if not world.rank:
            write(folder, _merged([state, *map(read, parts)]), model)
            for part in parts:
                shutil.rmtree(part)


@contextmanager
def _told(world: World, key: str) -> Iterator[None]:
    """All ranks do something; whoever fails tells the others.

    Raises:  DfcError, of this rank or of another.
    """
    try:
        yield
    except DfcError as e:
        world.share(key, [e.code, f"rank {world.rank}: {e.message}", e.status])
        raise
    for found in world.share(key, [], _WRITING):
        if found:
            raise DfcError(found[0], found[1], status=found[2])


def _merged(states: Sequence[State]) -> State:
    merged = dict(states[0])
    for part in ("weights", "buffers", "slots", "options"):
        merged[part] = {name: x for s in states for name, x in s[part].items()}
    return merged


def model_state(weights: Mapping[str, torch.Tensor], model: Graph) -> dict[str, torch.Tensor]:
    """The model's `state_dict`: these weights under all their names, and what is not trained."""
    found = dict(weights)
    for p in model.parameters.values():
        x = weights.get(p.name)
        if x is None and p.data is not None and p.kind != "constant":
            x = p.data.tensor()
        if x is not None:
            found.update(dict.fromkeys((p.name, *p.aliases), x))
    return found


def _plain(x: Any, what: str) -> Any:
    """
    Raises:  DfcError N076 for what JSON cannot say.
    """
    if isinstance(x, (tuple, list)):
        return [_plain(item, what) for item in x]
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise DfcError(
        "N076", f"the optimizer's `{what}` is a {type(x).__name__}, which a checkpoint cannot hold",
        help="give a number, or keep `state_dict()` yourself", status=2,
    )  # fmt: skip


def _tupled(x: Any) -> Any:
    return tuple(map(_tupled, x)) if isinstance(x, list) else x
