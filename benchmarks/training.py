"""Training in two processes: ours beside torch.distributed.pipelining, a thousand steps.

python benchmarks/training.py [FILE]                      all of it, 9 minutes; also written to FILE
python benchmarks/training.py --only large [FILE]         one part: small, large, trainers or steps
python benchmarks/training.py --only trainers [FILE]      our three trainers in turn, a minute
python benchmarks/training.py --links gloo [FILE]         over one kind of links: sockets or gloo
python benchmarks/training.py --steps zb_v,auto [FILE]    a thousand steps of these schedules alone

FILE keeps what it says of parts that were not run. Both kinds of links are measured in turn, else
the one that is chosen; a thousand steps are over sockets.

The same model, cut at the same place, the same microbatches and optimizer, one thread a process.
Each round times some steps of each in turn, in the same pair of processes; ratios are of medians,
in brackets the lowest and the highest ratio of a single round. The two-thread single process in
plain PyTorch is told beside them.

`trainers` are a Trainer (two threads), a ProcessTrainer (a script and two processes of its own) and
two processes of a launcher with a RankTrainer, in turn: the first two in this process, whose rounds
are between those of the third.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.nn import functional as F

import dfc
from dfc.ir.graph import Graph, Node
from dfc.planning.host import machine_text, this_machine
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer
from dfc.runtime.pipeline.training_processes import ProcessTrainer
from dfc.runtime.pipeline.training_ranks import RankTrainer
from dfc.runtime.pipeline.world import World

RANKS, M, ROUNDS = 2, 8, 7
SHAPES = {"small": (64, 8, 30), "large": (512, 64, 5)}  # width, items, steps in a round
LINKS = {"sockets": "local", "gloo": "gloo"}
SCHEDULES = ("gpipe", "1f1b", "zb1p", "interleaved", "interleaved_zb", "breadth_first", "zb_v",
             "dualpipe_v", "auto")  # fmt: skip
CHUNKED = ("interleaved", "interleaved_zb", "breadth_first", "zb_v", "dualpipe_v")


class Layers(nn.Sequential):
    """Eight residual blocks."""

    def __init__(self, width: int, count: int = 8) -> None:
        super().__init__(*(Block(width) for _ in range(count)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), *_pair(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _pair(width: int) -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class WithLoss(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.layers(x), y)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-3)


def made(width: int, items: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return Layers(width), (torch.randn(M * items, width), torch.randn(M * items, width))


def cut(model: nn.Module, args: Sequence[torch.Tensor], stages: int) -> StagedModel:
    """Between blocks, where torch's stages are cut."""
    b = torch.export.Dim("B", max=4096)
    graph = dfc.trace(WithLoss(model), tuple(args), dynamic_shapes=({0: b}, {0: b}))
    return StagedModel(graph, by_block(graph, stages))


def by_block(graph: Graph, stages: int) -> dict[Node, int]:
    found, block = {}, 0
    for node in graph.nodes:
        module = (node.loc.module if node.loc else "").split(".")
        if len(module) > 1 and module[1].isdigit():
            block = int(module[1])
        found[node] = block * stages // 8
    return found


def ours(
    world: World, model: nn.Module, args: Any, schedule: str, stages: int, links: str
) -> tuple[RankTrainer, Callable[[], Any]]:
    trainer = RankTrainer(cut(model, args, stages), world=world, schedule=schedule, microbatches=M,
                          optimizer=sgd, threads=1, deadline=120, links=LINKS[links])  # fmt: skip
    return trainer, lambda: trainer.step(*args)


def torchs(rank: int, model: nn.Module, args: Any, schedule: str, stages: int) -> Callable[[], Any]:
    from torch.distributed.pipelining import (
        PipelineStage,
        Schedule1F1B,
        ScheduleInterleavedZeroBubble,
    )

    each = 8 // stages
    mine = range(rank, stages, RANKS)
    parts = [nn.Sequential(*list(model)[s * each : (s + 1) * each]) for s in mine]  # type: ignore[call-overload]
    made = [PipelineStage(p, s, stages, torch.device("cpu"))
            for p, s in zip(parts, mine, strict=True)]  # fmt: skip
    runs: Any = (
        Schedule1F1B(made[0], M, loss_fn=F.mse_loss)
        if schedule == "1f1b"
        else ScheduleInterleavedZeroBubble(made, M, loss_fn=F.mse_loss)
    )
    optimizer = sgd([p for part in parts for p in part.parameters()])
    x, y = args

    def step() -> None:
        optimizer.zero_grad()
        given = (x,) if rank == 0 else ()
        if rank == RANKS - 1:
            runs.step(*given, target=y, losses=[])
        else:
            runs.step(*given)
        optimizer.step()

    return step


def in_turn(runs: dict[str, Callable[[], Any]], steps: int) -> dict[str, list[float]]:
    """Seconds of a step of each, in turn, after one warm round; ranks begin together."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                run()
            dist.barrier()
            took[name].append((time.perf_counter() - start) / steps)
    return {name: times[1:] for name, times in took.items()}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    each = [s / f for s, f in zip(slow, fast, strict=True)]
    return f"{median(slow) / median(fast):.2f} ({min(each):.2f} to {max(each):.2f})"


def single(model: nn.Module, args: Any, steps: int, threads: int) -> float:
    """Seconds of a step of plain PyTorch in this process, with the same microbatches."""
    torch.set_num_threads(threads)
    optimizer, took = sgd(model.parameters()), []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            for x, y in zip(*(a.chunk(M) for a in args), strict=True):
                (F.mse_loss(model(x), y) / M).backward()
            optimizer.step()
        took.append((time.perf_counter() - start) / steps)
    torch.set_num_threads(1)
    return median(took[1:])


def trainers(say: Say) -> None:
    """Steps of a Trainer, a ProcessTrainer and a pair of RankTrainers, in turn."""
    for name, (width, items, steps) in SHAPES.items():
        model, args = made(width, items)
        staged = cut(model, args, 2)
        options: dict[str, Any] = {"schedule": "1f1b", "microbatches": M, "threads": RANKS,
                                   "optimizer": partial(torch.optim.SGD, lr=1e-3)}  # fmt: skip
        with ExitStack() as open_:
            threads = open_.enter_context(Trainer(staged, **options))
            start = time.perf_counter()
            processes = open_.enter_context(ProcessTrainer(staged, **options))
            waited = time.perf_counter() - start
            pair = open_.enter_context(Pair(name))
            runs: dict[str, Callable[[int], None]] = {
                "threads": partial(many, threads, args),
                "processes": partial(many, processes, args),
                "ranks": pair.steps,
            }  # fmt: skip
            took: dict[str, list[float]] = {kind: [] for kind in runs}
            for _ in range(ROUNDS + 1):
                for kind, run in runs.items():
                    begin = time.perf_counter()
                    run(steps)
                    took[kind].append((time.perf_counter() - begin) / steps)
        say(f"trainers, {name} (layers of {width}, 1f1b)")
        say(f"  start: {waited:.1f} s for a ProcessTrainer")
        took = {kind: times[1:] for kind, times in took.items()}
        for kind, times in took.items():
            said = f"  {kind}: {median(times) * 1e3:.2f} ms a step"
            beside = f", threads take {ratio(took['threads'], times)} times as long"
            say(said + (beside if kind != "threads" else ""))


def many(trainer: Trainer, args: Any, steps: int) -> None:
    for _ in range(steps):
        trainer.step(*args)


class Pair:
    """Two processes with a RankTrainer, which take some steps when they are told."""

    def __init__(self, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.ranks = [started(self._folder.name, r, name) for r in range(RANKS)]
        self._heard()

    def steps(self, count: int) -> None:
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{count}\n")
            rank.stdin.flush()
        self._heard()

    def _heard(self) -> None:
        for rank in self.ranks:
            assert rank.stdout is not None
            if rank.stdout.readline() != "done\n":
                raise SystemExit("a rank of the pair has ended")

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        self._folder.cleanup()


def started(folder: str, rank: int, name: str) -> subprocess.Popen[str]:
    own = {"OMP_NUM_THREADS": "1", "DFC_BENCH_RANK": str(rank)}
    return subprocess.Popen(
        [sys.executable, __file__, folder, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, **own},
    )  # fmt: skip


def pair_main(rank: int, folder: Path, name: str) -> None:
    """A rank of a `Pair`."""
    torch.set_num_threads(1)
    world = World(rank, RANKS, FileStore(str(folder / "store"), RANKS))
    width, items, _ = SHAPES[name]
    trainer, step = ours(world, *made(width, items), "1f1b", 2, "sockets")
    with trainer:
        print("done", flush=True)
        for line in sys.stdin:
            for _ in range(int(line)):
                step()
            print("done", flush=True)


Say = Callable[[str], None]


def compare(rank: int, world: World, name: str, links: Sequence[str], say: Say) -> None:
    """Steps of ours and of torch's in turn, for one size of layers."""
    width, items, steps = SHAPES[name]
    say(f"{name} (layers of {width}), {M} microbatches of {items} items")
    for schedule, theirs, stages in (
        ("1f1b", "Schedule1F1B", 2),
        ("interleaved_zb", "ScheduleInterleavedZeroBubble", 4),
    ):
        other = torchs(rank, *made(width, items), schedule, stages)
        with ExitStack() as open_:
            runs = {"theirs": other}
            for kind in links:
                trainer, runs[kind] = ours(world, *made(width, items), schedule, stages, kind)
                open_.enter_context(trainer)
            took = in_turn(runs, steps)
        for kind in links:
            say(f"  {schedule} over {kind}: {median(took[kind]) * 1e3:.2f} ms a step, torch's "
                f"{theirs} {median(took['theirs']) * 1e3:.2f}: {ratio(took['theirs'], took[kind])} "
                "times as fast")  # fmt: skip
    dist.barrier()
    if rank == 0:
        for threads in (1, 2):
            seconds = single(*made(width, items), steps, threads)
            say(f"  one process with {threads} threads: {seconds * 1e3:.2f} ms a step")
    dist.barrier()


def many_steps(world: World, schedules: Sequence[str], links: str, say: Say) -> None:
    """A thousand steps of each schedule; how far it is goes to stderr."""
    say("A thousand steps of each schedule, small, two processes")
    model, args = made(16, 2)
    for schedule in schedules:
        trainer, mine = ours(world, model, args, schedule, 4 if schedule in CHUNKED else 2, links)
        start = time.perf_counter()
        losses = []
        with trainer:
            for step in range(1000):
                losses.append(float(mine()))
                if world.rank == 0 and step % 250 == 249:
                    print(f"{schedule}: {step + 1} steps", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - start
        say(f"  {schedule}: {seconds:.1f} s, loss {losses[0]:.4f} to {losses[-1]:.4f}")


def rank_main(
    rank: int, folder: Path, parts: Sequence[str], schedules: Sequence[str], links: Sequence[str]
) -> None:
    torch.set_num_threads(1)
    stores = [FileStore(str(folder / name), RANKS) for name in ("torch", "dfc")]
    dist.init_process_group("gloo", store=stores[0], rank=rank, world_size=RANKS)
    world = World(rank, RANKS, stores[1])

    def say(line: str) -> None:
        if rank == 0:
            print(line, flush=True)
            with (folder / "said").open("a") as f:
                f.write(f"{line}\n")

    for part in parts:
        if part == "steps":
            many_steps(world, schedules, links[0], say)
        else:
            compare(rank, world, part, links, say)
    dist.destroy_process_group()


def with_older(said: str, older: str) -> str:
    """What was said now, and what an older file says of other parts: line by line, by its name."""
    found: dict[str, dict[str, str]] = {}
    for text in (older.partition("\n")[2], said):
        title = ""
        for line in text.splitlines():
            if not line.startswith(" "):
                title = line.partition(" (")[0]
            found.setdefault(title, {})[line.partition(":")[0]] = line
    return "".join(f"{line}\n" for lines in found.values() for line in lines.values())


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, help="where to write what is printed")
    parser.add_argument("--only", choices=[*SHAPES, "trainers", "steps"], help="one part alone")
    parser.add_argument("--steps", metavar="NAMES", help=f"of {','.join(SCHEDULES)}")
    parser.add_argument("--links", choices=LINKS, help="one kind alone")
    found = parser.parse_args()
    found.links = [found.links] if found.links else list(LINKS)
    found.schedules = found.steps.split(",") if found.steps else list(SCHEDULES)
    unknown = set(found.schedules) - set(SCHEDULES)
    if unknown:
        parser.error(f"there is no schedule {unknown.pop()}: {', '.join(SCHEDULES)}")
    only = found.only or ("steps" if found.steps else None)
    found.parts = [only] if only else [*SHAPES, "trainers", "steps"]
    return found


def main() -> None:
    if "DFC_BENCH_RANK" in os.environ:
        rank = int(os.environ["DFC_BENCH_RANK"])
        if len(sys.argv) == 3:
            pair_main(rank, Path(sys.argv[1]), sys.argv[2])
            return
        folder, parts, schedules, links = sys.argv[1:]
        kinds = links.split(",")
        rank_main(rank, Path(folder), parts.split(","), schedules.split(","), kinds)
        return
    chosen = options()
    head = f"{machine_text(this_machine())}, torch {torch.__version__}"
    print(head, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        try:
            run_parts(chosen, Path(folder), said)
        finally:
            if chosen.file and said.exists():  # also what was done before a failure
                older = chosen.file.read_text() if chosen.file.exists() else ""
                chosen.file.write_text(f"{head}\n{with_older(said.read_text(), older)}")


def run_parts(chosen: argparse.Namespace, folder: Path, said: Path) -> None:
    """The parts that ranks run, then the one in which they are started in turn."""

    def say(line: str) -> None:
        print(line, flush=True)
        with said.open("a") as f:
            f.write(f"{line}\n")

    parts = [p for p in chosen.parts if p != "trainers"]
    if parts:
        in_ranks(folder, parts, chosen.schedules, chosen.links)
    if "trainers" in chosen.parts:
        trainers(say)


def in_ranks(
    folder: Path, parts: Sequence[str], schedules: Sequence[str], links: Sequence[str]
) -> None:
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    told = [str(folder), *map(",".join, (parts, schedules, links))]
    ranks = [
        subprocess.Popen([sys.executable, __file__, *told],
                         env={**os.environ, **own, "DFC_BENCH_RANK": str(r)})
        for r in range(RANKS)
    ]  # fmt: skip
    try:
        for rank in ranks:
            if rank.wait(timeout=1200):
                raise SystemExit(f"a rank ended with status {rank.returncode}")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


if __name__ == "__main__":
    main()
