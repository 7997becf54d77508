"""NNCF in an environment of its own: an ONNX file to an int8 model of OpenVINO's.

    .venv-peers/bin/python benchmarks/_nncf.py ptq|weights MODEL.onnx CALIBRATION.npz OUT.xml

`ptq` is post-training quantization as NNCF's documentation says (transformers are told so),
`weights` is its int8 compression of weights. The file of calibration holds arrays named INPUT/0,
INPUT/1 and so on.
"""

from __future__ import annotations

import sys
from typing import Any

import nncf
import numpy as np
import openvino as ov


def samples(path: str) -> list[dict[str, Any]]:
    held = np.load(path)
    found: dict[int, dict[str, Any]] = {}
    for key in held.files:
        name, _, number = key.rpartition("/")
        found.setdefault(int(number), {})[name] = held[key]
    return [found[i] for i in sorted(found)]


def main(how: str, model: str, calibration: str, out: str) -> None:
    read = ov.Core().read_model(model)
    if how == "weights":
        made = nncf.compress_weights(read, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        data = samples(calibration)
        transformer = any(x.dtype.kind == "i" for x in data[0].values())
        kind = nncf.ModelType.TRANSFORMER if transformer else None
        made = nncf.quantize(read, nncf.Dataset(data), model_type=kind, subset_size=len(data))
    ov.save_model(made, out, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
