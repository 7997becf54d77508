"""Recipes: what a user wants, resolved, checked, run and told.

The package can be called: `dfc.recipe("small")` begins a recipe in Python. Being called is how a
package and a function share the one name that users expect of both.
"""

from __future__ import annotations

import sys
from types import ModuleType

from dfc.recipe.build import Recipe, auto, recipe, tune

__all__ = ["Recipe", "auto", "recipe", "tune"]


class _Callable(ModuleType):
    def __call__(self, name: str = "main") -> Recipe:
        return recipe(name)


sys.modules[__name__].__class__ = _Callable
