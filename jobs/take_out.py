"""Take out: a run's model, or one of its compressed forms, as files for other programs.

    TO/model.keras, model.onnx or model.tflite   or, of a SavedModel, TO/1/saved_model.pb (what TensorFlow Serving loads)
    TO/schema.json, preprocess.json              what its inputs are, and how they are made from the features

What is written is held against the Keras model on real rows once more, and it is told by how much it differs.
"""

from pathlib import Path

from ..cluster.keys import KeyStore
from ..cluster.sealed import copy
from ..cluster.storage import publish_folder, read_json
from ..errors import RunError
from ..names import Format
from ..project import Project
from . import bundle
from .engine import FILES, TABLE, Engine, keras_model
from .export import ROWS, difference, sample, saved_model
from .run import key_store


def take_out(project: Project, base: Path, run: Path, to: Path, form: str | None, wanted: Format) -> str:
    """Write a folder; says how far what is in it is from the Keras model. Raises RunError, SignatureError, ModelError."""
    keys = key_store(project, base, run)
    whole = run / "bundle"
    if not whole.is_dir():
        raise RunError(f"{run}: holds no bundle yet: `heliograph run` makes it")
    bundle.verify(whole, keys.public_key())
    if to.exists():
        raise RunError(f"{to}: is there already: name a new folder")
    place, gap = _form(run, form) if form else (whole, 0.0)
    name = FILES["keras" if wanted == Format.SAVEDMODEL else wanted.value]
    if not (place / name).is_file():
        there = ", ".join(f.value for f in Format if f != Format.SAVEDMODEL and (place / FILES[f.value]).is_file())
        raise RunError(f"{form or project.name}: is there as {there} alone, not as {wanted}")
    shards = keys if project.data.encrypt else None
    with publish_folder(to) as folder:
        for each in ("schema.json", "preprocess.json"):
            copy(whole / each, folder / each, keys, None)
        if wanted == Format.SAVEDMODEL:
            gap = saved_model(keras_model(place, keys), run / "prepare", shards, folder / "1")
        else:
            copy(place / name, folder / name, keys, None)
            if (place / FILES["keras"]).is_file():
                gap = _difference(folder, place, wanted, run / "prepare", keys, shards)
    return f"{to}: {form or project.name} as {wanted}; on real rows it differs from the Keras model by {gap:.1e} at most"


def _form(run: Path, name: str) -> tuple[Path, float]:
    """Where a compressed form lies, and how far it was from its Keras model when it was made."""
    table = read_json(run / "compress" / TABLE)["candidates"] if (run / "compress" / TABLE).exists() else []
    row = next((row for row in table if row["name"] == name), None)
    if row is None:
        there = ", ".join(row["name"] for row in table) or "none: write `compress:` into the project file"
        raise RunError(f"{run}: has no compressed form `{name}`: it has {there}")
    return run / row["place"], row["gap"]


def _difference(folder: Path, place: Path, wanted: Format, prepared: Path, keys: KeyStore, shards: KeyStore | None) -> float:
    inputs, _ = sample(prepared, shards, "validation", ROWS)
    return difference(keras_model(place, keys), Engine(folder, prepared, 1, wanted.value, keys), inputs)  # pyright: ignore
