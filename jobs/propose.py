"""A project for a data file: what its columns suggest, written out as a project file that a person can change."""

import os
from pathlib import Path

import pyarrow as pa
import yaml

from ..datasets.schema import Schema, listed
from ..datasets.sources import PieceSource, open_source
from ..errors import DataError
from ..project import FILE, Data
from .prepare import sniff
from .presets import proposed

USUAL = ("target", "label", "class", "y", "outcome", "species", "category", "price", "survived", "churn", "default")
"""Names of targets, in this order."""
FEW, MANY = 5_000, 100_000
"""Rows."""
STEPS = 3_000
"""That a training takes, about."""


def columns_of(source: str) -> pa.Table:
    """The first rows of a source, as `found` says it. Raises DataError."""
    return _opened(Data(source=source)).head()


def _opened(data: Data) -> PieceSource:
    source = open_source(data, Path.cwd())
    assert isinstance(source, PieceSource)  # a function has no place from which it could be opened
    return source


def likely_target(head: pa.Table) -> str:
    """The column that people would want to predict: by its name, else the last one."""
    by_name = {name.lower(): name for name in head.column_names}
    return next((by_name[name] for name in USUAL if name in by_name), head.column_names[-1])


def found(given: str) -> str:
    """A source as it can be opened from anywhere. Raises DataError for a file that is not there."""
    if "://" in given:
        return given
    path = Path(given).expanduser()
    if not any(c in given for c in "*?[") and not path.exists():
        raise DataError(f"{given}: not found: name a file, a folder of images, a glob, s3://… or sklearn://digits")
    return str(path.absolute())


def _says_nothing(head: pa.Table, name: str) -> str:
    """Why a column is left out: it names its row, or never changes. Empty for others."""
    values = head.column(name).combine_chunks()
    kind = values.type
    if len(head) < 20 or pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType) or pa.types.is_binary(kind):
        return ""
    distinct = len(values.unique())
    if distinct == 1:
        return "never changes"
    if distinct < len(head) or values.null_count:
        return ""
    if pa.types.is_integer(kind):
        numbers = sorted(values.to_pylist())
        return "numbers the rows" if numbers[-1] - numbers[0] == len(numbers) - 1 else ""
    if pa.types.is_string(kind) and max(len(v.split()) for v in values.to_pylist()) == 1:
        return "names each row"
    return ""


def propose(name: str, source: str, head: pa.Table, target: str, folder: Path) -> str:
    """The text of the project file of `folder`. source: as `found` says it; head: its `columns_of`. Raises DataError."""
    if target not in head.column_names:
        raise DataError(f"{source}: has no column `{target}`: its columns are {listed(head.column_names)}")
    left = {n: why for n in head.column_names if n != target and (why := _says_nothing(head, n))}
    features = [n for n in head.column_names if n not in (target, *left)] if left else None
    data = Data(source=source, target=target, features=features)
    schema, preprocessing = sniff(data, folder)
    rows, preset = _rows(data), proposed(schema)
    shown = source if "://" in source else os.path.relpath(source, folder.absolute())
    lines = [f"# {_sentence(schema, rows)} `heliograph check` shows what was found; every key: README.md.", f"name: {name}", ""]
    lines += ["data:", f"  source: {_quoted(shown)}", f"  target: {_quoted(target)}"]
    for column, why in left.items():
        lines.append(f"  # `{column}` {why}, so it is no feature")
    if features:
        lines.append(f"  features: {_listed(features)}")
    lines.append("  split: {validation: 0.15, test: 0.15, seed: 0}")
    if any(f.kind == "image" for f in schema.features):
        columns = _listed([f.name for f in schema.features if f.kind == "image"])
        lines += ["  preprocess:", f"    - {{step: resize, columns: {columns}, height: 64, width: 64}}"]
        lines.append("  augment: {flip: horizontal, rotate: 10, scale: 0.1, translate: 0.1}")
    elif preprocessing.steps:
        lines.append("  # by default, columns of these kinds are prepared so; write `preprocess` to change it:")
        lines += [f"  #   {step.step}: {listed(list(step.columns))}" for step in preprocessing.steps]
    lines += ["", "model:", f"  preset: {preset}"]
    lines.append("  # a model of your own instead: `build: model:build`, a function in model.py")
    if preset == "tabular" and rows > FEW:
        lines.append("  hp: {width: 256, depth: 2, dropout: 0.1}")
    lines += ["", *_training(preset, rows), ""]
    lines += ["explain: {rows: 100}", ""]
    lines += ["serve:", "  port: 8000", ""]
    return "\n".join(lines)


def _rows(data: Data) -> int:
    source = _opened(data)
    return sum(len(chunk.table) for piece in source.pieces() for chunk in source.read(piece, [data.one]))


def _training(preset: str, rows: int) -> list[str]:
    """Keys that train a preset well on so many rows: few rows, many epochs and a strong decay of weights."""
    batch = 32 if rows < FEW else 128 if rows < MANY else 512
    rate = {"tabular": 0.003, "image": 0.003, "text": 0.001}[preset]
    decay = 0.3 if rows < FEW and preset == "tabular" else 0.01
    least, most = {"tabular": (5, 60), "image": (3, 30), "text": (3, 15)}[preset]
    epochs = max(least, min(most, STEPS * batch // max(1, rows)))
    return [
        "train:",
        f"  epochs: {epochs}",
        f"  batch_size: {batch}",
        f"  optimizer: {{name: adamw, learning_rate: {rate}, weight_decay: {decay}}}",
        "  schedule: {name: CosineDecay}",
    ]


def _sentence(schema: Schema, rows: int) -> str:
    kind = f"{len(schema.classes)} classes" if schema.classes else "a number"
    return f"Predicts `{schema.target}` ({kind}) from {len(schema.features)} columns of {rows:,} rows."


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, width=1000).removesuffix("...\n").strip()


def _listed(names: list[str]) -> str:
    return yaml.safe_dump(names, default_flow_style=True, width=100_000).strip()


def written(folder: Path, text: str) -> None:
    """A new project file; nothing is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("x") as file:
        file.write(text)
