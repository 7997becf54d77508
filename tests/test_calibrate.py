"""Calibration: batches are checked and streamed, values observed, and a killed run goes on."""

import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import dfc
from dfc.compress.calibrate import batches_of, observe
from dfc.errors import DfcError
from dfc.rewrite.journal import Journal
from dfc.rewrite.pass_ import Context


class Total:
    """Sums what it sees, and counts how often."""

    def __init__(self):
        self.sum = torch.zeros(())
        self.updates = 0
        self.shapes = []

    def update(self, x):
        self.sum = self.sum + x.sum()
        self.updates += 1
        self.shapes.append(tuple(x.shape))

    def state(self):
        return {"sum": self.sum}

    def load(self, state):
        self.sum = state["sum"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@cache
def graph_of(model=None, *args):
    batch = torch.export.Dim("B", min=1, max=64)
    args = args or (torch.ones(3, 4),)
    return dfc.trace(model or net(), args, dynamic_shapes=tuple({0: batch} for _ in args))


def data(n=12):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=g) for _ in range(n)]


def node(graph, op):
    return next(n for n in graph.nodes if n.op == op)


def context(batches, **more):
    return Context(data={"calib": batches}, **more)


# What is seen


def test_every_batch_of_a_value_is_seen():
    graph, total = graph_of(), Total()
    ctx = context(data())
    count = observe(
        graph,
        batches_of(ctx, "calib", graph),
        {node(graph, "aten.relu.default").results[0]: total},
        ctx,
        "",
    )
    model = net()
    assert count == 12 and total.updates == 12
    expected = sum(model[1](model[0](x)).sum() for x in data())
    torch.testing.assert_close(total.sum, expected)


def test_an_observer_may_see_several_values(tmp_path):
    graph = graph_of()
    relu = node(graph, "aten.relu.default").results[0]
    for updates in (4, 0):  # the second time from the journal
        ctx, total = context(data(2), journal=Journal(tmp_path, 0.0)), Total()
        observers = {graph.inputs[0]: total, relu: total}
        observe(graph, batches_of(ctx, "calib", graph), observers, ctx, "")
        assert total.updates == updates and float(total.sum) != 0


def test_inputs_are_seen_and_nothing_is_run_for_them():
    graph, total = graph_of(), Total()
    ctx = context(data(2))
    observe(graph, batches_of(ctx, "calib", graph), {graph.inputs[0]: total}, ctx, "")
    assert total.shapes == [(5, 4), (5, 4)]


def test_what_comes_after_the_last_observed_value_is_not_run():
    class Picky(nn.Module):
        def forward(self, x):
            y = x.relu()
            return torch.linalg.cholesky(y @ y.mT - torch.eye(4))  # fails for every batch

    graph = dfc.trace(Picky(), (torch.ones(4, 4),))
    ctx, total = context([torch.zeros(4, 4)]), Total()
    value = node(graph, "aten.relu.default").results[0]
    assert observe(graph, batches_of(ctx, "calib", graph), {value: total}, ctx, "") == 1


def test_padding_is_not_seen():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.dense = nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask):
            return self.dense(self.table(input_ids)) * attention_mask.unsqueeze(-1)

    ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    graph, total = dfc.trace(Encoder(), (ids, mask)), Total()
    ctx = context([{"input_ids": ids, "attention_mask": mask}])
    value = node(graph, "aten.embedding.default").results[0]
    observe(graph, batches_of(ctx, "calib", graph), {value: total}, ctx, "")
    assert total.shapes == [(4, 4)]


def test_progress_is_told():
    told = []
    graph = graph_of()
    ctx = context(data(3), progress=lambda done, total: told.append((done, total)))
    observe(graph, batches_of(ctx, "calib", graph), {graph.inputs[0]: Total()}, ctx, "")
    assert told == [(1, 3), (2, 3), (3, 3)]


# Bad data


class Once:
    """Claims to be readable again, and is not."""

    def __init__(self, batches):
        self.iterator = iter(batches)

    def __iter__(self):
        return self.iterator


class Broken:
    def __iter__(self):
        yield torch.ones(5, 4)
        raise OSError("the file is gone")


def infinite():
    x = torch.ones(5, 4)
    x[2, 1] = torch.inf
    return x


BAD = {
    "shape": ([torch.ones(5, 4), torch.ones(5, 3)], "D081", "batch 2 of data `calib`: `input`"),
    "dtype": ([torch.ones(5, 4).double()], "D081", "batch 1 of data `calib`: `input` must have"),
    "labels": ([(torch.ones(5, 4), torch.ones(5))], "D081", "without labels"),
    "name": ([{"image": torch.ones(5, 4)}], "D081", "no argument `image`"),
    "nan": ([torch.ones(5, 4), torch.full((5, 4), torch.nan)], "D082", "batch 2 of data"),
    "inf": ([infinite()], "D082", r"`input` has 1 number .* the first at \[2, 1\]"),
    "empty": ([], "D080", "gave no batch"),
    "one tensor": (torch.ones(5, 4), "D081", "put it into a list"),
    "generator": ((x for x in data()), "D083", "only once: it is a generator"),
    "number": (3, "D084", "is of type int, which holds no batches"),
    "raises": (Broken(), "K040", "raised OSError: the file is gone"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused(case):
    batches, code, words = BAD[case]
    graph, ctx = graph_of(), context(batches)
    with pytest.raises(DfcError, match=words) as e:
        observe(graph, batches_of(ctx, "calib", graph), {graph.inputs[0]: Total()}, ctx, "")
    assert e.value.code == code


def test_data_that_was_exhausted_is_refused():
    graph, ctx = graph_of(), context(Once(data()))
    read = batches_of(ctx, "calib", graph)
    assert len(list(read)) == 12
    with pytest.raises(DfcError, match="gave no batch, but 12 when it was read before"):
        list(read)


def test_data_that_is_not_there_is_named():
    graph = graph_of()
    with pytest.raises(DfcError, match="did you mean `calib`"):
        batches_of(context([]), "calibs", graph)


def test_a_mask_of_minus_infinity_is_no_bad_number():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return (x + mask).softmax(-1)

    mask = torch.zeros(3, 4)
    mask[:, 2:] = -torch.inf
    graph = graph_of(Masked(), torch.ones(3, 4), mask)
    ctx = context([(torch.ones(3, 4), mask)])
    assert len(list(batches_of(ctx, "calib", graph))) == 1


# The journal


def observed(folder, batches, every_s=0.0, key="", said=None):
    graph, total = graph_of(), Total()
    say = (lambda what: None) if said is None else said.append
    ctx = context(batches, journal=Journal(folder, every_s), say=say)
    value = node(graph, "aten.relu.default").results[0]
    count = observe(graph, batches_of(ctx, "calib", graph), {value: total}, ctx, key)
    return count, total


def folder(path, name):
    (path / name).mkdir()
    return path / name


def test_a_finished_run_is_not_run_again(tmp_path):
    _, first = observed(tmp_path, data())
    count, second = observed(tmp_path, data())
    assert count == 12 and second.updates == 0 and torch.equal(first.sum, second.sum)


def test_other_data_under_the_same_name_is_run(tmp_path):
    observed(tmp_path, data())
    other = [x + 1 for x in data()]
    _, found = observed(tmp_path, other)
    assert found.updates == 12


def test_other_options_do_not_share_an_entry(tmp_path):
    observed(tmp_path, data(), key="percentile")
    _, found = observed(tmp_path, data(), key="minmax")
    assert found.updates == 12


def test_data_that_grew_is_run_from_where_it_grew(tmp_path):
    observed(tmp_path, data(7))
    count, found = observed(tmp_path, data(12))
    _, whole = observed(folder(tmp_path, "other"), data(12))
    assert (count, found.updates) == (12, 5) and torch.equal(found.sum, whole.sum)


def test_a_damaged_entry_is_passed_by(tmp_path):
    observed(tmp_path, data())
    (entry,) = tmp_path.glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:40])
    _, found = observed(tmp_path, data())
    assert found.updates == 12


CHILD = """
import sys
from pathlib import Path
from tests.test_calibrate import data, observed
class Slow(list):
    def __iter__(self):
        for i, x in enumerate(list.__iter__(self)):
            print(i, flush=True)
            if i == 20:
                sys.stdin.read()  # it is killed here
            yield x
observed(Path(sys.argv[1]), Slow(data(200)))
"""


class Interrupted(list):
    """The user presses Ctrl-C while the sixth batch is made."""

    def __iter__(self):
        yield from self[:5]
        raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(tmp_path):
    said = []
    with pytest.raises(KeyboardInterrupt):
        observed(tmp_path, Interrupted(data()), said=said)
    assert said == ["calibration: 5 batches are kept: it will go on from there"]
    said.clear()
    _, found = observed(tmp_path, data(), said=said)
    assert found.updates == 7
    assert said == ["calibration: 5 batches were seen in an earlier run: not run again"]


def test_a_killed_run_goes_on_and_ends_equal(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while int(child.stdout.readline()) < 20:
        pass
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=300) == -signal.SIGKILL
    child.stdout.close()
    child.stdin.close()
    count, resumed = observed(tmp_path, data(200))
    _, whole = observed(folder(tmp_path, "whole"), data(200))
    assert count == 200 and 100 < resumed.updates <= 185
    assert torch.equal(resumed.sum, whole.sum)


def test_records_survive_half_a_line(tmp_path):
    journal = Journal(tmp_path)
    journal.append("k", {"n": 1})
    with (tmp_path / "k.jsonl").open("ab") as out:
        out.write(b'{"n": ')
    assert journal.records("k") == [{"n": 1}]
    journal.append("k", {"n": 2})
    assert journal.records("k") == [{"n": 1}, {"n": 2}]
