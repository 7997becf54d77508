"""What scripts do with a trainer whose ranks are processes, beside one with threads."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

import dfc
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.types import TensorType
from dfc.runtime.pipeline.clipping import norms, together
from dfc.runtime.pipeline.optimizer_options import apply_options, changed_options, options_of
from dfc.runtime.pipeline.training import Trainer
from dfc.runtime.pipeline.training_processes import ProcessTrainer
from dfc.runtime.pipeline.training_state import Slots, slots_of
from tests.test_processes import gone_in_two
from tests.test_training_processes import same
from tests.training_models import by_dimension, captured, evenly, staged

ROOT = Path(__file__).parent.parent
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


class Net(nn.Module):
    """The first layer is frozen, the second drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.third, self.drop = nn.Linear(8, 3), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.third(self.drop(torch.relu(self.second(h))))


def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, y)


def traced() -> tuple[Net, Graph, dict[str, Any]]:
    """The model, its graph, and what trainers of it are told."""
    torch.manual_seed(0)
    model, b = Net(), torch.export.Dim("B", min=1, max=64)
    model.first.requires_grad_(False)
    graph = dfc.trace(model, (torch.randn(10, 6),), dynamic_shapes=({0: b},))
    target = TensorType.of(torch.zeros(1, dtype=torch.long))
    types = (TensorType(target.dtype, graph.inputs[0].tensor_type.shape[:1]),)
    return model, graph, {"loss": loss, "targets": types, "microbatches": 4, "threads": 2}


def batch(items: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(items)
    return torch.randn(items, 6, generator=made), torch.randint(3, (items,), generator=made)


@dataclass
class Both:
    """The same training in threads and in processes."""

    model: Net
    graph: Graph
    options: dict[str, Any]
    threads: Trainer
    processes: ProcessTrainer

    def step(self, items: int = 10) -> None:
        x, y = batch(items)
        assert torch.equal(self.processes.step(x, y), self.threads.step(x, y))
        assert self.processes.norm == self.threads.norm is not None

    def same(self) -> None:
        a, b = self.processes.state_dict(), self.threads.state_dict()
        same(a, b)
        assert a["options"] == b["options"]


def halves(graph: Graph, count: int = 2) -> dict[Node, int]:
    return evenly(graph, count)


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    model, graph, options = traced()
    options |= {"clip": 0.5}
    with (
        Trainer(graph, halves(graph), optimizer=ADAMW, **options) as threads,
        ProcessTrainer(graph, halves(graph), optimizer=ADAMW, **options) as processes,
    ):
        yield Both(model, graph, options, threads, processes)


def test_uneven_batches_long_gradients_and_schedulers(both: Both) -> None:
    """Dropout, targets, a last microbatch that is smaller, clipping, PyTorch's own schedulers."""
    trainers = (both.threads, both.processes)
    schedulers = [OneCycleLR(o, max_lr=0.1, total_steps=20) for t in trainers for o in t.optimizers]
    for items in (10, 7, 3, 1):
        both.step(items)
        for scheduler in schedulers:
            scheduler.step()
    both.same()
    (group,) = both.processes.optimizers[0].param_groups
    assert group["lr"] != 1e-2 and group["betas"] != (0.9, 0.999)
    assert both.processes.norm is not None and both.processes.norm > 0.5  # it was shortened
    both.processes.set_options(lr=2e-3)
    both.threads.set_options(lr=2e-3)
    both.processes.backward(*batch(10))
    both.processes.update()  # as `step` does
    both.threads.step(*batch(10))
    both.same()


class Away(torch.Tensor):
    """A tensor that says that it lies on a device, and whose memory is not to be read here."""

    @property
    def is_cpu(self) -> bool:
        return False

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert args == ("cpu",)
        return self.as_subclass(torch.Tensor).clone()

    def data_ptr(self) -> int:
        raise AssertionError("an address on a device")


def test_a_batch_that_lies_on_a_device_is_sent_from_the_host(both: Both) -> None:
    x, y = batch(10)
    found = both.processes.step(x.as_subclass(Away), y.as_subclass(Away))
    assert torch.equal(found, both.threads.step(x, y))


def test_what_is_frozen_stays_and_is_in_the_model(both: Both) -> None:
    frozen, trained = both.model.first.weight.clone(), both.model.second.weight.clone()
    both.step()
    assert not [n for n in both.processes.state_dict()["weights"] if n.startswith("first")]
    for trainer in (both.processes, both.threads):
        trainer.load_into(both.model)
        trainer.load_state_dict(trainer.state_dict())  # the model has changed since it was traced
    assert torch.equal(both.model.first.weight, frozen)
    assert not torch.equal(both.model.second.weight, trained)


def test_a_failure_names_the_line_of_the_model_and_changes_nothing(both: Both) -> None:
    x, _ = batch(10)
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1)
                if "return F.cross_entropy(out, y)" in text)  # fmt: skip
    for trainer in (both.processes, both.threads):
        with pytest.raises(DfcError, match=rf"test_process_trainer\.py:{line}\)") as e:
            trainer.step(x, torch.full((10,), 99))
        assert e.value.code == "K050" and "Target 99" in e.value.message
        assert "stage 1 failed on microbatch" in e.value.message
    both.step()
    both.same()


def test_what_cannot_be_asked_is_told(both: Both) -> None:
    trainer = both.processes
    trainer.step(*batch(10))
    both.threads.step(*batch(10))
    for code, ask in (
        ("N052", trainer.update),
        ("N078", lambda: trainer.parameters),
        ("N073", lambda: trainer.set_options(lrr=1)),
        ("N075", lambda: trainer.load_state_dict({"weights": {}})),
        ("K015", lambda: trainer.step(*batch(0))),
        ("K012", lambda: trainer.step(batch(4)[0])),
        ("K014", lambda: trainer.step(torch.zeros(4, 5), batch(4)[1])),
    ):
        with pytest.raises(DfcError) as e:
            ask()
        assert e.value.code == code
    state = trainer.state_dict()
    for options in state["options"].values():
        options["momentum"] = options.pop("betas")
    with pytest.raises(DfcError, match=r"N075.*another optimizer's.*no `betas` as AdamW"):
        trainer.load_state_dict(state)
    with pytest.raises(AttributeError, match="nothing"):
        trainer.nothing  # noqa: B018
    both.step()


def test_a_checkpoint_goes_on_with_other_ranks(both: Both, tmp_path: Path) -> None:
    both.step()
    both.processes.save(tmp_path / "last")
    _, graph, options = traced()
    options |= {"clip": 0.5}
    with Trainer(graph, halves(graph, 3), optimizer=ADAMW, **options) as three:
        three.load(tmp_path / "last")
        assert three.steps == both.processes.steps
        for _ in range(2):
            expected = both.processes.step(*batch(10))
            torch.testing.assert_close(three.step(*batch(10)), expected, rtol=1e-5, atol=0)
            both.threads.step(*batch(10))


def test_two_trainers_at_once_each_ends_its_own(tmp_path: Path) -> None:
    """Over gloo, one with `auto`; one is closed, the other is let go."""
    _, graph, options = traced()
    start = partial(ProcessTrainer, graph, halves(graph), optimizer=ADAMW, links="gloo",
                    modules="tests.fair_clock", **options)  # fmt: skip
    first, second = start(), start(schedule="auto")
    try:
        pids = [first.pids, second.pids]
        found = [first.step(*batch(10)), second.step(*batch(10))]
        torch.testing.assert_close(*found)
        first.close()
        first.close()
        assert gone_in_two(pids[0])
        for ask in (lambda: first.step(*batch(10)), first.state_dict, lambda: first.save(tmp_path)):
            with pytest.raises(DfcError, match="closed") as e:
                ask()
            assert e.value.code == "K051"
        second.step(*batch(10))
        del second
        gc.collect()
        assert gone_in_two(pids[1])
    finally:
        first.close()


def children() -> list[int]:
    found = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text()
    return [int(pid) for pid in found.split()]


def is_rank(pid: int) -> bool:
    """Not what else starts processes in this one, such as a compiler that an earlier test used."""
    try:
        return b"dfc.runtime.pipeline" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says who was started")
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_ranks_start_ends_them() -> None:
    _, graph, options = traced()
    before, started = set(children()), set[int]()

    def strike() -> None:
        until = time.monotonic() + 60
        while len(started) < 2 and time.monotonic() < until:
            started.update(pid for pid in set(children()) - before if is_rank(pid))
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=strike)
    with pytest.raises(KeyboardInterrupt):
        thread.start()  # here: whenever it strikes, the interrupt is awaited
        ProcessTrainer(graph, halves(graph), optimizer=ADAMW, **options)
    thread.join()
    assert len(started) == 2 and gone_in_two(list(started))


def _inside() -> Any:
    def made(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 1e-2)

    return made


def test_what_cannot_start_is_told_before_anything_does(tmp_path: Path) -> None:
    _, graph, options = traced()
    (tmp_path / "file").write_text("mine")
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("N077", "a lambda has no name", {"optimizer": lambda p: torch.optim.SGD(p, 1e-2)}),
        ("N077", "`made` is made inside of a function", {"optimizer": _inside()}),
        ("N077", "a str has no name", {"optimizer": "adamw"}),
        ("N077", "Tensor", {"optimizer": partial(torch.optim.SGD, lr=torch.ones(()))}),
        ("N059", "no links `glue`", {"links": "glue"}),
        ("K001", "unknown engine `eagr`", {"engine": "eagr"}),
        ("D011", "file", {"checkpoint": tmp_path / "file"}),
        ("N073", "clip", {"clip": 0.0}),
    ]
    if not torch.cuda.is_available():
        cases += [("K004", "no CUDA device", {"devices": name}) for name in ("cuda", "cuda:0")]
    for code, said, more in cases:
        with pytest.raises(DfcError, match=said) as e:
            ProcessTrainer(graph, halves(graph), **{"optimizer": ADAMW, **options, **more})
        assert e.value.code == code


_NOTEBOOK = """
import torch, dfc
from functools import partial
from dfc.runtime.pipeline.training_processes import ProcessTrainer
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    def forward(self, x):
        return self.b(torch.relu(self.a(x))).square().mean()
graph = dfc.trace(Own(), (torch.randn(8, 4),))
nodes = list(graph.nodes)
stages = {n: 2 * i // len(nodes) for i, n in enumerate(nodes)}
def own(parameters):
    return torch.optim.SGD(parameters, 0.1)
try:
    ProcessTrainer(graph, stages, microbatches=1, optimizer=own)
except dfc.DfcError as e:
    print(e)
optimizer = partial(torch.optim.SGD, lr=0.1)
trainer = ProcessTrainer(graph, stages, microbatches=1, optimizer=optimizer)
print(*trainer.pids)
losses = [float(trainer.step(torch.ones(8, 4))) for _ in range(3)]
print(losses[2] < losses[0])
"""


def test_a_model_of_a_notebook_or_of_stdin_trains() -> None:
    """Nothing of the script is run again: no guard is needed, nor `close()` at its end."""
    done = subprocess.run(
        [sys.executable, "-"], input=_NOTEBOOK, capture_output=True, text=True, timeout=120,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *told, pids, learned = done.stdout.splitlines()
    assert "`own` is of this script" in told[0] and "not of this script or notebook" in told[1]
    assert learned == "True" and gone_in_two([int(p) for p in pids.split()])


def test_norms_do_not_depend_on_threads_or_ranks() -> None:
    torch.manual_seed(0)
    parameters = {n: nn.Parameter(torch.zeros(300, 500)) for n in "ab"}
    for p in parameters.values():
        p.grad = torch.randn(p.shape)
    found = norms(parameters)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert norms(parameters) == found
    finally:
        torch.set_num_threads(before)
    assert together(found.values()) == together(reversed(found.values()))
    expected = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    assert together(found.values()) == pytest.approx(float(expected), rel=1e-6)
    assert together([1.0, float("inf")]) == float("inf")


def test_complex_numbers_travel_and_a_rank_without_weights_clips_nothing() -> None:
    _, args = captured("spectral")
    model = staged("spectral", 3)
    assert [bool(part.flow.weights) for part in model.parts] == [True, False, True]
    options: dict[str, Any] = {"clip": 1e-3, "microbatches": 4, "threads": 3}
    with (
        Trainer(model, optimizer=ADAMW, **options) as threads,
        ProcessTrainer(model, optimizer=ADAMW, **options) as processes,
    ):
        for _ in range(2):
            assert torch.equal(processes.step(*args), threads.step(*args))
            assert processes.norm == threads.norm
        same(processes.state_dict(), threads.state_dict())


def test_changed_options_go_by_the_parameters_names() -> None:
    weights = {name: nn.Parameter(torch.zeros(1)) for name in "abc"}

    def made(*groups: str) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [weights[n] for n in g]} for g in groups], lr=1.0)

    def slots(optimizer: torch.optim.Optimizer) -> list[Slots]:
        return list(slots_of(weights, [optimizer]))

    here, there, one = made("ab", "c"), made("c", "a"), made("abc")
    before = options_of(slots(here))
    here.param_groups[1]["lr"] = 0.5
    changed = changed_options(before, options_of(slots(here)))
    assert changed == {"c": {"lr": 0.5}}
    apply_options(slots(there), changed)
    assert [g["lr"] for g in there.param_groups] == [0.5, 1.0]
    with pytest.raises(DfcError, match="`a` and `c` are changed apart") as e:
        apply_options(slots(one), changed)
    assert e.value.code == "N073"
    apply_options(slots(one), {n: {"lr": 0.1} for n in "abc"})
    assert one.param_groups[0]["lr"] == 0.1


def test_groups_of_a_rate_each_keep_theirs_with_a_scheduler_and_loaded(tmp_path: Path) -> None:
    """Ranks' optimizers, one of biases alone among them, need not have each group."""
    _, graph, options = traced()
    finish: list[dict[str, Any]] = []
    for stages in (2, 3):
        for kind in (Trainer, ProcessTrainer):
            placed = halves(graph, stages)
            with kind(graph, placed, optimizer=by_dimension, **options) as trainer:
                folder = tmp_path / kind.__name__
                if folder.exists():
                    trainer.load(folder)
                schedulers = [ExponentialLR(o, 0.5) for o in trainer.optimizers]
                for _ in range(2):
                    trainer.step(*batch(10))
                    for scheduler in schedulers:
                        scheduler.step()
                trainer.save(folder)
                finish.append(trainer.state_dict())
        same(finish[-1], finish[-2])
        assert finish[-1]["options"] == finish[-2]["options"]
    rates = {name: options["lr"] for name, options in finish[-1]["options"].items()}
    assert rates["second.weight"] == 1e-2 / 16 and rates["second.bias"] == 1e-3 / 16


def test_no_folder_is_left_in_the_end(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither this process's nor the one in which its ranks have their sockets."""
    here = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    monkeypatch.setenv("TMPDIR", str(here))
    _, graph, options = traced()
    with ProcessTrainer(graph, halves(graph), optimizer=ADAMW, **options) as trainer:
        trainer.step(*batch(10))
        assert list(here.glob("dfc-*"))
    assert not list(here.glob("dfc-*"))
