"""Preprocessing a table that is larger than the memory it is given, beside pandas and scikit-learn in one process.

    uv run python bench/prepare.py [repeats] [gigabytes]

Both read the same Parquet files (numbers with holes, short texts, a time), split the rows, fit on the training rows, fill
holes with the mean, standardise, make texts one-hot and the time periodic, and write float32 Parquet files of each split.
heliograph also checks each row, hashes it, sorts all of them, and encrypts what it writes. Its object store is limited to
1 GiB; its memory is the sum over all its processes, Ray's included, of what each has to itself and its share of the rest.
Seconds are of the work alone; the start of Ray (of Python and its imports, for the other) is printed apart.
"""

import contextlib
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from common import answer, child, finish, in_turn

NUMBERS, TEXTS, FILES = 36, 4, 16
ROW_BYTES = 8 * (NUMBERS + 2) + 8 * TEXTS


def make(folder: Path, gigabytes: float) -> int:
    """Files of some gigabytes, as Arrow has them in memory; how many rows they have."""
    rows = int(gigabytes * 1e9 / ROW_BYTES / FILES)
    for i in range(FILES):
        rng = np.random.default_rng(i)
        columns = {}
        for j in range(NUMBERS):
            values = rng.normal(j, 1 + j, rows)
            columns[f"n{j}"] = pa.array(values, mask=rng.random(rows) < 0.02 if j % 4 == 0 else None)
        for j in range(TEXTS):
            known = pa.array([f"v{j}-{k}" for k in range(5 + 8 * j)])
            columns[f"t{j}"] = known.take(pa.array(rng.integers(0, len(known), rows)))
        columns["when"] = pa.array(rng.integers(1_500_000_000, 1_700_000_000, rows) * 10**6, pa.timestamp("us"))
        columns["y"] = pa.array(rng.integers(0, 2, rows))
        pq.write_table(pa.table(columns), folder / f"{i:02d}.parquet", row_group_size=100_000, compression="zstd")
    return rows * FILES


def ours(folder: Path, out: Path) -> None:
    """A child: prints [seconds of the work, of the start]."""
    from heliograph.cluster.keys import DATA_KEY, KeyStore
    from heliograph.cluster.runtime import LocalCluster
    from heliograph.jobs.prepare import prepare
    from heliograph.project import Data

    started = time.perf_counter()
    keys = KeyStore(out / "keys")
    keys.rotate(DATA_KEY)
    with LocalCluster(1, object_store_bytes=1 << 30) as cluster:
        cluster.start()
        start = time.perf_counter() - started
        started = time.perf_counter()
        said: dict[str, float] = {}
        prepare(
            Data(source=str(folder), target="y"),
            folder,
            keys,
            out,
            lambda text, *_: said.setdefault(text, time.perf_counter() - started),
        )
        print([time.perf_counter() - started, start], {k: round(v, 1) for k, v in said.items()}, file=sys.stderr)
        print([time.perf_counter() - started, start])


def theirs(folder: Path, out: Path) -> None:
    """A child: the same with pandas and scikit-learn."""
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

    def periodic(frame):
        when = frame["when"]
        turns = [(when.dt.month - 1) / 12, when.dt.weekday / 7, (when.dt.hour + when.dt.minute / 60) / 24]
        found = [f(2 * np.pi * turn) for turn in turns for f in (np.sin, np.cos)]
        return np.stack([(when.dt.year - 2000) / 25, *found], axis=1).astype("float32")

    started = time.perf_counter()
    frame = pd.read_parquet(folder)
    rest, test = train_test_split(frame, test_size=0.1, random_state=0)
    del frame
    train, validation = train_test_split(rest, test_size=1 / 9, random_state=0)
    del rest
    numbers, texts = [f"n{i}" for i in range(NUMBERS)], [f"t{i}" for i in range(TEXTS)]
    steps = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), numbers),
            ("texts", OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32), texts),
            ("when", FunctionTransformer(periodic), ["when"]),
        ]
    )
    steps.fit(train.drop(columns="y"))
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        writer = None
        for first in range(0, len(part), 500_000):  # in parts, for memory
            piece = part.iloc[first : first + 500_000]
            made = steps.transform(piece.drop(columns="y")).astype("float32")
            columns = {"features": pa.FixedShapeTensorArray.from_numpy_ndarray(made), "y": piece["y"].to_numpy()}
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(out / f"{name}.parquet", table.schema, compression="none")
            writer.write_table(table)
        writer.close()
    print([time.perf_counter() - started, 0.0])


def watched(name: str, folder: Path) -> tuple[float, float]:
    """(seconds of the work, gigabytes at the peak over all processes)."""
    out = Path(tempfile.mkdtemp(dir=folder.parent))
    process = child(__file__, name, str(folder), str(out))
    peak, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(2):
            total = 0
            with contextlib.suppress(psutil.Error):
                for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        total += each.memory_full_info().pss
            peak[0] = max(peak[0], total / 2**30)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        seconds, start = answer(process)
    finally:
        done.set()
        thread.join()
        shutil.rmtree(out)
    print(f"  {name}: {seconds:.1f} s of work after {start:.1f} s of start, {peak[0]:.2f} GiB at the peak", flush=True)
    return seconds, peak[0]


def main(repeats: int, gigabytes: float) -> None:
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        (base / "in").mkdir()
        rows = make(base / "in", gigabytes)
        print(f"{rows:,} rows of {ROW_BYTES} bytes in memory", flush=True)
        peaks: dict[str, list[float]] = {"ours": [], "theirs": []}

        def measured(name: str) -> float:
            seconds, peak = watched(name, base / "in")
            peaks[name].append(peak)
            return rows / seconds

        speeds = in_turn(
            repeats, {"heliograph": lambda: measured("ours"), "pandas + scikit-learn": lambda: measured("theirs")}, "rows/s"
        )
        ratio = float(np.median(speeds["heliograph"]) / np.median(speeds["pandas + scikit-learn"]))
        finish({"vs_pandas_sklearn": ratio, "peak_gib": max(peaks["ours"]), "their_peak_gib": max(peaks["theirs"])})
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ours", folder, out]:
            ours(Path(folder), Path(out))
        case ["theirs", folder, out]:
            theirs(Path(folder), Path(out))
        case given:
            main(int(given[0]) if given else 2, float(given[1]) if len(given) > 1 else 4.0)
