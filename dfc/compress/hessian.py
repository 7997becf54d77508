"""How much each weight of a linear layer matters to its output: the layer's Hessian.

For `y = x @ w.T` the squared error of the output after a change d of one row of w is
`d @ H @ d` with H = sum of x x^T over the calibration's tokens: the same for every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.counting import counted
from dfc.errors import DfcError

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01  # of the mean of the diagonal
RETRIES = 3  # each with ten times the damping


class Hessian:
    """Sums over tokens: x x^T in float64 of float32 products, and |x| of each input.

    Memory: 8 * inputs^2 bytes.
    """

    def __init__(self, inputs: int) -> None:
        import torch

        self.sum = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.magnitude = torch.zeros(inputs, dtype=torch.float64)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """One batch: [..., inputs].

        Raises:  DfcError D090 for NaN or infinite activations.
        """
        import torch

        rows = x.reshape(-1, x.shape[-1]).float()
        if not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows)).any(dim=1).sum())
            raise DfcError(
                "D090", f"{bad} of {rows.shape[0]} calibration tokens are NaN or infinite there"
            )
        self.sum += rows.T @ rows
        self.magnitude += rows.abs().sum(dim=0)
        self.tokens += rows.shape[0]

    def lean_on(self, other: Hessian) -> None:
        """Add as many tokens of another's mean as there are inputs; they do not count."""
        self.sum += other.sum * (self.inputs / max(other.tokens, 1))

    def state(self) -> dict[str, Tensor]:
        import torch

        return {
            "sum": self.sum,
            "magnitude": self.magnitude,
            "tokens": torch.tensor(self.tokens),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        self.sum = state["sum"].clone()
        self.magnitude = state["magnitude"].clone()
        self.tokens = int(state["tokens"])

    @property
    def inputs(self) -> int:
        return self.sum.shape[0]

    @property
    def mean_magnitude(self) -> Tensor:
        """mean |x| of each input."""
        return self.magnitude / max(self.tokens, 1)

    @property
    def norm(self) -> Tensor:
        """The Euclidean norm of each input over all tokens."""
        return self.sum.diagonal().sqrt()

    @property
    def dead(self) -> Tensor:
        """The inputs that were 0 for every token."""
        return self.sum.diagonal() == 0

    def loss(self, change: Tensor) -> float:
        """The summed squared error of the outputs when the weights [N, inputs] change by this."""
        import torch

        d = change.to(torch.float64)
        return float(((d @ self.sum) * d).sum())


@dataclass(frozen=True)
class Factor:
    """U, upper triangular, with U^T U = (H + damping)^-1, and the damping it took."""

    upper: Tensor
    damping: float  # as a share of the mean of the diagonal
    order: Tensor  # U's column j stands for this input


def factor(hessian: Hessian, damping: float = DAMPING, by_importance: bool = False) -> Factor:
    """The factor of the inverse with which errors are passed on from input to input.

    Dead inputs stand alone: nothing is passed to or from them. `by_importance` takes the
    inputs in the order of their falling diagonal.
    Raises:  DfcError D091 when all inputs are dead; D092 when no damping helps.
    """
    import torch

    dead = hessian.dead
    if bool(dead.all()):
        help = "calibrate on data that reaches it, or leave the layer out by `except`"
        raise DfcError("D091", f"all its {hessian.inputs} inputs were 0 in calibration", help=help)
    h = (hessian.sum + hessian.sum.T) / 2
    h[dead, dead] = 1
    diagonal = h.diagonal().clone()
    order = torch.arange(hessian.inputs)
    if by_importance:
        order = torch.sort(diagonal, descending=True, stable=True).indices
        h = h[order][:, order]
    mean = float(diagonal[~dead].mean())
    eye = torch.eye(len(h), dtype=h.dtype)
    for attempt in range(RETRIES + 1):
        share = damping * 10**attempt
        # H = R R^T with an upper R, by the lower factor of H back to front; then U = R^-1.
        lower, failed = torch.linalg.cholesky_ex((h + share * mean * eye).flip(0, 1))
        if not bool(failed):
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return Factor(upper.float(), share, order)
    raise DfcError(
        "D092",
        f"its Hessian of {counted(hessian.tokens, 'token')} for {hessian.inputs} inputs cannot be "
        f"inverted, with a damping of {share:g} either",
        help="calibrate on more tokens, or on text that varies more",
    )
