"""lark's LALR tables, laid out for a parser that takes a hundred thousand tokens.

Why:  lark's own step looks names up as objects with a slow `==`, raises and wraps; and an operand
      goes through ten levels of precedence, one reduction each, before it is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from dfc.lang.tokens import grammar

START = "document"


class Reduction(NamedTuple):
    """The last `size` values become one, which `rule` makes; `alone` if it is the only value."""

    rule: int
    size: int
    origin: str
    alone: bool


@dataclass(frozen=True)
class Tables:
    """For each state: what a terminal does there (a state to go to, or a reduction), and where
    a complete rule leads. `rules` are lark's, by number."""

    actions: dict[int, dict[str, int | Reduction]]
    gotos: dict[int, dict[str, int]]
    rules: tuple[Any, ...]
    start: int
    end: int
    _tops: dict[tuple[int, int, str], int] = field(default_factory=dict)

    def top(self, below: int, state: int, terminal: str) -> int:
        """The state at hand after all reductions of the one value on top by itself."""
        key = (below, state, terminal)
        found = self._tops.get(key)
        if found is None:
            while True:
                action = self.actions[state].get(terminal)
                if type(action) is not Reduction or not action.alone:
                    break
                state = self.gotos[below][action.origin]
            found = self._tops[key] = state
        return found


@cache
def tables() -> Tables:
    """Those of the grammar, for each process once."""
    from lark.parsers.lalr_analysis import Shift

    lark = grammar()
    table: Any = lark.parser.parser._parse_table
    rules = tuple(lark.rules)
    number = {rule: i for i, rule in enumerate(rules)}
    origins = {str(rule.origin.name) for rule in rules}
    actions: dict[int, dict[str, int | Reduction]] = {}
    gotos: dict[int, dict[str, int]] = {}
    for state, row in table.states.items():
        actions[state], gotos[state] = {}, {}
        for name, (action, argument) in row.items():
            if str(name) in origins:
                gotos[state][str(name)] = argument
            elif action is Shift:
                actions[state][str(name)] = argument
            else:
                actions[state][str(name)] = _reduction(argument, number)
    return Tables(actions, gotos, rules, table.start_states[START], table.end_states[START])


def _reduction(rule: Any, number: dict[Any, int]) -> Reduction:
    size = len(rule.expansion)
    alone = size == 1 and bool(rule.options.expand1) and rule.alias is None
    return Reduction(number[rule], size, str(rule.origin.name), alone)
