"""A graph as a pipeline in several processes, called like the one in threads.

    with Processes(graph, stage_of, microbatches=8) as pipeline:
        results = pipeline(*inputs)

Each rank is a process that has its own stages alone. Nothing is pickled: a rank reads its graphs as
text and maps its weights from their files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dfc.ir.graph import Graph
from dfc.planning.actions import Kind
from dfc.planning.torch_device import check_device
from dfc.runtime.pipeline.crew import Crew, Launcher
from dfc.runtime.pipeline.folder import assembly, write_assembly
from dfc.runtime.pipeline.host import FRUITLESS, ProcessLanes
from dfc.runtime.pipeline.linking import device_pairs, meeting, nccl_is_here
from dfc.runtime.pipeline.local import Pipeline, Runs
from dfc.runtime.pipeline.spawn import Spawner, private_folder
from dfc.runtime.pipeline.wiring import Wiring


class Processes(Pipeline):
    """Stages of one graph in processes of this machine; called like the model.

    `restarts` is how often ranks may be lost in a call without any new result; 0 raises at the
    first. `expected` are the seconds of a microbatch at each stage, for the deadlines of the first
    call; later ones take what was measured. `incidents` tells of every loss that was mended.
    `links` are `local` (sockets of this host) or `gloo`; by default local where the address is
    this host's own, and nccl beside it between ranks on two GPUs (`nccl` insists on that).
    Results lie in this machine's memory, wherever they were made.
    Needs:   a graph with a dynamic batch dimension, unless every call is one microbatch.
    Ensures: results equal those of the stages run one after another on the same microbatches; all
             processes end with the pipeline, or with this process.
    Raises:  DfcError K058 for a rank that is lost for good, K056 for one that does not start.
    """

    def __init__(
        self,
        graph: Graph,
        stage_of: Mapping[Any, int],
        *,
        restarts: int = FRUITLESS,
        expected: Sequence[float] = (),
        launcher: Callable[[Path, list[int], list[str]], Launcher] = Spawner,
        address: str = "127.0.0.1",
        links: str | None = None,
        **options: Any,
    ) -> None:
        self.restarts, self._launcher, self._address = restarts, launcher, address
        self._links = links
        self._expected = {(Kind.F, s): t for s, t in enumerate(expected)}
        super().__init__(graph, stage_of, **options)

    def _devices_here(self) -> Sequence[str]:
        return ()  # the launcher knows whether they are

    def _start(self) -> Runs:
        self._folder = private_folder()
        folder = Path(self._folder.name)
        made, numbers = assembly(
            self.stages, self.edges, self.placement, self.engines, self.threads, self.devices,
            self.tiers,
        )  # fmt: skip
        write_assembly(folder, made, self.stages)
        launcher = self._launcher(folder, self.threads, self.devices)
        with ExitStack() as failing:
            failing.callback(launcher.close)
            for device in self.devices if launcher.shares_devices else ():
                check_device(device)
            wiring = Wiring(self.graph, made, numbers)
            places = [(0, d) for d in self.devices]
            fast = device_pairs(
                self._links, wiring.pairs, places, launcher.shares_devices and nccl_is_here()
            )
            where = meeting(self._links, folder, self._address, fast)
            self.link_kind = str(where.told[0])  # local, gloo, or nccl beside either
            crew = Crew(len(self.threads), launcher, self._address)
            crew.expected = dict(self._expected)
            lanes = self._ranks = ProcessLanes(wiring, crew, where, self.restarts)
            failing.pop_all()  # it is the crew's from now on
            failing.callback(self._end)
            lanes.ready()
            failing.pop_all()
        return lanes

    @property
    def incidents(self) -> list[str]:
        return self._ranks.incidents

    @property
    def pids(self) -> list[int]:
        """The process of each rank."""
        return [m.pid for _, m in sorted(self._ranks.crew.members.items())]

    def close(self) -> None:
        """End the ranks' processes."""
        self._end()

    def _end(self) -> None:
        self._ranks.close()
        self._folder.cleanup()
