"""The user's own metrics and data: there when a recipe names them, callable, and read twice.

    def top1(run, data):           # for `metric top1 on val, higher is better`
        return sum(float((run(x).argmax(-1) == y).float().mean()) for x, y in data) / len(data)

    def sharpness(run):            # for `metric sharpness, lower is better`
        return float(run(torch.ones(1, 8)).std())

`run` is called like the model. A recipe names metrics and data; only the caller can pass them.

Better than one number is one score for each item, from which the number is the mean: then the
original and the result are compared item by item, and the report knows how sure a difference is.
Rows of (sum, weight) do the same for ratios: word errors and words, log-likelihood and tokens.

    def top1(run, data):
        return torch.cat([run(x).argmax(-1) == y for x, y in data])

K040  the user's code raised
K041  what it returned is no number, or another one each time
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dfc.compress.statistics import Paired, paired, pooled
from dfc.errors import DfcError, Diagnostic, Span, did_you_mean
from dfc.lang.selectors import Selector, worst_of
from dfc.origin import failure_of, origin_of
from dfc.recipe.plan import Metric, Plan, Quantity, Test, WhenStep

_QUICK_S = 10.0  # seconds in which a metric is quick: calling it again is no great cost
_REPEATS = 1e-3  # how far two calls may differ, as a part of the number: kernels add in any order


@dataclass(frozen=True)
class UserMetric:
    """A metric as declared, with the function and the data that the caller passed for it."""

    declared: Metric
    function: Callable[..., Any]
    data: Any = None

    def __call__(self, run: Callable[..., Any]) -> float:
        """The number.

        Raises:  DfcError K040 with the line that raised, K041 when it returns no number.
        """
        return self.measured(run).value

    def measured(self, run: Callable[..., Any], original: bool = False) -> Measured:
        """The number, and the scores that it is the mean of where the metric gives them.

        A rewritten model may be infinitely bad: it fails what is required of it. The `original` may
        not, since nothing is worse, and nothing is infinitely good. A metric that is quick is
        called twice for it: one that draws its number would decide by chance.

        Raises:  DfcError K040, K041.
        """
        began = time.monotonic()
        found = self._measured(run, original)
        if original and time.monotonic() - began < _QUICK_S:
            again = self._measured(run, original).value
            if not math.isclose(found.value, again, rel_tol=_REPEATS, abs_tol=_REPEATS**2):
                raise DfcError(
                    "K041",
                    f"metric `{self.declared.name}` returned {found.value:g}, then {again:g}, for "
                    "the same model: nothing can be decided by it",
                    span=_place(self.function),
                    help="draw random numbers from a generator that the function makes, with a "
                    "seed, and go through the same data each time",
                )
        return found

    def _measured(self, run: Callable[..., Any], original: bool) -> Measured:
        name = self.declared.name
        code = getattr(self.function, "__code__", None)
        given = (run, self.data) if self.declared.data else (run,)
        try:
            value = self.function(*given)
        except DfcError as e:
            raise _while_calling(self, e) from e
        except (Exception, SystemExit) as e:
            own = code.co_filename if code else ""
            raise failure_of(e, f"metric `{name}`", own, _called(self)) from e
        try:
            found = _measured(value)
            if math.isinf(found.value) and (
                original or (found.value > 0) == self.declared.higher_is_better
            ):
                of = " for the original model" if original else ""
                raise _Nonsense(f"{found.value}{of}, which nothing can be compared with")
            return found
        except _Nonsense as e:
            message = f"metric `{name}` returned {e}"
            raise DfcError("K041", message, span=_place(self.function), help=_FORMS) from None

    def compared(self, before: Measured, after: Measured) -> Paired | None:
        """Two results item by item, None where there are no items, or not the same number."""
        if before.items is None or after.items is None:
            return None
        if before.items.shape != after.items.shape or len(before.items) < 2:
            return None
        compare = paired if before.items.ndim == 1 else pooled
        return compare(before.items, after.items, higher_is_better=self.declared.higher_is_better)


@dataclass(frozen=True)
class Measured:
    """What a metric says: a number, and one score for each item, or a row of (sum, weight)."""

    value: float
    items: Any = None  # a numpy array of float64


def _while_calling(metric: UserMetric, error: DfcError) -> DfcError:
    """The error of a call of the model, with the metric that made it."""
    note = f"metric `{metric.declared.name}` called the model so"
    told = [replace(d, notes=(*d.notes, note)) for d in error.diagnostics]
    return DfcError.of(told, status=error.status)


def _called(metric: UserMetric) -> str:
    data, model = metric.declared.data, "the model, to be called like it"
    given = f"(run, {data}): {model}, and all of `{data}`" if data else f"(run): {model}"
    return f"it is called as {metric.declared.name}{given}"


_FORMS = "return a number, one score for each item, or rows of (sum, weight)"


class _Nonsense(ValueError):
    """What a metric returned, in words."""


def _measured(value: Any) -> Measured:
    import numpy as np

    if value is None or isinstance(value, (str, bytes)):
        raise _Nonsense("nothing" if value is None else f"the text {value!r:.40}, not a number")
    kind = f"a {type(value).__name__}, not a number"
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    try:
        found = np.asarray(value)
        if found.dtype.kind not in "fiub":
            raise _Nonsense(kind)
        found = found.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as e:
        raise e if isinstance(e, _Nonsense) else _Nonsense(kind) from None
    if found.size == 1:
        number = float(found.reshape(()))
        if number != number:
            raise _Nonsense("nan, not a number")
        return Measured(number)
    return _of_items(found)


def _of_items(found: Any) -> Measured:
    import numpy as np

    shape = list(found.shape)
    if not found.size or not (found.ndim == 1 or (found.ndim == 2 and shape[1] == 2)):
        raise _Nonsense(f"an array of {shape}")
    bad = np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(axis=1))
    if len(bad):
        raise _Nonsense(f"{found[bad[0]].tolist()} for item {int(bad[0])}")
    if found.ndim == 1:
        return Measured(float(found.mean()), found)
    weight = float(found[:, 1].sum())
    if weight <= 0 or found[:, 1].min() < 0:
        raise _Nonsense(f"weights that are not positive: their sum is {weight:g}")
    return Measured(float(found[:, 0].sum()) / weight, found)


def bind(
    plan: Plan, metrics: Mapping[str, Any] | None, data: Mapping[str, Any] | None
) -> dict[str, UserMetric]:
    """The plan's metrics with their functions and data.

    Raises:  DfcError Q051 that names everything that is missing or cannot be used.
    """
    functions, held = dict(metrics or {}), dict(data or {})
    problems = [*_problems(plan, functions, held)]
    if problems:
        raise DfcError.of(problems)
    return {
        m.name: UserMetric(m, functions[m.name], held.get(m.data) if m.data else None)
        for m in used_metrics(plan)
    }


def bind_one(declared: Metric, metrics: Mapping[str, Any], data: Mapping[str, Any]) -> UserMetric:
    """One metric with its function and data.

    Raises:  DfcError Q051.
    """
    if declared.name not in metrics:
        raise DfcError.of([_missing("metric", declared.name, metrics)])
    if declared.data and declared.data not in data:
        raise DfcError.of([_missing("data", declared.data, data)])
    problem = _signature(declared, metrics[declared.name])
    if problem:
        raise DfcError.of([problem])
    held = data.get(declared.data) if declared.data else None
    return UserMetric(declared, metrics[declared.name], held)


def used_metrics(plan: Plan) -> list[Metric]:
    """The metrics that something in the plan is decided by."""
    names = {q.name for q in used_quantities(plan)}
    found = [m for m in plan.metrics if m.name in names]
    return found or list(plan.metrics[:1] if _asks_for_worst(plan) else ())


def _asks_for_worst(plan: Plan) -> bool:
    """Whether a step leaves out the layers that cost the metric most."""
    return any(
        isinstance(x, Selector) and worst_of(x.what)
        for step in plan.passes()
        for x in step.options.values()
    )


def used_quantities(plan: Plan) -> Iterator[Quantity]:
    """Every quantity that goals, requirements and steps speak of."""
    yield from (g.quantity for g in plan.goals)
    for r in plan.requirements:
        yield from r.quantities()
    yield from _in_steps(plan.steps)


def _in_steps(steps: Any) -> Iterator[Quantity]:
    for step in steps:
        keep = getattr(step, "keep", None)
        if keep is not None and isinstance(keep.test, Test):
            yield from keep.test.quantities()
        if isinstance(step, WhenStep):
            yield from step.test.quantities()
            yield from _in_steps(step.then)
            yield from _in_steps(step.otherwise)


def missing(plan: Plan, functions: Collection[str], held: Collection[str]) -> Iterator[Diagnostic]:
    """What a plan needs and is not among the names of what is passed."""
    wanted = _wanted_data(plan)
    yield from (_missing("data", n, held) for n in plan.data if n in wanted and n not in held)
    metrics = (m.name for m in used_metrics(plan))
    yield from (_missing("metric", name, functions) for name in metrics if name not in functions)


def missing_functions(plan: Plan, given: Collection[str]) -> Iterator[Diagnostic]:
    """The functions that steps call and that are not among the names of what is passed."""
    called = dict.fromkeys(
        str(s.options["function"]) for s in plan.passes() if "function" in s.options
    )
    yield from (_missing("function", name, given) for name in called if name not in given)


def _problems(
    plan: Plan, functions: Mapping[str, Any], held: Mapping[str, Any]
) -> Iterator[Diagnostic]:
    yield from missing(plan, functions, held)
    wanted = _wanted_data(plan)
    for name, value in held.items():
        if name in wanted and isinstance(value, Iterator):
            message = f"data `{name}` can be read only once: it is a {type(value).__name__}"
            help = "pass a list, a DataLoader, or anything else that can be iterated again"
            yield Diagnostic("Q051", message, None, help)
    for m in used_metrics(plan):
        problem = _signature(m, functions[m.name]) if m.name in functions else None
        if problem:
            yield problem


def _wanted_data(plan: Plan) -> set[str]:
    """Data that metrics and passes read."""
    values = [v for step in plan.passes() for v in step.options.values()]
    of_metrics = {m.data for m in used_metrics(plan) if m.data}
    return {n for n in plan.data if n in values or n in of_metrics}


def _missing(kind: str, name: str, given: Collection[str]) -> Diagnostic:
    many = {"metric": "metrics", "function": "functions", "data": "data"}[kind]
    how = (
        f'pass {many}={{"{name}": ...}} to dfc.compile, '
        f"or --{kind} {name}=FILE.py:FUNCTION to `dfc compile`"
    )
    near = did_you_mean(name, [*given])
    return Diagnostic("Q051", f"{kind} `{name}` is not passed", None, near or how)


def _signature(m: Metric, function: Any) -> Diagnostic | None:
    given = ("run", "data") if m.data else ("run",)
    shown = f"{m.name}({', '.join(given)})"
    if not callable(function):
        message = f"metric `{m.name}` is a {type(function).__name__}, not a function"
        return Diagnostic("Q051", message, None, f"it is called as {shown}")
    try:
        inspect.signature(function).bind(*given)
    except TypeError:
        message = f"metric `{m.name}` cannot be called as {shown}"
        return Diagnostic("Q051", message, _place(function), "`run` is called like the model")
    except ValueError:  # a builtin says nothing of its arguments
        pass
    return None


def _place(function: Any) -> Span | None:
    """Where the user's function is defined; an object that is called has no such place."""
    return origin_of(function).span() if hasattr(function, "__code__") else None
