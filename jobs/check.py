"""Check: everything that can be wrong with a project before anything starts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..datasets.schema import Schema
from ..datasets.sources import infer_schema, open_source
from ..project import Project
from .prepare import check_steps


def check(project: Project, base: Path) -> list[str]:
    """Read the schema, build the model on it, and say what was found. Raises DataError and ModelError."""
    schema = infer_schema(open_source(project.data, base), project.data)
    check_steps(project.data, schema)
    with _silenced():
        import keras  # noqa: F401
    from .model import build, compile_parts

    model = build(project.model, schema, base)
    compile_parts(project.train, schema)
    return [
        f"source   {project.data.source}: {_features(schema)}",
        f"target   {schema.target}: {_target(schema)}",
        f"model    {model.count_params():,} parameters, {_inputs(schema)} -> {schema.outputs}",
        f"train    {project.train.epochs} epochs, {project.train.workers} workers, batches of {project.train.batch_size}",
        "ok",
    ]


@contextmanager
def _silenced() -> Iterator[None]:
    """TensorFlow's C++ prints to the terminal when it is loaded, whatever its log level."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _features(schema: Schema) -> str:
    shown = ", ".join(f.name + (f" {list(f.shape)}" if f.shape else "") for f in schema.features[:8])
    return shown + (f" and {len(schema.features) - 8} more" if len(schema.features) > 8 else "")


def _target(schema: Schema) -> str:
    return f"{len(schema.classes)} classes ({', '.join(map(str, schema.classes[:10]))})" if schema.classes else "a number"


def _inputs(schema: Schema) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in schema.inputs.items())
