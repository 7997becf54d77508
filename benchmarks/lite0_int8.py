"""EfficientNet-Lite0 in int8 on CIFAR-10: accuracy on all test images, bytes, and time.

    python benchmarks/lite0_int8.py [--images N] [--keep FOLDER] [--ablations] [VARIANT...]

Without variants it makes and runs all of them and writes the results. With --keep what was made and
found stays in a folder, so that a run can be stopped and go on, or be split: runs of some variants
write nothing but that. The variants in SHORT see the first 1000 or 2000 images only.

A linear probe for CIFAR-10 is fitted on the float features of 3000 training images, 200 others
calibrate. Pruned variants lose channels that take a share of the predicted time, and what reads
them is refitted on 1000 images without labels; `distilled` ones are trained on the float network's
logits too, for two looks at the 3000 images. Every variant runs in ONNX Runtime: dfc's as its
recipe makes them, and ONNX Runtime's own `quantize_static` on the same images as dfc. Accuracy is
compared image by image. Times are of batch 1, one call after the other as in use, in turns of 20
calls of each variant: with one thread, and with all as ONNX Runtime does by default.
Needs:  python -m tests.assets lite0 cifar10
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests

import dfc
from dfc.compress.processor import this_processor
from dfc.compress.statistics import paired
from dfc.runtime.measure import wait_until_quiet
from tests.assets import path
from tests.lite0 import PROBED, SIDE, Lite0, batches, cifar10, enlarged, lite0, probe

RESULTS = Path(__file__).parent / "results" / "lite0-int8.txt"
CALIBRATION = slice(3000, 3200)  # training images behind those of the probe
PRUNING = slice(3000, 4000)
SHAPES = ({0: torch.export.Dim("B", min=1, max=256)},)
PRUNED = (
    "fold_batch_norm\n  dce\n  prune using pictures by reconstruction with what=channels, "
    "scope=time, ratio={}, align=16, refit=yes"
)
RECIPES = {
    "fp32": "fold_batch_norm",
    "fp32, pruned by a fifth": PRUNED.format(0.2),
    "dfc": "quantize int8 using calib",
    "dfc, pruned by a tenth": PRUNED.format(0.1) + "\n  quantize int8 using calib",
    "dfc, pruned by a fifth": PRUNED.format(0.2) + "\n  quantize int8 using calib",
    "dfc, pruned by a fifth, distilled": PRUNED.format(0.2)
    + "\n  recover by distil using probed\n  quantize int8 using calib",
    "dfc, per tensor, equalized": "fold_batch_norm\n  equalize using calib\n"
    "  quantize int8 using calib with per=tensor",
}
ABLATIONS = {
    "dfc, per tensor": "quantize int8 using calib with per=tensor",
    "dfc, biases as they were": "quantize int8 using calib with correct=no",
    "dfc, 7-bit weights": "quantize int8 using calib with codes=seven",
    "dfc, weights that saturate": "quantize int8 using calib with codes=full",
}
PEERS = {"onnxruntime": False, "onnxruntime, 7-bit weights": True}  # per channel; reduce_range
SHORT = {**dict.fromkeys(ABLATIONS, 1000), **dict.fromkeys(PEERS, 2000)}
SHORT |= dict.fromkeys(("fp32, pruned by a fifth", "dfc, per tensor, equalized"), 2000)
RATE = 2e-4  # of a weight's own size, at most, a step of distilling
GOALS = {"pp": 0.5, "MB": 3.9, "times": 2.4}
TURNS, WARM, CALLS = 30, 3, 20  # of each variant; calls that are not timed, and calls that are


class Calibration:
    """Batches that can be read again, enlarged as they are read."""

    def __init__(self, pictures: torch.Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return -(-len(self.pictures) // 20)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return batches(self.pictures, 20)


def distil(net: torch.nn.Module) -> Any:
    """What brings a pruned network's logits near those of the whole one, in two looks."""

    def train(module: torch.nn.Module, data: Calibration) -> None:
        with torch.no_grad():
            wanted = torch.cat([net(x) for x in data])
        random = torch.Generator().manual_seed(0)
        steps = [
            x for _ in range(2) for x in torch.randperm(len(wanted), generator=random).split(32)
        ]
        sized = [(p, float(p.detach().square().mean().sqrt())) for p in module.parameters()]
        groups = [{"params": [p], "lr": RATE * size} for p, size in sized if size > 0]
        optimizer = torch.optim.Adam(groups)
        rates = [min(1, i / 20) * (1 + math.cos(math.pi * i / len(steps))) / 2
                 for i in range(1, len(steps) + 1)]  # fmt: skip
        plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rates[min(i, len(rates) - 1)])
        for at in steps:
            loss = F.mse_loss(module(enlarged(data.pictures[at])), wanted[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()

    return train


def compiled(
    net: torch.nn.Module, steps: str, data: dict[str, Calibration], target: Path
) -> list[str]:
    """What the steps said."""
    read = [name for name in data if f"using {name}" in steps]
    declared = f"data {', '.join(read)}\n" if read else ""
    recipe = f"dfc 1\n{declared}recipe r {{\n  {steps}\n}}\n"
    made = dfc.compile(
        net, (torch.randn(2, 3, SIDE, SIDE),), dynamic_shapes=SHAPES, recipe=recipe,
        data={name: data[name] for name in read}, functions={"distil": distil(net)},
        engine="eager", verify="none",
    )  # fmt: skip
    made.export(target, force=True)
    return [note for note in made.report.notes if note.startswith("prune:")]


def peer(fp32: Path, data: Calibration, target: Path, reduce_range: bool) -> None:
    """ONNX Runtime's own static quantization, per channel, as its guide says."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnxruntime.InferenceSession(fp32).get_inputs()[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(data)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {name: batch.numpy()}

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(fp32, prepared)
    quantize_static(
        prepared, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=reduce_range,
    )  # fmt: skip


class Session:
    def __init__(self, model: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model, options)
        self.name = self.session.get_inputs()[0].name

    def __call__(self, inputs: Any) -> Any:
        return self.session.run(None, {self.name: inputs[0].numpy()})[0]


def classes(run: Session, pictures: torch.Tensor) -> Any:
    return np.concatenate([run([x]).argmax(1) for x in batches(pictures, 20)])


def machine() -> str:
    words = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((x.partition(":")[2].strip() for x in words.splitlines() if "model name" in x), "")
    flags = [f for f in ("avx2", "avx512f", "avx_vnni", "avx512_vnni") if f in words.split()]
    return f"{model or platform.processor()}, {', '.join(flags)}, {torch.get_num_threads()} threads"


class Variants:
    """The files of the variants and the classes that they give, made once in a folder."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder = folder
        self.pictures, self.labels = cifar10(path("cifar10"), "test")
        self.images = images
        train = cifar10(path("cifar10"), "train")[0]
        self.data = {"calib": Calibration(train[CALIBRATION])}
        self.data["probed"] = Calibration(train[:PROBED])
        self.data["pictures"] = Calibration(train[PRUNING])

    def file(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-').replace(',', '')}.onnx"

    def made(self, name: str) -> Path:
        file = self.file(name)
        if file.exists():
            return file
        print(f"making {name}", file=sys.stderr, flush=True)
        temp = file.with_suffix(f".{os.getpid()}.tmp.onnx")
        if name in PEERS:
            peer(self.made("fp32"), self.data["calib"], temp, PEERS[name])
        else:
            said = compiled(self.net(), (RECIPES | ABLATIONS)[name], self.data, temp)
            file.with_suffix(".txt").write_text("".join(f"{x}\n" for x in said))
        temp.rename(file)
        return file

    def net(self) -> torch.nn.Module:
        """The network with its probe, which is kept as well."""
        from safetensors.torch import load_file, save_file

        stored = self.folder / "probe.safetensors"
        net = lite0(path("lite0"))
        if not stored.exists():
            print("fitting the probe", file=sys.stderr, flush=True)
            save_file(probe(net, path("cifar10")).state_dict(), stored)
        small = Lite0(10).eval()
        small.load_state_dict(load_file(stored))
        return small

    def found(self, name: str) -> Any:
        """The classes that a variant gives."""
        count = min(self.images, SHORT[name]) if name in SHORT else self.images
        stored = self.file(name).with_suffix(f".{count}.npy")
        whole = self.file(name).with_suffix(f".{self.images}.npy")
        if whole.exists():
            return np.load(whole, allow_pickle=False)
        if not stored.exists():
            run = Session(self.made(name), torch.get_num_threads())
            print(f"running {name}", file=sys.stderr, flush=True)
            np.save(stored, classes(run, self.pictures[:count]))
        return np.load(stored, allow_pickle=False)


def times(v: Variants, names: list[str], threads: int) -> dict[str, float]:
    """Milliseconds of a call, the median, among calls of the same variant."""
    runs = {n: Session(v.made(n), threads) for n in names}
    inputs = [next(iter(batches(v.pictures[:1])))]
    taken: dict[str, list[float]] = {n: [] for n in names}
    for _ in range(TURNS):
        for name, run in runs.items():
            wait_until_quiet()  # the threads of the variant before it
            for call in range(WARM + CALLS):
                begin = time.perf_counter()
                run(inputs)
                if call >= WARM:
                    taken[name].append((time.perf_counter() - begin) * 1e3)
    return {n: float(np.median(t)) for n, t in taken.items()}


def lost(v: Variants, name: str) -> tuple[Any, float]:
    """The paired difference to fp32, and the share of images with the same class."""
    found = v.found(name)
    labels, base = v.labels[: len(found)].numpy(), v.found("fp32")[: len(found)]
    d = paired((base == labels).astype(int), (found == labels).astype(int))
    return d, float((found == base).mean())


def row(v: Variants, name: str, ms: list[dict[str, float]]) -> str:
    found, size = v.found(name), v.made(name).stat().st_size / 1e6
    right = (found == v.labels[: len(found)].numpy()).mean()
    text = f"{name:34} {len(found):6} {100 * right:6.2f} {size:6.2f}"
    text += "".join(f" {t[name]:8.2f} {t['fp32'] / t[name]:5.2f}x" for t in ms)
    if name == "fp32":
        return text
    d, agree = lost(v, name)
    return f"{text} {100 * d.drop:7.2f} {100 * d.upper:6.2f} {100 * agree:7.1f}"


def taken(v: Variants, name: str) -> str:
    """What pruning took, in words."""

    def channels(variant: str) -> int:
        held = onnx.load(v.made(variant)).graph.initializer
        return sum(i.dims[0] for i in held if len(i.dims) == 4)

    said = v.file(name).with_suffix(".txt").read_text()
    (fewer,) = re.findall(r"[\d.]+% fewer multiply-adds, [\d.]+% fewer bytes", said)
    return f"{name}: {channels(name)} of {channels('fp32')} channels stay, {fewer}"


def verdict(v: Variants, name: str, ms: list[dict[str, float]], threads: list[int]) -> str:
    drop, size = 100 * lost(v, name)[0].drop, v.made(name).stat().st_size / 1e6
    faster = [t["fp32"] / t[name] for t in ms]

    def word(met: bool) -> str:
        return "met" if met else "not met"

    parts = [
        f"{GOALS['pp']} pp {word(drop <= GOALS['pp'])}",
        f"{GOALS['MB']} MB {word(size <= GOALS['MB'])}",
        *(f"{GOALS['times']} times float32 with {n} thread{'s' * (n > 1)} "
          f"{word(x >= GOALS['times'])}" for n, x in zip(threads, faster, strict=True)),
    ]  # fmt: skip
    return f"goals, {name}: {'; '.join(parts)}"


def table(v: Variants, names: list[str]) -> str:
    threads = sorted({1, torch.get_num_threads()})
    ms = [times(v, names, n) for n in threads]
    load = os.getloadavg()[0]
    busy = load > torch.get_num_threads() + 1
    dots = this_processor().computes("i8")
    head = f"{'':34} {'images':>6} {'top1 %':>6} {'MB':>6}"
    head += "".join(f" {f'ms, {n} th':>8} {'speed':>6}" for n in threads)
    return "\n".join([
        "EfficientNet-Lite0 at 128 px, linear probe on CIFAR-10, in ONNX Runtime",
        "bound: of the drop, 95 %, one-sided, paired; agree: same class as fp32",
        f"ms: of batch 1, call after call, with so many threads: {' and '.join(map(str, threads))}",
        f"{machine()}, dot products of int8: {'yes' if dots else 'no'}",
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, load {load:.1f}"
        + (" (other work was on the machine)" if busy else ""),
        "", f"{head} {'drop pp':>7} {'bound':>6} {'agree %':>7}",
        *(row(v, n, ms) for n in names), "",
        *(taken(v, n) for n in names if n.startswith("dfc, pruned")),
        *(verdict(v, n, ms, threads) for n in names if n in RECIPES and n.startswith("dfc")),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--keep", type=Path, help="folder for what is made and found")
    parser.add_argument("--ablations", action="store_true", help="what each part of it brings")
    parser.add_argument("variants", nargs="*", help="only these: write no results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        v = Variants(folder, given.images)
        names = [*RECIPES, *(ABLATIONS if given.ablations else ()), *PEERS]
        for name in given.variants or names:
            v.found(name)
        if not given.variants:
            text = table(v, names)
            print(text)
            RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
