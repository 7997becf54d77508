"""A network of what can stand between layers, and the step that makes it static int8."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from functools import cache

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

import dfc
from dfc.compress.equalizing import LAYERS
from dfc.compress.static import apply
from dfc.emit.onnx_export import export_onnx
from dfc.ir.interpret import interpret
from dfc.ir.verify import verify
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import Context, find_pass

TIDY = ("fold_constants", "fold_batch_norm", "remove_noops", "cse", "dce")


class Net(nn.Module):
    """Each thing that can stand between layers: padding, clips, a shortcut, pools, a concat."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.c = nn.Conv2d(16, 16, 1)
        self.d = nn.Linear(32, 10)

    def forward(self, x):
        y = self.norm(self.a(F.pad(x, (0, 1, 0, 1)))).relu()
        z = self.c(F.relu6(self.b(y))) + y
        z = torch.cat([F.max_pool2d(z, 2), F.avg_pool2d(y, 2)], 1)
        return self.d(F.adaptive_avg_pool2d(z, 1).flatten(1))


def traced(net, *shape):
    torch.manual_seed(0)
    x = torch.randn(4, *shape)
    graph = dfc.trace(net.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("B", min=1)},))
    return run_passes(graph, [find_pass(n) for n in TIDY], mode="none").graph


@cache
def tiny():
    torch.manual_seed(0)
    return traced(Net(), 3, 16, 16)


def data(*shape, n=4):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(8, *(shape or (3, 16, 16)), generator=g) for _ in range(n)]


@dataclass
class Step:
    """What a step says."""

    data: str = "calib"
    range: str = "auto"
    per: str = "channel"
    codes: str = "auto"
    correct: bool = True


def quantized(graph, batches=None, ctx=None, but=(), **options):
    made = graph.copy()
    ctx = ctx or Context(data={"calib": batches or data()})
    layers = [n for n in made.nodes if n.op in LAYERS and n.results[0].name not in but]
    assert apply(made, layers, Step(**options), ctx) == len(layers) > 0
    verify(made)
    return made


def distance(one, other, x):
    """Relative mean square error."""
    (a,), (b,) = interpret(one, [x]), interpret(other, [x])
    return float((a - b).square().mean() / a.square().mean())


def ran(graph, x, tmp_path, optimized=True):
    """What ONNX Runtime gives, and the ops of the graph that it made."""
    path, seen = tmp_path / "m.onnx", tmp_path / "seen.onnx"
    export_onnx(graph, path, force=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(seen)
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    ops = collections.Counter(n.op_type for n in onnx.load(seen).graph.node)
    return torch.from_numpy(found), ops
