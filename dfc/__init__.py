"""dfc: a declarative dataflow-graph compiler and runtime for PyTorch models.

graph    = dfc.trace(model, args, kwargs, dynamic_shapes)
compiled = dfc.compile(model, args, kwargs, dynamic_shapes)
compiled(*args, **kwargs);  compiled.report;  compiled.save("m.dfcpkg");  compiled.export("m.onnx")
dfc.load("m.dfcpkg");  dfc.parse(str(graph)) == graph
dfc.plan(graph, "cluster.dfc").stages
dfc.recipe("small").minimize("latency").apply("simplify")
dfc.map_rows(table, "m.dfcpkg")
"""

from __future__ import annotations

import atexit

TYPE_CHECKING = False  # what `typing` has of that name is an import, and `dfc` has none
if TYPE_CHECKING:
    from typing import Any

    from dfc.api import compile, load, parse, plan, trace
    from dfc.compiled import Compiled
    from dfc.errors import DfcError
    from dfc.explaining import explain
    from dfc.ir.graph import Graph
    from dfc.ir.op import Op
    from dfc.lang.selectors import Selector
    from dfc.ops.custom import op
    from dfc.planning.custom import engine
    from dfc.recipe.build import recipe
    from dfc.recipe.layers import sensitivity
    from dfc.recipe.requirements import RequirementMissed
    from dfc.rewrite.custom import pass_
    from dfc.rewrite.pass_ import CHANGES, EXACT, Context, Data, Pass, close
    from dfc.rows.tables import map_rows

__version__ = "0.1.0"
__all__ = [
    "CHANGES", "EXACT", "Compiled", "Context", "Data", "DfcError", "Graph", "Op", "Pass",
    "RequirementMissed", "Selector", "close", "compile", "engine", "explain", "load",
    "map_rows", "op", "parse", "pass_", "plan", "recipe", "sensitivity", "trace",
]  # fmt: skip

_HOMES = {
    "compile": "dfc.api",
    "load": "dfc.api",
    "map_rows": "dfc.rows.tables",
    "parse": "dfc.api",
    "plan": "dfc.api",
    "trace": "dfc.api",
    "Compiled": "dfc.compiled",
    "DfcError": "dfc.errors",
    "RequirementMissed": "dfc.recipe.requirements",
    "explain": "dfc.explaining",
    "sensitivity": "dfc.recipe.layers",
    "Graph": "dfc.ir.graph",
    # for those who write passes, ops and engines
    "CHANGES": "dfc.rewrite.pass_",
    "Context": "dfc.rewrite.pass_",
    "Data": "dfc.rewrite.pass_",
    "EXACT": "dfc.rewrite.pass_",
    "Op": "dfc.ir.op",
    "Pass": "dfc.rewrite.pass_",
    "Selector": "dfc.lang.selectors",
    "close": "dfc.rewrite.pass_",
    "engine": "dfc.planning.custom",
    "op": "dfc.ops.custom",
    "pass_": "dfc.rewrite.custom",
}


def __getattr__(name: str) -> Any:
    """Load the API when it is first used, so that `import dfc` stays fast."""
    import importlib

    if name == "recipe":  # a package that can be called
        return importlib.import_module("dfc.recipe")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'dfc' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    """What completion offers: the names that are for users, loaded or not."""
    return sorted({*globals(), *__all__})


@atexit.register
def _end() -> None:
    """After Ctrl-C a script that uses dfc ends soon."""
    from dfc.ending import end_soon

    end_soon()
