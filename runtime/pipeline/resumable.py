"""Training that can be left and gone on with: its state in memory, as a folder, in a module."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.runtime.pipeline import checkpoint
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.trained import TrainedStage
from dfc.runtime.pipeline.training_state import (
    Slots,
    State,
    on_host,
    optimizer_state,
    restore,
    slots_of,
    write_into,
)

if TYPE_CHECKING:
    import torch


class Resumable:
    """What all trainers keep between two steps: weights, optimizers' slots, and where they are."""

    model: StagedModel
    parameters: dict[str, torch.nn.Parameter]
    trained: list[TrainedStage]
    optimizers: list[torch.optim.Optimizer]
    steps: int
    seed: int

    def zero_grad(self) -> None:
        """Forget the gradients that were added up: those of another state."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer slots and options by the parameters' names, however it was cut."""
        found: dict[str, Any] = on_host(self._state(), copy=True)
        return found

    def load_state_dict(self, state: State) -> None:
        """Go on from a state, made by stages like these or others.

        Raises:  DfcError N075 (exit status 2) for parameters that are missing or of another shape.
        """
        restore(self.parameters, self._buffers(), self.named_slots(), state)
        self.zero_grad()
        self.steps, self.seed = int(state["step"]), int(state["seed"])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the state as a folder, between two steps; an older one there is replaced.

        `model.safetensors` in it is the model's own `state_dict`, by its names and for any program:
        model.load_state_dict(safetensors.torch.load_file("last/model.safetensors")). Buffers that
        the model does not save itself are in it too: then say strict=False.
        Ensures: after `load`, the same stages and program train on as if nothing had been, bit for
                 bit.
        Raises:  DfcError D011.. for a place that cannot be written to, N076 for optimizers' options
                 that are not numbers, words or lists.
        """
        checkpoint.write(Path(folder), on_host(self._state()), self.model.graph)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote, in one process or in several, with these stages or others.

        Raises:  DfcError D020.. for a folder that is no checkpoint or was changed, N075 for one of
                 another model.
        """
        self.load_state_dict(checkpoint.read(Path(folder)))

    def load_into(self, model: torch.nn.Module) -> None:
        """Give a module of PyTorch's the weights as they are now, by their names.

        Raises:  DfcError N075 (exit status 2) for a module that lacks one, or has another shape.
        """
        state = self.state_dict()
        weights = checkpoint.model_state(state["weights"], self.model.graph)
        write_into(model, weights, state["buffers"])

    def _state(self) -> State:
        """The state, whose tensors are those that are trained."""
        weights = {name: p.detach() for name, p in self.parameters.items()}
        slots = optimizer_state(self.named_slots(), self.parameters)
        own = {"weights": weights, "buffers": self._buffers(), **slots}
        return {**own, "step": self.steps, "seed": self.seed}

    def _buffers(self) -> dict[str, torch.Tensor]:
        """The buffers that the model writes to, as the last step left them."""
        return {name: x for t in self.trained for name, x in t.state.items()}

    def named_slots(self) -> Iterable[Slots]:
        """Every parameter that is optimized, with its optimizer and group."""
        return slots_of(self.parameters, self.optimizers)
