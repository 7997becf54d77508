"""What is known while the statements of one recipe are read: labels, goals, where we are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dfc.lang.source import Source
from dfc.recipe import plan as p


@dataclass(frozen=True)
class Stretch:
    """What a label stands for: the labels, in the plan, of its first and last step."""

    first: str
    last: str


@dataclass
class Frame:
    """The labels that one recipe's text may use.

    A step without a label is known by its verb. What an applied recipe calls its steps can be
    used from outside as well, unless two of them use one name.
    """

    own: dict[str, Stretch] = field(default_factory=dict)
    bare: dict[str, int] = field(default_factory=dict)  # verb -> how many steps have no other name
    borrowed: dict[str, Stretch | None] = field(default_factory=dict)

    def find(self, name: str) -> Stretch | None:
        return self.own.get(name) or self.borrowed.get(name)

    def known(self) -> list[str]:
        return [*self.own, *(b for b in self.borrowed if b not in self.own)]

    def twice(self, name: str) -> int:
        """How many steps a name could mean, when that is more than one; else 0."""
        if name in self.own:
            count = self.bare.get(name, 0)
            return count if count > 1 else 0
        return 2 if name in self.borrowed and self.borrowed[name] is None else 0


@dataclass
class Scope:
    """The state of resolving one recipe."""

    source: Source
    applied: tuple[str, ...]  # the recipes that we are inside of
    frame: Frame = field(default_factory=Frame)
    taken: dict[str, int] = field(default_factory=dict)  # labels of the plan, how often wanted
    goals: list[p.Goal] = field(default_factory=list)
    requirements: list[p.Test] = field(default_factory=list)
    steps: int = 0

    def fresh(self, wanted: str) -> str:
        """A label that no step of the plan has yet."""
        name = wanted
        while name in self.taken:
            self.taken[wanted] += 1
            name = f"{wanted}_{self.taken[wanted]}"
        self.taken[name] = 1
        return name

    @contextmanager
    def applying(self, name: str, source: Source) -> Iterator[None]:
        """Read another recipe's statements, which know their own labels only."""
        outer = (self.source, self.applied, self.frame, self.goals, self.requirements)
        self.source, self.applied, self.frame = source, (*self.applied, name), Frame()
        self.goals, self.requirements = [], []  # its steps are applied, not its wishes
        yield
        inner = self.frame
        self.source, self.applied, self.frame, self.goals, self.requirements = outer
        for label in inner.known():
            found = inner.find(label)
            known = self.frame.borrowed.setdefault(label, found)
            if known != found:
                self.frame.borrowed[label] = None

    @contextmanager
    def extending(self, name: str, source: Source) -> Iterator[None]:
        """Read a base's statements, which share labels, goals and requirements with ours."""
        outer = self.source, self.applied
        self.source, self.applied = source, (*self.applied, name)
        yield
        self.source, self.applied = outer
