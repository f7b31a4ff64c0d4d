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


def predict(client: Client, rows: Path, out: Path | None, batch: int) -> None:
    """Print a line for each row, or write them to `out`. Raises RequestError, EndpointError, DataError.

    rows: JSON is sent as it stands, anything else as Arrow in requests of `batch` rows.
    """
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise DataError(f"{out}: predictions are written as .csv or .jsonl: name such a file")
    alone = read_rows(rows) if str(rows) == "-" or rows.suffix == ".json" else None
    schema = client.schema()
    classes = schema["classes"]
    if schema["tasks"]:
        raise DataError(f"{rows}: the model answers {schema['target']}: ask it from Python, or predict a dataset")
    if alone is not None:
        answers = client.predict(alone)
        best = [max(range(len(classes)), key=a.__getitem__) if classes else None for a in answers]
        found = [(a if b is None else classes[b], None if b is None else a) for a, b in zip(answers, best, strict=True)]
        _write(found, classes, out, 0)
        return
    done = _answered(out)
    display = Display()
    with display.open(), display.stage("predict"):
        for first, table in _batches(rows, [f["name"] for f in schema["features"]], batch, done):
            try:
                answer = client.predict_table(table)
            except RequestError as error:
                raise RequestError(f"{rows}: rows {first} to {first + len(table) - 1} (from 0): {error}") from None
            scores = answer.column("probabilities").to_pylist() if classes else [None] * len(answer)
            _write(list(zip(answer.column("prediction").to_pylist(), scores, strict=True)), classes, out, first)
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


def _write(found: list[tuple[Any, Any]], classes: list[Any], out: Path | None, first: int) -> None:
    """found: (prediction, probabilities or None) of each row."""
    if out is None:
        for prediction, scores in found:
            typer.echo(f"{prediction}\t{max(scores):.4f}" if scores else f"{prediction:.6g}")
        return
    with out.open("w" if first == 0 else "a", newline="") as file:
        if out.suffix == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            if first == 0:
                writer.writerow(["prediction", *(f"p({c})" for c in classes)])
            writer.writerows([prediction, *(scores or [])] for prediction, scores in found)
        else:
            for prediction, scores in found:
                file.write(json.dumps({"prediction": prediction} | ({"probabilities": scores} if scores else {})) + "\n")
