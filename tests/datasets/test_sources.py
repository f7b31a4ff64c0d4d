"""The same rows from scikit-learn, Parquet and CSV."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from heliograph.datasets.sources import infer_schema, open_source
from heliograph.errors import DataError
from heliograph.project import Data


def write(folder, form: str, parts: int = 2) -> None:
    table = pa.table({"a": np.arange(10.0), "b": np.arange(10), "y": ["u", "v"] * 5})
    for i in range(parts):
        piece = table.slice(i * 10 // parts, 10 // parts)
        if form == "csv":
            pyarrow.csv.write_csv(piece, folder / f"{i}.csv")
        else:
            pq.write_table(piece, folder / f"{i}.parquet")


@pytest.mark.parametrize("form", ["parquet", "csv"])
@pytest.mark.parametrize("pattern", ["", "*.{form}", "0.{form}"])
def test_a_file_a_folder_and_a_glob_are_read(tmp_path, form, pattern):
    write(tmp_path, form, 1 if pattern.startswith("0") else 2)
    data = Data(source=pattern.format(form=form) or ".", target="y")
    source = open_source(data, tmp_path)
    assert len(source.table()) == 10
    assert source.table(["b"], limit=3).to_pydict() == {"b": [0, 1, 2]}
    schema = infer_schema(source, data)
    assert schema.classes == ("u", "v")
    assert schema.inputs == {"features": (2,)}


def test_digits_are_images():
    data = Data(source="sklearn://digits", target="target")
    schema = infer_schema(open_source(data, None), data)  # pyright: ignore[reportArgumentType]
    assert schema.input_shape == (8, 8)
    assert schema.classes == tuple(range(10))


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("nothing.csv", {}, "nothing.csv: not found"),
        ("*.csv", {"target": "z"}, r"\*.csv: has no column `z`: its columns are `a`, `b`, `y`"),
        ("*.csv", {"features": ["c"]}, "has no column `c`"),
        ("*.csv", {"features": ["y"]}, "`y` is the target, it cannot be a feature too"),
        ("*.csv", {"target": "a"}, "column `y` is string: features are numbers so far"),
        ("sklearn://faces", {}, "no such set: there are digits, iris"),
        ("ftp://x/y", {}, "unknown kind of source `ftp`"),
        ("mixed", {}, "files of one kind are needed"),
        ("broken.parquet", {}, "cannot be read as parquet"),
        ("empty.csv", {}, "has no rows"),
    ],
)
def test_a_source_that_is_not_usable_is_one_line(tmp_path, source, options, reason):
    write(tmp_path, "csv")
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed", "csv")
    write(tmp_path / "mixed", "parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "empty.csv").write_text("a,y\n")
    data = Data(**{"source": source, "target": "y", **options})
    with pytest.raises(DataError, match=reason) as caught:
        infer_schema(open_source(data, tmp_path), data)
    assert len(str(caught.value).splitlines()) == 1
