"""The same rows from every kind of file, from S3 and from a function; and rows that are none."""

import json
import subprocess
import sys
import time
import urllib.request
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from heliograph.cluster.runtime import free_port
from heliograph.datasets import sources
from heliograph.datasets.sources import open_source
from heliograph.errors import DataError
from heliograph.jobs.prepare import sniff
from heliograph.project import Data
from PIL import Image

TABLE = pa.table({"a": np.arange(10.0), "b": np.arange(10), "y": ["u", "v"] * 5})


def tfrecord(table: pa.Table, file) -> None:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(file)) as out:
        for row in table.to_pylist():
            feature = {
                "a": tf.train.Feature(float_list=tf.train.FloatList(value=[row["a"]])),
                "b": tf.train.Feature(int64_list=tf.train.Int64List(value=[row["b"]])),
                "y": tf.train.Feature(bytes_list=tf.train.BytesList(value=[row["y"].encode()])),
            }
            out.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())


def write(folder, form: str, parts: int = 2) -> None:
    for i in range(parts):
        piece = TABLE.slice(i * 10 // parts, 10 // parts)
        file = folder / f"{i}.{form}"
        if form == "csv":
            pyarrow.csv.write_csv(piece, file)
        elif form == "parquet":
            pq.write_table(piece, file)
        elif form == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in piece.to_pylist()))
        elif form == "npz":
            np.savez(file, a=piece["a"].to_numpy(), b=piece["b"].to_numpy(), y=np.array(piece["y"].to_pylist()))
        else:
            tfrecord(piece, file)


def chunks(source, columns=None) -> list[sources.Chunk]:
    return [chunk for piece in source.pieces() for chunk in source.read(piece, columns)]


def every(source, columns=None) -> pa.Table:
    return pa.concat_tables([chunk.table for chunk in chunks(source, columns)])


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl", "npz", "tfrecord"])
@pytest.mark.parametrize("pattern", ["", "*.{form}", "0.{form}"])
def test_a_file_a_folder_and_a_glob_are_read(tmp_path, form, pattern):
    write(tmp_path, form, 1 if pattern.startswith("0") else 2)
    data = Data(source=pattern.format(form=form) or ".", target="y", types={"y": "text"})
    source = open_source(data, tmp_path)
    whole = every(source)
    assert [float(v) for v in whole["a"].to_pylist()] == TABLE["a"].to_pylist()
    assert every(source, ["b"]).to_pydict() == {"b": list(range(10))}
    schema, _ = sniff(data, tmp_path)
    assert schema.classes == ("u", "v")
    assert schema.inputs == {"features": (2,)}


def test_hive_partitions_are_columns(tmp_path):
    for year in (2023, 2024):
        folder = tmp_path / f"year={year}" / "kind=old"
        folder.mkdir(parents=True)
        pq.write_table(TABLE, folder / "x.parquet")
    found = every(open_source(Data(source=".", target="y"), tmp_path), ["year", "a", "kind"])
    assert found["year"].to_pylist() == [2023] * 10 + [2024] * 10
    assert set(found["kind"].to_pylist()) == {"old"}


def test_digits_are_images_and_wine_is_numbers():
    schema, _ = sniff(Data(source="sklearn://digits", target="target"), None)
    assert schema.input_shape == (8, 8)
    assert schema.classes == tuple(range(10))
    schema, _ = sniff(Data(source="sklearn://diabetes", target="target"), None)
    assert schema.task == "regression"
    assert schema.inputs == {"features": (10,)}


def test_images_come_from_class_folders_or_from_a_table_of_labels(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (5, 4), (i * 40, 0, 0)).save(tmp_path / "pets" / kind / f"{i}.png")
    folders = every(open_source(Data(source="pets"), tmp_path))
    assert folders["label"].to_pylist() == ["cat"] * 3 + ["dog"] * 3
    assert folders["path"].to_pylist()[0] == "cat/0.png"
    table = pa.table({"file": folders["path"], "kind": folders["label"]})
    pyarrow.csv.write_csv(table, tmp_path / "pets" / "labels.csv")
    by_table = every(open_source(Data(source="pets/labels.csv", target="kind", types={"file": "image"}), tmp_path))
    assert by_table["file"].to_pylist() == folders["image"].to_pylist()
    schema, _ = sniff(Data(source="pets/labels.csv", target="kind", types={"file": "image"}), tmp_path)
    assert (schema.classes, schema.inputs) == (("cat", "dog"), {"file": (128, 128, 3)})


def test_rows_keep_their_place_and_ragged_lines_are_told_by_their_number(tmp_path):
    lines = ["a,y"] + [f"{i},{'uv'[i % 2]}" for i in range(20)]
    lines.insert(5, "1,u,extra")
    lines.insert(9, "2")
    (tmp_path / "r.csv").write_text("\n".join(lines) + "\n")
    (chunk,) = chunks(open_source(Data(source="r.csv", target="y"), tmp_path))
    assert [(s.row, s.reason) for s in chunk.skipped] == [("r.csv:6", "3 cells, not 2"), ("r.csv:10", "1 cells, not 2")]
    assert [lines[int(chunk.name(i).split(":")[1]) - 1].split(",")[0] for i in range(20)] == [str(i) for i in range(20)]

    (tmp_path / "r.jsonl").write_text('{"a": 1}\nbroken\n\n[1]\n{"a": 2}\n')
    (chunk,) = chunks(open_source(Data(source="r.jsonl", target="y"), tmp_path))
    assert [s.row for s in chunk.skipped] == ["r.jsonl:2", "r.jsonl:4"]
    assert [chunk.name(0), chunk.name(1)] == ["r.jsonl:1", "r.jsonl:5"]


def test_nothing_of_python_is_left_to_the_threads_of_arrow(tmp_path, monkeypatch):
    # Seen as "terminate called without an active exception" where a command ended just then.
    (tmp_path / "r.csv").write_text("a,y\n" + "1,u\n" * 100)
    source, given, open_csv = open_source(Data(source="r.csv"), tmp_path), [], pyarrow.csv.open_csv

    def spied(opened, reading, parsing, convert):
        given.append(weakref.ref(parsing.invalid_row_handler))
        return open_csv(opened, reading, parsing, convert)

    monkeypatch.setattr(pyarrow.csv, "open_csv", spied)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]  # so that threads are late
    try:
        left = 0
        for _ in range(2000):
            source.head()
            left += given.pop()() is not None
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert left == 0


def test_a_large_file_is_read_in_pieces_and_the_rows_are_those(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 4000)
    numbers = np.arange(3000)
    table = pa.table({"n": numbers, "y": numbers % 2})
    pq.write_table(table, tmp_path / "big.parquet", row_group_size=100)
    np.savez(tmp_path / "big.npz", n=numbers, y=numbers % 2)
    for name in ("big.parquet", "big.npz"):
        source = open_source(Data(source=name, target="y"), tmp_path)
        assert len(source.pieces()) > 3
        assert every(source)["n"].to_pylist() == numbers.tolist()
        found = chunks(source)
        assert [c.name(0).split(":")[1] for c in found] == [str(c.table["n"][0]) for c in found]


@pytest.fixture
def s3(monkeypatch):
    """An S3 of somebody else's (moto), on loopback."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(200):
            try:
                urllib.request.urlopen(url, timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        given = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        sources._s3.cache_clear()
        yield
    finally:
        server.kill()
        server.wait()
        sources._s3.cache_clear()


def test_s3_is_read_with_credentials_and_endpoint_found_the_aws_way(tmp_path, s3):
    import boto3

    write(tmp_path, "parquet")
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="rows")
    for file in tmp_path.iterdir():
        client.upload_file(str(file), "rows", f"deep/er/{file.name}")
    for given in ("s3://rows/deep", "s3://rows/deep/*/*.parquet", "s3://rows/deep/er/0.parquet"):
        source = open_source(Data(source=given, target="y"), tmp_path)
        assert every(source, ["b"])["b"].to_pylist() == list(range(5 if given.endswith("0.parquet") else 10))
        assert all(len(entry) == 3 for entry in source.identity())
    for wrong, reason in (("s3://rows/nothing", "not found|cannot be listed"), ("s3://gone/x", "cannot be listed|not found")):
        with pytest.raises(DataError, match=reason):
            open_source(Data(source=wrong, target="y"), tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("nothing.csv", {}, "nothing.csv: not found"),
        ("*.csv", {"target": "z"}, r"\*.csv: has no column `z`: its columns are `a`, `b`, `y`"),
        ("*.csv", {"features": ["c"]}, "has no column `c`"),
        ("*.csv", {"features": ["y"]}, "`y` is the target, it cannot be a feature too"),
        ("sklearn://faces", {}, "no such set: there are digits, iris"),
        ("ftp://x/y", {}, "unknown kind of source `ftp`"),
        ("gone:rows", {}, "gone.py: not found"),
        ("mixed", {}, "files of one kind are needed"),
        ("broken.parquet", {}, "broken.parquet: cannot be read as parquet"),
        ("short.parquet", {}, "short.parquet: cannot be read as parquet"),
        ("empty.csv", {}, "has no rows"),
        ("twice.csv", {}, "names a column twice"),
        ("notes.txt", {}, "of no known format"),
        ("types", {}, r"1.parquet: column `a` is string, in 0.parquet it is double"),
        ("uneven.npz", {}, "different numbers of rows"),
    ],
)
def test_a_source_that_is_not_usable_is_one_line(tmp_path, source, options, reason):
    write(tmp_path, "csv")
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed", "csv")
    write(tmp_path / "mixed", "parquet")
    (tmp_path / "types").mkdir()
    pq.write_table(TABLE, tmp_path / "types" / "0.parquet")
    pq.write_table(TABLE.set_column(0, "a", pa.array(["x"] * 10)), tmp_path / "types" / "1.parquet")
    whole = (tmp_path / "types" / "0.parquet").read_bytes()
    (tmp_path / "short.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "empty.csv").write_text("a,y\n")
    (tmp_path / "twice.csv").write_text("a,a,y\n1,2,3\n")
    (tmp_path / "notes.txt").write_text("hello")
    np.savez(tmp_path / "uneven.npz", a=np.zeros(3), y=np.zeros(4))
    data = Data(**{"source": source, "target": "y", **options})
    with pytest.raises(DataError, match=reason) as caught:
        sniff(data, tmp_path)
        every(open_source(data, tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_no_credentials_are_no_reason_to_wait(tmp_path, monkeypatch):
    """What cannot be reached is said at once, not after minutes of retries."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    sources._s3.cache_clear()
    try:
        with pytest.raises(DataError, match="cannot be listed"):
            open_source(Data(source="s3://rows/x", target="y"), tmp_path)
    finally:
        sources._s3.cache_clear()
