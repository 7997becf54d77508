"""A trained network in static int8: EfficientNet-Lite0 on 20 pictures of ImageNet."""

from __future__ import annotations

import collections

import onnx
import onnxruntime
import pytest
import torch

import dfc
from dfc.emit.onnx_export import export_onnx
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import Context, find_pass
from tests.assets import path_or_skip
from tests.lite0 import imagenet20, lite0


@pytest.fixture(scope="module")
def pictures():
    return imagenet20(path_or_skip("imagenet20"))


@pytest.fixture(scope="module")
def graph(pictures):
    shapes = ({0: torch.export.Dim("B", min=1, max=64)},)
    net = lite0(path_or_skip("lite0"))
    traced = dfc.trace(net, (pictures[0][:2],), dynamic_shapes=shapes)
    return run_passes(traced, [find_pass("fold_batch_norm")], mode="none").graph


def ran(graph, pictures, folder):
    """The logits, the bytes of the file, and the ops of ONNX Runtime's own graph."""
    file, seen = folder / "m.onnx", folder / "seen.onnx"
    export_onnx(graph, file, force=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(seen)
    session = onnxruntime.InferenceSession(file, options)
    (found,) = session.run(None, {session.get_inputs()[0].name: pictures.numpy()})
    ops = collections.Counter(n.op_type for n in onnx.load(seen).graph.node)
    return torch.from_numpy(found), file.stat().st_size, ops


def test_every_layer_is_an_integer_kernel_and_the_classes_stay(graph, pictures, tmp_path):
    x, labels = pictures
    before, size, _ = ran(graph, x, tmp_path)
    assert int((before.argmax(1) == labels).sum()) == 18
    small = graph.copy()
    options = {"scheme": "static", "data": "calib"}
    ctx = Context(data={"calib": x.split(5)})
    assert find_pass("quantize", options).run(small, ctx) == 50
    after, bytes_, ops = ran(small, x, tmp_path)
    assert ops["QLinearConv"] == 49 and ops["QLinearAdd"] == 9 and ops["QGemm"] == 1
    assert not any(ops[op] for op in ("Conv", "FusedConv", "Gemm", "MatMul", "Add", "Clip"))
    assert ops["Pad"] == 1  # a fourth channel, of codes
    assert bytes_ < 0.28 * size
    assert int((after.argmax(1) == labels).sum()) >= 17
    assert int((after.argmax(1) == before.argmax(1)).sum()) >= 18
