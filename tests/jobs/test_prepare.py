"""Preparation gives the same shards for the same rows, wherever and however they lie, and however often it is killed."""

import json
import random
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from heliograph.cluster.keys import DATA_KEY, KeyStore
from heliograph.cluster.runtime import explained
from heliograph.datasets import shards
from heliograph.datasets.preprocess import Preprocessing
from heliograph.datasets.schema import Schema
from heliograph.datasets.shards import TARGET, WEIGHT, Manifest
from heliograph.errors import DataError
from heliograph.jobs import prepare as preparing
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


def failed(data: Data, folder, silent) -> DataError:
    with pytest.raises(Exception) as caught:
        prepare(data, folder, None, folder, silent)
    mistake = explained(caught.value)
    assert isinstance(mistake, DataError), caught.value
    assert not (folder / "manifest.json").exists()
    return mistake


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
    shifts = [fitted.steps[0].columns[n]["shift"] for n in ("a", "b")]
    assert shifts != pytest.approx(list(whole), rel=1e-6)
    assert shifts == pytest.approx([refitted.steps[0].columns[n]["shift"] for n in ("a", "b")], rel=1e-6)


def test_many_buckets_and_pieces_make_the_shards_that_one_makes(cluster, tmp_path, silent, monkeypatch):
    write(tmp_path / "one", some_table(2000), "parquet", 1)
    write(tmp_path / "many", some_table(2000), "parquet", 7)
    data = Data(source="*.parquet", target="y", shards=3)
    *_, one = prepared(tmp_path / "one", data, silent)
    monkeypatch.setattr(preparing, "BUCKET_BYTES", 700)
    *_, many = prepared(tmp_path / "many", data, silent)
    assert [s.rows for s in one.splits["train"]] == [s.rows for s in many.splits["train"]]
    assert one.splits["test"] == many.splits["test"]  # raw rows: equal to the byte


def test_a_run_that_is_killed_ten_times_ends_with_the_same_manifest(cluster, tmp_path, silent):
    import ray

    write(tmp_path / "in", some_table(6000), "parquet", 12)
    keys = KeyStore(tmp_path / "keys")
    keys.rotate(DATA_KEY)
    data = Data(source="in/*.parquet", target="y", shards=6)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    prepare(data, tmp_path, keys, undisturbed, silent)
    expected = Manifest.read(undisturbed)
    code = f"""
import ray, sys
from pathlib import Path
from heliograph.cluster.keys import KeyStore
from heliograph.jobs.prepare import prepare
from heliograph.project import Data
ray.init(address={ray.get_runtime_context().gcs_address!r}, log_to_driver=False)
print("ready", flush=True)
base = Path({str(tmp_path)!r})
prepare(Data.model_validate_json({data.model_dump_json()!r}), base, KeyStore(base / "keys"), base / sys.argv[1], lambda *_: None)
"""
    draw, kills = random.Random(5), 0
    for attempt in range(60):
        out = tmp_path / f"killed-{attempt}"
        out.mkdir()
        ended = False
        while not ended:
            child = subprocess.Popen(
                [sys.executable, "-c", code, out.name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            try:
                assert child.stdout.readline() == "ready\n", child.stderr.read()
                if kills < 10:
                    try:
                        child.wait(draw.uniform(0.1, 3.0))
                    except subprocess.TimeoutExpired:
                        child.send_signal(signal.SIGKILL)
                        kills += 1
                _, errors = child.communicate(timeout=120)
                assert child.returncode in (0, -signal.SIGKILL), errors
                ended = child.returncode == 0
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        assert Manifest.read(out) == expected
        assert (out / "preprocess.json").read_text() == (undisturbed / "preprocess.json").read_text()
        left, wanted = ({f.name for f in folder.iterdir() if not f.name.startswith(".")} for folder in (out, undisturbed))
        assert left == wanted
        for piece in expected.splits["train"]:
            with shards.open_shard(out / piece.file, keys) as shard:
                assert len(shards.read_rows(shard, out / piece.file)[TARGET]) == piece.rows
        if kills == 10:
            break
    assert kills == 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split": Split(test=0.0001)}, "the test split is empty: 0.0001 of 300 rows; give it a larger share"),
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


def test_bad_rows_go_to_quarantine_and_too_many_stop_the_run(cluster, tmp_path, silent):
    lines = ["a,b,y"] + [f"{i},{i % 7},{'uv'[i % 2]}" for i in range(200)]
    lines[20] = "x,1,u"
    lines[30] = "1,2,u,extra"
    lines[40] = "inf,2,u"
    lines[50] = "1,2,"
    lines[60] = ",2,u"
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    steps = [{"step": "standardise"}]
    data = Data.model_validate({"source": "rows.csv", "target": "y", "preprocess": steps})
    mistake = str(failed(data, tmp_path, silent))
    assert mistake.startswith(
        "rows.csv: 5 of 200 rows cannot be used (data.max_bad_rows allows 0.001): rows.csv:31: 4 cells, not 3;"
    )
    for part in (
        "rows.csv:21: `a` not a number",
        "rows.csv:41: `a` infinite",
        "rows.csv:51: `y` empty",
        "rows.csv:61: `a` empty",
    ):
        assert part in mistake
    assert len(mistake.splitlines()) == 1

    out = tmp_path / "out"
    out.mkdir()
    prepare(data.model_copy(update={"max_bad_rows": 0.05}), tmp_path, None, out, silent)
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {"row": "rows.csv:41", "column": "a", "reason": "infinite"} in rows
    assert len(rows) == 5
    manifest = Manifest.read(out)
    assert sum(manifest.rows(split) for split in ("train", "validation", "test")) == 195
    profile = json.loads((out / "profile.json").read_text())
    assert (profile["bad_rows"], profile["rows"]["train"]) == (5, manifest.rows("train"))


def test_an_empty_cell_is_filled_where_nothing_else_is_said(cluster, tmp_path, silent):
    (tmp_path / "holes.csv").write_text("a,y\n" + "\n".join(f"{i},{'uv'[i % 2]}" for i in range(99)) + "\n,u\n")
    out = tmp_path / "out"
    out.mkdir()
    prepare(Data(source="holes.csv", target="y"), tmp_path, None, out, silent)
    assert [f.optional for f in Schema.read(out).features] == [True]
    assert sum(Manifest.read(out).rows(s) for s in ("train", "validation", "test")) == 100


def test_every_kind_of_column_reaches_its_shards(cluster, tmp_path, silent):
    """Text, times, lists, weights; the test split raw, the others as the model reads them."""
    draw = np.random.default_rng(3)
    rows = [
        {"n": float(draw.normal()) if i % 9 else None, "kind": "uvw"[i % 3], "said": f"word{i % 40} and more words here",
         "when": f"2024-0{1 + i % 9}-01T00:00:00", "bag": [1.0] * (i % 4), "w": 1.0 + i % 2, "y": i * 0.5}
        for i in range(400)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [
        {"step": "impute"}, {"step": "robust_scale", "columns": ["n"]}, {"step": "one_hot", "columns": ["kind"]},
        {"step": "tokenise", "length": 5}, {"step": "pad", "length": 3}, {"step": "date_parts", "parts": ["month"]},
    ]  # fmt: skip
    data = Data.model_validate(
        {"source": "rows.jsonl", "target": "y", "weight": "w", "types": {"when": "time"}, "preprocess": steps}
    )
    out = tmp_path / "out"
    out.mkdir()
    prepare(data, tmp_path, None, out, silent)
    schema = Schema.read(out)
    assert schema.task == "regression"
    assert schema.inputs == {"features": (1 + 3 + 2,), "said": (5,), "bag": (3,)}
    state = Preprocessing.model_validate_json((out / "preprocess.json").read_text())
    manifest = Manifest.read(out)
    for split in ("train", "test"):
        file = out / manifest.splits[split][0].file
        with shards.open_shard(file, None) as shard:
            table = shards.read_table(shard, file)
        if split == "train":
            assert set(table.column_names) == {"features", "said", "bag", TARGET, WEIGHT}
        else:
            made = state.apply(schema.columns(table))
            assert {n: v.shape[1:] for n, v in made.items()} == schema.inputs
        weights = table.column(WEIGHT).to_numpy()
        assert set(weights) <= {1.0, 2.0}
        assert ((table.column(TARGET).to_numpy() * 2 % 2 + 1) == weights).all()


def test_a_function_of_the_project_gives_rows_as_a_ray_dataset(cluster, tmp_path, silent):
    (tmp_path / "mine.py").write_text(
        "import ray.data\n\n\ndef rows():\n    return ray.data.range(500).map(lambda r: {'x': r['id'] * 1.0, 'y': r['id'] % 2})\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    prepare(Data(source="mine:rows", target="y"), tmp_path, None, out, silent)
    manifest = Manifest.read(out)
    assert sum(manifest.rows(s) for s in ("train", "validation", "test")) == 500
    again = tmp_path / "again"
    again.mkdir()
    prepare(Data(source="mine:rows", target="y"), tmp_path, None, again, silent)
    assert Manifest.read(again) == manifest


def test_broken_images_are_quarantined(cluster, tmp_path, silent):
    from PIL import Image

    draw = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(draw.integers(0, 255, (12, 10, 3), np.uint8)).save(tmp_path / "pets" / kind / f"{i}.jpg")
    whole = (tmp_path / "pets" / "cat" / "3.jpg").read_bytes()
    (tmp_path / "pets" / "cat" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pets" / "dog" / "5.jpg").write_text("no image")
    data = Data.model_validate(
        {"source": "pets", "preprocess": [{"step": "resize", "height": 6, "width": 6}], "max_bad_rows": 0.1}
    )
    out = tmp_path / "out"
    out.mkdir()
    prepare(data, tmp_path, None, out, silent)
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == ["cat/3.jpg", "dog/5.jpg"]
    manifest = Manifest.read(out)
    file = out / manifest.splits["train"][0].file
    with shards.open_shard(file, None) as shard:
        columns = shards.read_rows(shard, file)
    assert columns["image"].dtype == np.uint8
    assert columns["image"].shape[1:] == (6, 6, 3)


def test_a_profile_finds_drift_and_rows_that_are_nearly_the_same(cluster, tmp_path, silent):
    draw = np.random.default_rng(0)
    twins = draw.normal(size=(300, 5))
    x = np.concatenate([twins, twins + 1e-5, draw.normal(size=(400, 5))])
    table = pa.table({f"x{i}": x[:, i] for i in range(5)} | {"flat": np.ones(1000), "y": np.arange(1000) % 2})
    pq.write_table(table, tmp_path / "t.parquet")
    out = tmp_path / "out"
    out.mkdir()
    prepare(Data(source="t.parquet", target="y", split=Split(test=0.2)), tmp_path, None, out, silent)
    found = json.loads((out / "profile.json").read_text())
    assert found["near_duplicates"] > 50
    assert any("has one value only" in w for w in found["warnings"])
    assert any("nearly in the training split" in w for w in found["warnings"])
    first = found["columns"][0]
    assert sum(first["histogram"]) == pytest.approx(found["rows"]["train"], abs=2)
    assert first["mean"] == pytest.approx(0, abs=0.1)
    assert not any("differs" in w for w in found["warnings"])


def test_rows_without_a_target_are_all_training_rows_where_the_project_says_so(tmp_path, cluster, silent):
    """Numbers and text, half of them without one."""
    import csv

    from heliograph.datasets.ingest import Part

    for name, target in (("text", ["a", "b", ""]), ("number", ["0", "1", "", "2"]), ("value", ["0.5", "1.25", ""])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["x", "kind"])
            out.writerows([[i * 0.37, target[i % len(target)]] for i in range(300)])
        data = Data(source=f"{name}.csv", target="kind", unlabelled=True, shards=2, split=Split(test=0.2, validation=0.2))
        folder = tmp_path / name
        folder.mkdir()
        prepare(data, tmp_path, None, folder, silent)
        manifest, empty = Manifest.read(folder), 300 // len(target)
        assert manifest.unlabelled == empty
        assert sum(manifest.rows(split) for split in ("train", "validation", "test")) == 300
        found = {
            split: np.concatenate(
                [Part(folder, manifest, split, None, 0, 1, 8, None).read_window(w, 1)[TARGET] for w in range(1)]
            )
            for split in ("train", "validation")
        }
        none = [np.isnan(t) if name == "value" else t == -1 for t in found.values()]
        assert [int(n.sum()) for n in none] == [empty, 0]
        if name != "value":
            assert sum(manifest.class_rows) == manifest.rows("train") - empty
            assert len(Schema.read(folder).classes) == len(target) - 1
        with pytest.raises(DataError, match="cannot be used"):
            prepare(data.model_copy(update={"unlabelled": False}), tmp_path, None, folder, silent)
