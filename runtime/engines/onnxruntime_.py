"""ONNX Runtime: the emitted model in a session, tensors in and out without copies."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.planning.engine import Engine, Runner

if TYPE_CHECKING:
    from dfc.emit.onnx_run import Session

# Its kernel takes 4 to 6 times as long as Add and LayerNormalization: benchmarks/contrib_ops.py.
_SLOWER_ON_CPU: tuple[str, ...] = ("SkipLayerNormFusion",)


class OnnxRuntime(Engine):
    """Runs the graph as ONNX, on the CPU provider or (unmeasured so far) on the CUDA provider.

    Keeps:  the weights where they are; the session reads the parameters' own memory.
    """

    name = "onnxruntime"
    devices = ("cpu", "cuda")

    def supports(self, node: Node) -> str | None:
        from dfc.emit.onnx import why_not

        return why_not(node)

    def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Runner:
        from dfc.emit.checks import checked

        kind = device.partition(":")[0]
        made, messages = session(graph, device, threads)
        run = partial(made.run_on_device, device=kind) if kind == "cuda" else made.run
        return checked(run, len(graph.outputs), messages)


def session(
    graph: Graph, device: str = "cpu", threads: int | None = None, profile: str = ""
) -> tuple[Session, list[str]]:
    """The graph in a session, and the messages of the checks that are its last outputs.

    Raises:  DfcError K003 when the device cannot be used.
    """
    import torch

    from dfc.compress.processor import this_processor
    from dfc.emit.checks import lift_checks
    from dfc.emit.onnx import ENGINE_OPSET, OPSET, build_onnx
    from dfc.emit.onnx_run import Session

    providers = providers_of(device)
    without, opset, contrib = _SLOWER_ON_CPU, ENGINE_OPSET, True
    if len(providers) > 1:
        _require_cuda()
        without, opset, contrib = (), OPSET, False  # nothing else was measured there
    lifted, messages = lift_checks(graph)
    # As many threads as torch has: engines are compared, and share the machine, on equal terms.
    count = threads or torch.get_num_threads()
    saturates = not this_processor().computes("i8")
    model = build_onnx(lifted, opset=opset, contrib=contrib, saturates=saturates)
    made = Session(
        model, lifted, threads=count, without=without, providers=providers, profile=profile
    )
    if made.providers[0] != providers[0]:  # it takes the next one, and says so to nobody
        raise DfcError(
            "K003",
            f"engine `onnxruntime` cannot run on {device}: {providers[0]} does not load",
            help="its libraries are missing, or of another version",
        )
    return made, messages


def providers_of(device: str) -> list[str]:
    """ONNX Runtime's names of what runs the nodes, the first choice first."""
    cuda = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    return [*cuda, "CPUExecutionProvider"]


def _require_cuda() -> None:
    """The CUDA provider needs the GPU build, its libraries, and a device."""
    import onnxruntime
    import torch

    if not torch.cuda.is_available():
        raise DfcError("K003", "engine `onnxruntime` cannot run on cuda: torch sees no device")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise DfcError(
            "K003",
            "engine `onnxruntime` cannot run on cuda: this build has no CUDA provider",
            help="install onnxruntime-gpu",
        )


ENGINE = OnnxRuntime()
