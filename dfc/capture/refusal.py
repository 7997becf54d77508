"""torch.export's refusals in the user's words: where, why, and what to try."""

from __future__ import annotations

import inspect
import linecache
import re

import torch

from dfc.capture.places import package_path
from dfc.errors import DfcError, Span


def first_line(e: BaseException) -> str:
    text = str(e).strip()
    return text.splitlines()[0] if text else type(e).__name__


def bad_call(model: torch.nn.Module, e: Exception) -> DfcError:
    signature = inspect.signature(model.forward)
    return DfcError(
        "T032",
        f"the arguments do not fit the model's forward: {first_line(e)}",
        help=f"it is called as forward{signature}",
        status=2,
    )


def _user_span(e: BaseException) -> Span | None:
    """The innermost line of the user's code in the traceback."""
    found: Span | None = None
    trace = e.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        short = package_path(file)
        ours = "/dfc/" in file or ("/tests/" in file and "zoo" not in file)
        if not short.startswith(("torch/", "functorch/", "<", "dfc/", "importlib")) and not ours:
            found = Span(short, trace.tb_lineno, text=_source_line(file, trace.tb_lineno))
        trace = trace.tb_next
    return found


def _source_line(file: str, line: int) -> str | None:
    return linecache.getline(file, line).rstrip("\n") or None


def raised_by_user_code(e: Exception) -> bool:
    return not type(e).__module__.startswith("torch")


def user_error(e: Exception) -> DfcError:
    return DfcError(
        "T003",
        f"the model itself fails on the example: {type(e).__name__}: {first_line(e)}",
        span=_user_span(e),
        status=8,
    )


_CAUSES = (
    (
        r"Eq\(u\d+, 1\)|Could not guard on data-dependent|data-dependent",
        "a decision of the model depends on the data of a tensor",
        "use torch.where or torch.cond instead of `if`, or torch._check to state what holds",
    ),
    (
        r"pytree flattening function should be applied to DynamicCache",
        "a cache with layers that are no keys and values, as of state-space models, cannot be "
        "carried from call to call",
        "trace with `use_cache=False`",
    ),
    (
        r"Unsupported input type|not registered|type <class",
        "an argument or result is of a class that torch does not know",
        "register it by torch.export.register_dataclass or torch.utils._pytree",
    ),
    (
        r"autograd|requires_grad|grad can be implicitly",
        "the model differentiates inside forward",
        "use torch.func.grad, or move the gradient out of the model",
    ),
    (
        r"Constraints violated|specialized|not equal to",
        "the model's own code fixes a size that was declared dynamic",
        "drop the dimension from dynamic_shapes",
    ),
)


def counting_norm(model: torch.nn.Module) -> DfcError | None:
    """The refusal of a batch norm that takes the mean over all batches that it has seen."""
    for name, norm in model.named_modules():
        counts = isinstance(norm, torch.nn.modules.batchnorm._BatchNorm) and norm.momentum is None
        if counts and norm.training and norm.track_running_stats:
            return DfcError(
                "T004",
                f"the batch norm `{name or type(norm).__name__}` has momentum=None: what a batch "
                "counts depends on the number of batches before it, which a tensor holds",
                help="give it a number, as momentum=0.1, or call .eval() on it",
            )
    return None


def refusal(e: Exception) -> DfcError:
    """torch.export's refusal in the user's words."""
    if isinstance(e, DfcError):
        return e
    text = str(e)
    reason, help = "torch.export refuses the model", None
    for pattern, why, remedy in _CAUSES:
        if re.search(pattern, text):
            reason, help = why, remedy
            break
    user_code = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', text)
    span = _user_span(e)
    for file, line, source in reversed(user_code):
        short = package_path(file)
        if not short.startswith(("torch/", "functorch/", "<")):
            span = Span(short, int(line), text=source)
            break
    return DfcError("T001", f"{reason}: {first_line(e)}", span=span, help=help)
