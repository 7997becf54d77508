"""A wrong rewrite as a folder that shows it again: `dfc run FOLDER` does, on any machine.

    manifest.json        closed list of files with sha256
    README.txt           what was wrong, and how to see it again
    graph.dfc            the part of the graph around it
    weights.safetensors  the weights that this part reads
    probe.safetensors    what it read on the probe, what the original gave, what the witness gave
    recipe.dfc           the one step that goes wrong
    rules/NAME.dfc       the user's rules, when it was one of them

Graphs, numbers and rules, never code; rules are read as they are, wrong as they may be.

D060  a folder that no reproducers can be written to
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.types import TensorType
from dfc.ir.verify import verify
from dfc.ir.weights import write_safetensors
from dfc.lang.graph_parser import parse_graph
from dfc.lang.source import Source
from dfc.manifest import check_manifest, read_file, write_manifest
from dfc.package import attach_held, read_probes, write_probes
from dfc.publish import publish_folder
from dfc.recipe.plan import PassStep, Plan, VerifyStep
from dfc.rewrite.pass_ import EXACT, Numerics, Pass, close
from dfc.rewrite.read_rules import rules_of
from dfc.rewrite.rule import RuleSet
from dfc.rewrite.rulesets import instead, shipped_sets
from dfc.rewrite.verdicts import LeftOut

if TYPE_CHECKING:
    from dfc.rewrite.blame import Fault, OnFault, Wrong
    from dfc.rewrite.reduce import Case

KIND = "reproducer"
VARIABLE = "DFC_REPRODUCERS"  # a folder, or "none"
MAX_BYTES = 64 << 20  # of weights and values; more is not written
MAX_FOLDERS = 200  # in one place; after that nothing more is written


def default_folder() -> Path | None:
    """Where reproducers go: $DFC_REPRODUCERS, else the user's cache; None for nowhere."""
    chosen = os.environ.get(VARIABLE)
    if chosen == "none":
        return None
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "dfc" / "reproducers"


def writer(folder: str | os.PathLike[str] | None = None) -> OnFault:
    """What `run_passes` calls with a fault: writes it down and says where.

    A fault that cannot be written costs nothing but its reproducer: the answer says why.
    """
    place = default_folder() if folder is None else Path(folder)
    if str(place) == "none":
        place = None

    def write(fault: Fault) -> str:
        if place is None:
            return ""
        try:
            return str(write_reproducer(fault, place))
        except DfcError as e:
            return f"(not written: {e.message})"

    return write


def write_reproducer(fault: Fault, place: Path) -> Path:
    """Reduce a fault and publish it below a folder.

    Raises:  DfcError D060 when it is too large, does not happen again or there are too many;
             D010..D013 when it cannot be written.
    """
    from dfc.rewrite.reduce import reduce

    case = reduce(fault)
    if case is None:
        raise DfcError("D060", "it does not happen again on the values around it")
    size = _bytes_of(case)
    if size > MAX_BYTES:
        raise DfcError("D060", f"it needs {size} bytes of numbers, the limit is {MAX_BYTES}")
    rules = fault.rule.source if fault.rule is not None else None
    shipped = fault.rule is None or fault.rule.set in shipped_sets()
    texts = {"graph.dfc": str(case.graph), "recipe.dfc": _recipe(case)}
    if rules is not None and not shipped:
        texts[f"rules/{fault.rule.set}.dfc"] = rules.text
    name = f"repro-{_digest(texts, case.probe.inputs)}"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = [p.name for p in place.iterdir() if p.name.startswith("repro-")]
    except OSError as e:
        raise DfcError("D060", f"`{place}`: {(e.strerror or str(e)).lower()}", status=7) from e
    final = place / name
    if name in held:
        return final
    if len(held) >= MAX_FOLDERS:
        raise DfcError("D060", f"`{place}` holds {len(held)} already", help="remove old ones")
    left_out = dataclasses.replace(fault.left_out, reproducer=str(final))
    with publish_folder(final, expect_bytes=size + 1_000_000) as temp:
        _fill(temp, case, texts, left_out)
    return final


def _fill(temp: Path, case: Case, texts: dict[str, str], left_out: LeftOut) -> None:
    for name, text in texts.items():
        path = temp / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    weights = {n: p for n, p in case.graph.parameters.items() if p.data is not None}
    types: Any = {n: p.type for n, p in weights.items()}
    numbers = (p.data.tensor() for p in weights.values() if p.data is not None)
    write_safetensors(temp / "weights.safetensors", types, numbers)
    write_probes(temp / "probe.safetensors", [case.probe])
    (temp / "README.txt").write_text(_readme(left_out), encoding="utf-8")
    write_manifest(temp, KIND, {"seed": case.seed, "promised": str(case.promised)})


def _bytes_of(case: Case) -> int:
    import torch

    values = [*case.probe.inputs, *(case.probe.original or ()), *(case.probe.witness or ())]
    held = [p.data.tensor() for p in case.graph.parameters.values() if p.data is not None]
    return sum(x.nbytes for x in (*values, *held) if isinstance(x, torch.Tensor))


def _digest(texts: dict[str, str], inputs: Sequence[Any]) -> str:
    import torch

    from dfc.ir.weights import tensor_sha256

    digest = hashlib.sha256(repr(sorted(texts.items())).encode())
    for x in inputs:
        said = tensor_sha256(x) if isinstance(x, torch.Tensor) else repr(x)
        digest.update(said.encode())
    return digest.hexdigest()[:16]


def _recipe(case: Case) -> str:
    """The step as a recipe, proved as it was."""
    step = case.step
    options: dict[str, Any] = {}
    if dataclasses.is_dataclass(step):
        for f in dataclasses.fields(step):
            value = getattr(step, f.name)
            if value != f.default:
                options[f.name] = value
    rtol = max(case.rtol, case.promised.rtol)
    given = {k: v for k, v in (("atol", case.atol), ("rtol", rtol)) if v}
    steps = (PassStep(step.name, step.name, options), VerifyStep("each", given))
    return str(Plan("reproducer", steps))


def _readme(left_out: LeftOut) -> str:
    story = "\n".join(left_out.lines())
    return (
        f"A rewrite that dfc found to be wrong.\n\n{story}\n\n"
        "To see whether it still is:\n\n    dfc run THIS_FOLDER\n\n"
        "It exits with 4 while the rewrite is wrong and with 0 when it no longer is. graph.dfc is\n"
        "the part of the graph around it, recipe.dfc the step; nothing here is code.\n"
        "With a pass of your own: dfc run THIS_FOLDER --use YOUR_PASSES.py\n"
    )


# Replaying


@dataclass(frozen=True)
class Replay:
    """What came of running a reproducer: how it is wrong, or None when it is no longer."""

    step: str
    nodes: int
    wrong: Wrong | None
    notes: tuple[str, ...] = ()

    @property
    def happens(self) -> bool:
        return self.wrong is not None


def replay(path: str | os.PathLike[str]) -> Replay:
    """Run a reproducer: the step on the graph, judged against what the graph gives here.

    Raises:  DfcError D family for a folder that is damaged or no reproducer, P, R, Q and V for
             texts that are wrong; K020 when the graph itself does not run here.
    """
    from safetensors import SafetensorError

    folder = Path(path)
    manifest = check_manifest(folder, kind=KIND)
    names = [e["path"] for e in manifest["files"]]
    missing = {"graph.dfc", "recipe.dfc", "weights.safetensors", "probe.safetensors"} - set(names)
    if missing:
        raise DfcError("D024", f"`{folder}` lacks `{min(missing)}`")

    def text(name: str) -> str:
        return _utf8(read_file(folder, manifest, name), folder / name)

    graph = parse_graph(text("graph.dfc"), str(folder / "graph.dfc"))
    try:
        verify(graph)
    except DfcError as e:
        raise DfcError.of(e.diagnostics, status=2) from e
    try:
        attach_held(graph, folder / "weights.safetensors")
    except SafetensorError as e:
        raise DfcError("D044", f"{folder / 'weights.safetensors'}: {e}") from e
    probe = _probe(folder / "probe.safetensors", graph)
    sets = [
        rules_of(Source(text(n), str(folder / n)), Path(n).stem)
        for n in names
        if n.startswith("rules/") and n.endswith(".dfc")
    ]
    promised = _promised(manifest["extra"].get("promised"), folder)
    return _replayed(graph, probe, sets, Source(text("recipe.dfc"), str(folder / "recipe.dfc")),
                     promised, manifest["extra"].get("seed"))  # fmt: skip


def _replayed(
    graph: Graph, probe: Any, sets: Sequence[RuleSet], recipe: Source, promised: Numerics, seed: Any
) -> Replay:
    from dfc.rewrite.agree import judge
    from dfc.rewrite.reduce import Case, recompute

    with ExitStack() as stack:
        for rules in sets:
            stack.enter_context(instead(rules))
        step, allowed = _step(recipe)
        start = seed if type(seed) is int else 0
        here = recompute(graph, probe, start)
        notes = []
        assert here.original is not None
        if not judge(here.original, probe.original, probe.witness).agrees:
            notes.append("the graph itself gives other results here than where this was written")
        case = Case(graph, step, here, promised, seed=start, **allowed)
        return Replay(str(step), len(graph), case.wrong(), tuple(notes))


def _step(recipe: Source) -> tuple[Pass, dict[str, float]]:
    from dfc.recipe.resolve import resolve

    plan = resolve(recipe)
    passes = [s for s in plan.steps if isinstance(s, PassStep)]
    proofs = [s for s in plan.steps if isinstance(s, VerifyStep)]
    if len(passes) != 1 or len(proofs) > 1:
        raise DfcError("D044", f"{recipe.file}: a reproducer has one step and its proof")
    options = proofs[0].options if proofs else {}
    allowed = {k: float(v) for k, v in options.items() if k in ("atol", "rtol")}
    return passes[0].build({}), allowed


def _promised(text: Any, folder: Path) -> Numerics:
    if text == "exact":
        return EXACT
    if text == "changes":
        return Numerics("changes")
    try:
        return close(float(str(text).removeprefix("close(").removesuffix(")")))
    except ValueError:
        raise DfcError("D044", f"{folder}: `{text}` is no promise of a pass") from None


def _probe(path: Path, graph: Graph) -> Any:
    """The one probe, which must fit the graph."""
    from safetensors import SafetensorError

    try:
        probes = read_probes(path)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, SafetensorError) as e:
        raise DfcError("D044", f"{path} holds what dfc does not write: {e}") from e
    if len(probes) != 1 or len(probes[0].inputs) != len(graph.inputs):
        raise DfcError("D044", f"{path} does not hold the inputs of the graph")
    counts = {len(probes[0].original), len(probes[0].witness), len(graph.result.inputs)}
    if len(counts) > 1:
        raise DfcError("D044", f"{path} does not hold the outputs of the graph")
    for v, x in zip(graph.inputs, probes[0].inputs, strict=True):
        if not _is_of(v.type, x):
            raise DfcError("D044", f"{path} holds another type for %{v.name}, which is {v.type}")
    return probes[0]


def _is_of(type: Any, x: Any) -> bool:
    """Whether a value is of a type, whatever its dynamic sizes are."""
    import torch

    if not isinstance(type, TensorType):
        return isinstance(x, (int, float, bool))
    if not isinstance(x, torch.Tensor) or x.dtype != type.dtype.to_torch():
        return False
    sizes = zip(type.shape, x.shape, strict=False)
    return x.dim() == type.rank and all(not isinstance(s, int) or s == n for s, n in sizes)


def _utf8(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DfcError("D044", f"{path} is not UTF-8 text: byte {e.start} is wrong") from None
