"""Preparation gives the same shards for the same rows, wherever and however they lie."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from heliograph.cluster.runtime import explained
from heliograph.datasets import shards
from heliograph.datasets.preprocess import Preprocessing
from heliograph.datasets.shards import TARGET, Manifest
from heliograph.errors import DataError
from heliograph.jobs.prepare import prepare
from heliograph.project import Data, Split


def some_table(rows: int = 300) -> pa.Table:
    draw = np.random.default_rng(1)
    kinds = np.array(["u", "v", "w"])[draw.integers(0, 3, rows)]
    return pa.table({"a": draw.normal(5, 2, rows).astype("f4"), "b": draw.integers(0, 99, rows), "y": kinds})


def write(folder, table: pa.Table, form: str, parts: int) -> None:
    folder.mkdir()
    for i in range(parts):
        piece = table.slice(i * len(table) // parts, (i + 1) * len(table) // parts - i * len(table) // parts)
        if form == "csv":
            pyarrow.csv.write_csv(piece, folder / f"{i}.csv")
        else:
            pq.write_table(piece, folder / f"{i}.parquet")


def prepared(folder, data: Data, silent) -> tuple[dict[str, list[np.ndarray]], Preprocessing, Manifest]:
    out = folder / "prepared"
    out.mkdir()
    prepare(data, folder, None, out, silent)
    manifest = Manifest.read(out)
    found = {}
    for split, pieces in manifest.splits.items():
        found[split] = []
        for piece in pieces:
            with shards.open_shard(out / piece.file, None) as shard:
                columns = shards.read_rows(shard, out / piece.file)
            assert len(columns[TARGET]) == piece.rows
            found[split].append(np.column_stack([np.asarray(columns[n]).reshape(piece.rows, -1) for n in sorted(columns)]))
    return found, Preprocessing.model_validate_json((out / "preprocess.json").read_text()), manifest


def test_order_format_and_file_layout_change_nothing(cluster, tmp_path, silent):
    table = some_table()
    shuffled = table.take(np.random.default_rng(2).permutation(len(table)))
    write(tmp_path / "one", table, "parquet", 1)
    write(tmp_path / "four", shuffled, "csv", 4)
    data = Data(source="*.parquet", target="y", shards=3)
    one, fitted, manifest = prepared(tmp_path / "one", data, silent)
    four, refitted, other = prepared(tmp_path / "four", data.model_copy(update={"source": "*.csv"}), silent)
    for split in ("train", "validation", "test"):
        assert [len(piece) for piece in one[split]] == [len(piece) for piece in four[split]]
        for mine, theirs in zip(one[split], four[split], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-6)
    assert manifest.rows("train") + manifest.rows("validation") + manifest.rows("test") == 300
    assert other.window == manifest.window

    # Fitted on the training split alone: in its shards the features have mean 0 and deviation 1, exactly.
    features = np.concatenate(one["train"])[:, :2]
    assert features.mean(0) == pytest.approx([0, 0], abs=1e-5)
    assert features.std(0) == pytest.approx([1, 1], abs=1e-5)
    whole = np.column_stack([table["a"], table["b"]]).mean(0)
    shifts = [fitted.steps[0].columns[n][0] for n in ("a", "b")]
    assert shifts != pytest.approx(list(whole), rel=1e-6)
    assert shifts == pytest.approx([refitted.steps[0].columns[n][0] for n in ("a", "b")], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split": Split(test=0.001)}, "the test split is empty: 0.001 of 300 rows; give it a larger share"),
        ({"split": Split(validation=0.0001)}, "the validation split is empty"),
        ({"split": Split(validation=0.5, test=0.4999)}, "train split"),
    ],
)
def test_an_empty_split_is_one_line_and_leaves_no_manifest(cluster, tmp_path, silent, change, reason):
    write(tmp_path / "in", some_table(), "csv", 1)
    data = Data(source="in/*.csv", target="y").model_copy(update=change)
    with pytest.raises(DataError, match=reason):
        prepare(data, tmp_path, None, tmp_path, silent)
    assert not (tmp_path / "manifest.json").exists()


def test_an_empty_cell_is_said_with_its_column_from_inside_the_cluster(cluster, tmp_path, silent):
    (tmp_path / "holes.csv").write_text("a,y\n" + "\n".join(f"{i},{'uv'[i % 2]}" for i in range(99)) + "\n,u\n")
    with pytest.raises(Exception) as caught:
        prepare(Data(source="holes.csv", target="y"), tmp_path, None, tmp_path, silent)
    mistake = explained(caught.value)
    assert isinstance(mistake, DataError)
    assert str(mistake) == "column `a`: empty, NaN or infinite in 1 rows: drop or fill them"
