"""`dfc.map_rows`: a row gives what the model gives for it alone, whatever lies in its batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dfc
from dfc.errors import DfcError
from dfc.rows.task import loaded

pa = pytest.importorskip("pyarrow")

B, S = torch.export.Dim("B", min=2, max=8), torch.export.Dim("S", max=16)
PAD = {"ids": 0, "mask": 0}


class Encoder(nn.Module):
    """Numbers for each token, and their mean over those that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.table(ids) * mask[..., None]
        return {"tokens": self.head(h), "mean": h.sum(1) / mask.sum(1, keepdim=True)}


class Image(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.amax((1, 2)), (x > 0).flatten(1)[:, :2]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    model = Encoder().eval()
    args = torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 5)
    compiled = dfc.compile(model, args, dynamic_shapes=({0: B, 1: S}, {0: B, 1: S}), engine="eager")
    path = str(tmp_path_factory.mktemp("rows") / "encoder.dfcpkg")
    compiled.save(path)
    return model, path


def rows(count: int = 21) -> tuple[list[list[int]], list[list[float]]]:
    lengths = [i % 7 + 1 for i in range(count)]
    ids = [torch.randint(50, (n,)).tolist() for n in lengths]
    return ids, [[1.0] * n for n in lengths]


def alone(model: nn.Module, ids: list[int]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = model(torch.tensor([ids]), torch.ones(1, len(ids)))
    return {name: x[0].numpy() for name, x in found.items()}


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found, dtype=np.float32), expected, atol=1e-6)


def test_a_row_gives_what_it_gives_alone(encoder: tuple[nn.Module, str]) -> None:
    model, path = encoder
    ids, mask = rows()
    names = [str(i) for i in range(21)]
    table = pa.table({"name": names, "ids": ids, "mask": mask})
    for batch in (4, 32):  # the last one has a single row: the model takes no fewer than 2
        out = dfc.map_rows(table, path, pad=PAD, batch=batch)
        assert out.column_names == ["name", "ids", "mask", "tokens", "mean"]
        assert out["name"].to_pylist() == names
        for i, row in enumerate(ids):
            expected = alone(model, row)
            close(out["tokens"][i].as_py(), expected["tokens"])  # as long as the row
            close(out["mean"][i].as_py(), expected["mean"])


def test_columns_have_names_and_types_of_their_own(encoder: tuple[nn.Module, str]) -> None:
    model, path = encoder
    ids, mask = rows(9)
    table = pa.table({
        "words": pa.array(ids, pa.large_list(pa.int16())),
        "there": pa.array(mask, pa.list_(pa.int8())), "mean": [0] * 9,
    })  # fmt: skip
    reader = table.slice(1).to_reader(max_chunksize=3)
    out = dfc.map_rows(
        reader, path, columns={"ids": "words", "mask": "there"}, outputs={"mean": "vector"}, pad=PAD
    )
    assert isinstance(out, pa.RecordBatchReader) and out.schema.names[3:] == ["vector"]
    found = out.read_all()["vector"].to_pylist()
    for row, vector in zip(ids[1:], found, strict=True):
        close(vector, alone(model, row)["mean"])
    empty = dfc.map_rows(pa.table({"ids": ids, "mask": mask}).slice(9), path, pad=PAD)
    assert len(empty) == 0 and empty.schema.field("tokens").type == pa.list_(pa.list_(pa.float32()))


def test_pictures_and_a_batch_of_one_size(tmp_path: Path) -> None:
    path = str(tmp_path / "image.dfcpkg")
    dfc.compile(Image(), (torch.randn(4, 2, 3, dtype=torch.bfloat16),), engine="eager").save(path)
    x = torch.randn(6, 2, 3).bfloat16().float().numpy()
    nested = pa.array(x.tolist(), pa.list_(pa.list_(pa.float64())))
    for column in (nested, pa.FixedShapeTensorArray.from_numpy_ndarray(x)):
        out = dfc.map_rows(pa.table({"x": column}), path)
        np.testing.assert_array_equal(out["output.0"].to_numpy(), x.max((1, 2)))
        assert out["output.1"].to_pylist() == (x > 0).reshape(6, -1)[:, :2].tolist()


def test_what_does_not_fit_is_refused(encoder: tuple[nn.Module, str], tmp_path: Path) -> None:
    _, path = encoder
    ids, mask = rows(4)

    def refused(code: str, *words: str, ids: Any = ids, mask: Any = mask, **options: Any) -> None:
        with pytest.raises(DfcError) as e:
            dfc.map_rows(pa.table({"ids": ids, "mask": mask}), path, **{"pad": PAD, **options})
        text = str(e.value)
        assert e.value.code == code and all(w in text for w in words), text

    refused("D101", "no column `idz` for the input `ids`", "ids", columns={"ids": "idz"})
    refused("D101", "no input `words`", "ids, mask", columns={"words": "ids"})
    refused("D101", "a column `ids` already", outputs={"mean": "ids"})
    refused("D101", "no output `means`", "mean", outputs=["means"])
    refused("D102", "`mask` has 1 missing", mask=[[1.0], None, [1.0], [1.0]])
    refused("D102", "`ids` has 1 missing", ids=[[1], [2, None], [1], [1]])
    refused("D103", "`ids` holds plain values", ids=[1, 2, 3, 4])
    refused("D103", "`ids` holds lists", ids=[[[1]], [[2]], [[3]], [[4]]])
    refused("D104", "`ids` are 1 to 4 long", "pad={", pad=None)
    refused("D105", "`ids` holds float64", "i64", ids=[[1.5]] * 4, mask=[[1.0]] * 4)
    refused("D105", "`ids` holds object", ids=[["a"]] * 4, mask=[["a"]] * 4)
    refused("D106", "2 values in `mask` and 1", mask=[[1.0, 1.0], *mask[1:]])
    refused("K015", "`S` is 17", ids=[[1] * 17] * 4, mask=[[1.0] * 17] * 4)
    refused("Q055", "`batch` is a number of rows", batch=0)
    refused("Q055", "set_num_threads", threads=2)
    with pytest.raises(DfcError, match=r"Q055.*a Spark DataFrame, got dict"):
        dfc.map_rows({"ids": ids}, path)

    moved = str(tmp_path / "moved.dfcpkg")
    shutil.copytree(path, moved)
    with pytest.raises(DfcError, match=r"D022.*another package on this machine"):
        loaded(moved, "0" * 64, None, None)


def test_models_that_are_no_function_of_rows(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return x + self.seen

    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.sum(0), x

    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x @ y

    x = torch.randn(4, 3)
    for model, args, why in (
        (Counts(), (x,), "keeps a state"),
        (Mixed(), (x,), r"`output.0` .* no dimension of rows"),
        (Two(), (x, x[0]), "do not share their first dimension"),
    ):
        path = str(tmp_path / f"{type(model).__name__}.dfcpkg")
        batch = torch.export.Dim("B", max=9)
        shapes = ({0: batch}, None)[: len(args)]
        dfc.compile(model, args, dynamic_shapes=shapes, engine="eager").save(path)
        with pytest.raises(DfcError, match=why) as e:
            dfc.map_rows(pa.table({"x": x.tolist(), "y": x.tolist()}), path)
        assert e.value.code == "D100"


def test_ray_reads_rows_where_they_lie(encoder: tuple[nn.Module, str]) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("pandas")
    model, path = encoder
    ids, mask = rows()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        table = pa.table({"ids": ids, "mask": mask, "i": list(range(21))})
        found = dfc.map_rows(ray.data.from_arrow(table), path, pad=PAD, outputs=["mean"])
        told = {row["i"]: row["mean"] for row in found.take_all()}
    finally:
        ray.shutdown()
    for i, row in enumerate(ids):
        close(told[i], alone(model, row)["mean"])


def test_spark_reads_rows_where_they_lie(
    encoder: tuple[nn.Module, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs a Java runtime")
    import sys

    from pyspark.sql import SparkSession

    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    model, path = encoder
    ids, mask = rows()
    session = (
        SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1").getOrCreate()
    )  # fmt: skip
    try:
        schema = "ids array<bigint>, mask array<double>, i int"
        frame = session.createDataFrame(
            list(zip(ids, mask, range(21), strict=True)), schema
        ).repartition(3)
        found = dfc.map_rows(frame, path, pad=PAD, outputs={"tokens": "t", "mean": "m"})
        assert found.schema["t"].dataType.simpleString() == "array<array<float>>"
        told = {row["i"]: row for row in found.collect()}
    finally:
        session.stop()
    for i, row in enumerate(ids):
        expected = alone(model, row)
        close(told[i]["t"], expected["tokens"])
        close(told[i]["m"], expected["mean"])
