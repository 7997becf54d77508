"""The same recipe from Python: each call adds a line of its text, and is checked at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from dfc.errors import DfcError, did_you_mean

if TYPE_CHECKING:
    from dfc.recipe.plan import Plan

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_.*]+")
_PHRASES = ("on", "by", "to", "from_", "into", "except_", "using", "at")
_B = TypeVar("_B", bound="Block")


@dataclass(frozen=True)
class tune:
    """Values to try for an option: `tune(0.1, 0.3)`; the first is the default."""

    choices: tuple[Any, ...]

    def __init__(self, *choices: Any) -> None:
        object.__setattr__(self, "choices", choices)


auto = tune()  # what the pass itself proposes to try


@dataclass(frozen=True)
class Block:
    """Steps in their order. Every call gives a new object; nothing is changed.

    A pass is a method: `.cse(limit=3)` is `.step("cse", limit=3)`.
    """

    lines: tuple[str, ...] = ()

    def _with(self: _B, *lines: str) -> _B:
        return replace(self, lines=(*self.lines, *lines))

    def step(self: _B, verb: str, *operands: Any, **options: Any) -> _B:
        """Add a pass: operands, then options by name.

        `label`, `keep_if` and the phrases `on`, `by`, `to`, `from_`, `into`, `except_`, `using`,
        `at` go into the sentence; everything else is an option of the pass.
        Raises:  DfcError Q001 for an unknown pass, Q002 for an unknown option, Q012 for a value.
        """
        return self._with(_sentence(verb, operands, options))

    def apply(self: _B, *recipes: str, label: str = "", keep_if: str = "") -> _B:
        """Add the steps of other recipes, by name, or of rule sets: `rules(attention, norms)`."""
        words = [_expression(r) for r in recipes]
        return self._with(_labelled(label, f"apply {', '.join(words)}{_keep(keep_if)}"))

    def rules(self: _B, *names: str, **options: Any) -> _B:
        """Add rewrite rules, by set or name: `.rules("attention", "norms")`."""
        return self.step("fuse", *names, **options)

    def revert(self: _B, *labels: str) -> _B:
        """Go back to the graph as it was before a label."""
        return self._with(f"revert {', '.join(map(_word, labels))}")

    def keep(self: _B, label: str = "", *, if_: str) -> _B:
        """Keep what a step did only if it is `faster`, `smaller`, or a comparison holds."""
        return self._with(f"keep {_word(label) + ' ' if label else ''}if {_expression(if_)}")

    def when(
        self: _B,
        condition: str,
        then: Callable[[Block], Block],
        otherwise: Callable[[Block], Block] | None = None,
    ) -> _B:
        """Add steps that are taken if a comparison holds at that point, and others if not."""
        made = [f"when {_expression(condition)} {{", *then(Block()).lines]
        if otherwise is not None:
            made += ["} else {", *otherwise(Block()).lines]
        return self._with(*made, "}")

    def verify(self: _B, mode: str = "each", **options: Any) -> _B:
        """Say how the steps that follow are proved: each, end or none."""
        return self._with(f"verify {_word(mode)}{_options(options)}")

    def emit(self: _B, format: str, **options: Any) -> _B:
        """Say what is written beside the package: onnx, graph."""
        return self._with(f"emit {_word(format)}{_options(options)}")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from dfc.rewrite.pass_ import pass_classes

        if name.startswith("_") or name not in pass_classes():
            near = None if name.startswith("_") else did_you_mean(name, [*pass_classes()])
            raise AttributeError(f"recipes have no `{name}`" + (f": {near}" if near else ""))
        return lambda *operands, **options: self.step(name, *operands, **options)


@dataclass(frozen=True)
class Recipe(Block):
    """A recipe, built step by step, and checked with every step.

    `str(recipe)` is its text, as `dfc fmt` writes it; `recipe.plan()` is what it becomes.

    >>> import dfc
    >>> small = (
    ...     dfc.recipe("small")
    ...     .minimize("latency(p50)")
    ...     .require("size <= 100MiB")
    ...     .apply("simplify")
    ...     .rules("attention", "norms", except_="head.**")
    ...     .step("cse", label="q", limit=dfc.recipe.tune(3, 4))
    ...     .when("latency(q) > latency(fuse)", lambda r: r.revert("q"))
    ...     .emit("onnx", opset=21)
    ... )
    >>> print(small)
    dfc 1
    <BLANKLINE>
    recipe small {
      minimize latency(p50)
      require size <= 100MiB
      apply simplify
      fuse attention, norms except "head.**"
      q: cse with limit=tune(3, 4)
      when latency(q) > latency(fuse) {
        revert q
      }
      emit onnx with opset=21
    }
    <BLANKLINE>
    """

    name: str = "main"
    head: tuple[str, ...] = ()  # lines before the recipe
    aim: str = ""
    bases: tuple[str, ...] = field(default=())

    def _with(self: _B, *lines: str) -> _B:
        return replace(self, lines=(*self.lines, *lines))._checked()  # type: ignore[no-any-return]

    def _before(self, line: str) -> Recipe:
        return replace(self, head=(*self.head, line))._checked()

    def _checked(self) -> Recipe:
        self.plan()
        return self

    # What it is for

    def minimize(self, quantity: str) -> Recipe:
        """Say what is to become small; several goals count in their order."""
        return self._with(f"minimize {_expression(quantity)}")

    def maximize(self, quantity: str) -> Recipe:
        """Say what is to become large."""
        return self._with(f"maximize {_expression(quantity)}")

    def require(self, comparison: str) -> Recipe:
        """Say what must hold in the end: `top1 >= baseline - 0.5pp`."""
        return self._with(f"require {_expression(comparison)}")

    def doc(self, text: str) -> Recipe:
        """Say in words what the recipe is for."""
        return self._with(json.dumps(text))

    # What stands before it

    def imports(self, path: str) -> Recipe:
        """Use another file's recipes, targets and rules: `std/...` or `rules/...`."""
        return self._before(f"import {json.dumps(path)}")

    def data(self, *names: str) -> Recipe:
        """Name data that the caller passes: `dfc.compile(..., data={"calib": ...})`."""
        return self._before(f"data {', '.join(map(_word, names))}")

    def metric(self, name: str, on: str = "", *, better: str) -> Recipe:
        """Name a metric that the caller passes; `better` is higher or lower."""
        where = f" on {_word(on)}" if on else ""
        return self._before(f"metric {_word(name)}{where}, {_word(better)} is better")

    def target(
        self, name: str, devices: Mapping[str, str], links: Mapping[str, str] | None = None
    ) -> Recipe:
        """Describe what it is compiled for, and aim at it.

        `devices` are `{"gpu0": "cuda(mem=16GiB)"}`, `links` `{"gpu0 <-> host": "pcie(bw=25GB/s)"}`.
        """
        lines = [f"target {_word(name)} {{"]
        lines += [f"device {_word(d)} : {_expression(what)}" for d, what in devices.items()]
        for ends, what in (links or {}).items():
            found = re.fullmatch(r"\s*(\w+)\s*(<->|->)\s*(\w+)\s*", ends)
            a, arrow, b = found.groups() if found else _no_link(ends)
            lines.append(f"link {_word(a)} {arrow} {_word(b)} : {_expression(what)}")
        made = replace(self, head=(*self.head, "\n".join([*lines, "}"])), aim=_word(name))
        return made._checked()

    def extends(self, *bases: str) -> Recipe:
        """Begin with the steps, goals and requirements of other recipes."""
        return replace(self, bases=(*self.bases, *map(_word, bases)))._checked()

    # What it becomes

    def plan(self, settings: Mapping[str, str] | None = None) -> Plan:
        """The recipe, resolved.

        Raises:  DfcError with everything that is wrong.
        """
        from dfc.lang.source import Source
        from dfc.recipe.resolve import resolve

        return resolve(Source(str(self), f"<{self.name}>"), name=self.name, settings=settings)

    def __str__(self) -> str:
        from dfc.lang.format import format_text

        aim = f" for {self.aim}" if self.aim else ""
        bases = f" extends {', '.join(self.bases)}" if self.bases else ""
        head = f"recipe {self.name}{aim}{bases} {{"
        text = "\n".join(["dfc 1", *self.head, head, *self.lines, "}"])
        return format_text(text, f"<{self.name}>")


def recipe(name: str = "main") -> Recipe:
    """A recipe to which steps are added: see `Recipe`."""
    return Recipe(name=_word(name))


def _sentence(verb: str, operands: tuple[Any, ...], options: dict[str, Any]) -> str:
    from dfc.rewrite.pass_ import pass_classes

    cls = pass_classes().get(verb)
    if cls is None:
        raise DfcError("Q001", f"unknown pass `{verb}`", help=did_you_mean(verb, [*pass_classes()]))
    from dfc.recipe.options import fields_of

    hints = fields_of(cls)
    words = [verb]
    if operands:
        words.append(_operands(operands, hints.get(cls.phrases.get("", ""))))
    for key in _PHRASES:
        if key in options and key not in hints:
            word = key.rstrip("_")
            value = options.pop(key)
            some = value if isinstance(value, (tuple, list)) else (value,)
            words.append(f"{word} {_operands(tuple(some), hints.get(cls.phrases.get(word, '')))}")
    label, keep = options.pop("label", ""), options.pop("keep_if", "")
    given = {k: _value(v, hints.get(k)) for k, v in options.items()}
    return _labelled(label, " ".join(words) + _keep(keep) + _options(given, as_text=True))


def _operands(operands: tuple[Any, ...], hint: Any) -> str:
    return ", ".join(_value(o, hint) for o in operands)


def _value(x: Any, hint: Any) -> str:
    """A value of Python as recipe text, knowing what the option wants."""
    from dfc.lang.selectors import Selector
    from dfc.lang.wording import value_text

    if isinstance(x, tune):
        return f"tune({', '.join(_value(c, hint) for c in x.choices)})" if x.choices else "auto"
    if isinstance(x, (tuple, list)):
        return f"[{', '.join(_value(i, hint) for i in x)}]"
    if isinstance(x, str) and "Selector" in str(hint):
        return json.dumps(x) if _PATH.fullmatch(x) else _expression(x)
    if isinstance(x, str) and _is_number(hint):
        return _expression(x)  # with a unit: "12GiB"
    if isinstance(x, float) and (x != x or x in (float("inf"), float("-inf"))):
        raise DfcError("Q012", f"a recipe cannot say {x}")
    if x is None or isinstance(x, (bool, int, float, str, Selector)):
        return value_text(x)
    name = _dtype_name(x)
    if name is None:
        raise DfcError("Q012", f"a recipe cannot say a {type(x).__name__}: {x!r:.60}")
    return name


def _is_number(hint: Any) -> bool:
    import typing

    parts = {hint, *typing.get_args(hint)}
    return bool(parts & {int, float}) and str not in parts


def _dtype_name(x: Any) -> str | None:
    """`bf16` of torch.bfloat16, or of dfc's own."""
    from dfc.ir.types import DTYPES, DType

    if isinstance(x, DType):
        return x.name
    text = str(x).removeprefix("torch.")
    return next((d.name for d in DTYPES.values() if d.torch_name == text), None)


def _options(options: Mapping[str, Any], as_text: bool = False) -> str:
    given = [f"{_word(k)}={v if as_text else _value(v, None)}" for k, v in options.items()]
    return f" with {', '.join(given)}" if given else ""


def _keep(condition: str) -> str:
    return f" keep if {_expression(condition)}" if condition else ""


def _labelled(label: str, text: str) -> str:
    return f"{_word(label)}: {text}" if label else text


def _word(text: str) -> str:
    """A name, and nothing that could be more than one."""
    if not isinstance(text, str) or not _WORD.fullmatch(text):
        raise DfcError("Q013", f"{text!r:.60} is no name", help="letters, digits and _")
    return text


def _expression(text: str) -> str:
    """One expression, and nothing that could be more."""
    from dfc.lang.reader import parse_expression
    from dfc.lang.source import Source
    from dfc.lang.wording import expression_text

    return expression_text(parse_expression(Source(str(text), "<recipe>")))


def _no_link(ends: str) -> Any:
    raise DfcError("Q013", f"{ends!r:.60} is no link", help='write "gpu0 <-> host" or "a -> b"')
