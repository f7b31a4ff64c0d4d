"""Predictions of a whole file by an endpoint: streamed, with its progress told, and resumable."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import typer

from ..datasets.sources import FileSource, open_source
from ..errors import DataError, RequestError
from ..jobs.display import Display
from ..project import Data
from .client import Client, read_rows

Row = dict[str, Any]
"""`prediction` and, of classes, `probabilities`; of several targets each begins with the target's name."""
Target = tuple[str, list[Any]]
"""How its columns begin, and its classes."""


def predict(client: Client, rows: Path, out: Path | None, batch: int) -> None:
    """Print a line for each row, or write them to `out`. Raises RequestError, EndpointError, DataError.

    rows: JSON is sent as it stands, anything else as Arrow in requests of `batch` rows.
    """
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise DataError(f"{out}: predictions are written as .csv or .jsonl: name such a file")
    alone = read_rows(rows) if str(rows) == "-" or rows.suffix == ".json" else None
    schema = client.schema()
    targets = [(f"{task['name']} ", task["classes"]) for task in schema["tasks"]] or [("", schema["classes"])]
    if alone is not None:
        _write([_as_row(answer, targets) for answer in client.predict(alone)], targets, out, 0)
        return
    done = _answered(out)
    display = Display()
    with display.open(), display.stage("predict"):
        for first, table in _batches(rows, [f["name"] for f in schema["features"]], batch, done):
            try:
                answer = client.predict_table(table)
            except RequestError as error:
                raise RequestError(f"{rows}: rows {first} to {first + len(table) - 1} (from 0): {error}") from None
            _write(answer.to_pylist(), targets, out, first)
            display.update(f"{first + len(table):,} rows")


def _batches(file: Path, features: list[str], batch: int, done: int) -> Iterator[tuple[int, pa.Table]]:
    """(number of its first row, rows) from row `done` on."""
    source = open_source(Data(source=str(file.resolve()), target="-"), file.parent)
    assert isinstance(source, FileSource)
    at = 0
    for piece in source.pieces():
        for chunk in source.read(piece):
            if chunk.skipped:
                raise DataError(f"{chunk.where}: {chunk.skipped[0]}: mend it, and run again to go on")
            table = chunk.table.select([n for n in chunk.table.column_names if n in features])
            for first in range(0, len(table), batch):
                rows = table.slice(first, batch)
                if at + len(rows) > done:
                    skip = max(0, done - at)
                    yield at + skip, rows.slice(skip)
                at += len(rows)


def _answered(out: Path | None) -> int:
    """Rows that `out` holds; a line that was cut off is removed."""
    if out is None or not out.exists():
        return 0
    with out.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return max(0, content.count(b"\n") - (out.suffix == ".csv"))


def _as_row(answer: Any, targets: list[Target]) -> Row:
    """What JSON says of a row, as Arrow's columns say it."""
    row: Row = {}
    for of, classes in targets:
        found = answer[of[:-1]] if of else answer
        row[f"{of}prediction"] = classes[found.index(max(found))] if classes else found
        if classes:
            row[f"{of}probabilities"] = found
    return row


def _write(rows: list[Row], targets: list[Target], out: Path | None, first: int) -> None:
    """first: the number of the first of them."""
    if out is None:
        for row in rows:
            said = (
                f"{row[f'{of}prediction']}\t{max(row[f'{of}probabilities']):.4f}" if classes else f"{row[f'{of}prediction']:.6g}"
                for of, classes in targets
            )
            typer.echo("\t".join(said))
        return
    with out.open("w" if first == 0 else "a", newline="") as file:
        if out.suffix == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            if first == 0:
                writer.writerow(
                    [name for of, classes in targets for name in (f"{of}prediction", *(f"{of}p({c})" for c in classes))]
                )
            for row in rows:
                writer.writerow([v for of, _ in targets for v in (row[f"{of}prediction"], *row.get(f"{of}probabilities", ()))])
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
