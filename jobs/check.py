"""Check: everything that can be wrong with a project before anything starts."""

import math
from pathlib import Path
from typing import Any

from ..cluster.runtime import LocalCluster
from ..datasets.preprocess import Preprocessing
from ..datasets.schema import Feature, Schema
from ..datasets.sources import FunctionSource, open_source
from ..project import FILE, Project
from ..recipes import Channels, Prune
from .display import silenced
from .prepare import sniff


def check(project: Project, base: Path) -> list[str]:
    """Read the schema, build the model on it, and say what was found. Raises DataError and ModelError."""
    with LocalCluster() as cluster:
        if isinstance(open_source(project.data, base), FunctionSource):
            cluster.start()  # a Ray Dataset can be looked at by Ray alone
        schema, preprocessing = sniff(project.data, base)
    with silenced():
        import keras  # noqa: F401
    from .engine import keras_model
    from .fuse import places_of
    from .model import build, check_shapes, compile_parts
    from .private import require_private
    from .run import key_store, registry
    from .transfer import find
    from .validate import require_fits

    own, keys, models = project.model, key_store(project, base, base / "runs" / "default"), registry(project, base)
    if own.fuse:
        for i, place in enumerate(places_of(own.fuse, base, keys, models)):
            check_shapes(keras_model(place, keys), schema, f"{FILE}: model.fuse.members[{i}]: {own.fuse.members[i]}")
        described = f"{len(own.fuse.members)} models become one by {own.fuse.by}"
    else:
        if own.start:
            own = own.started_from(find(own.start.model, base, keys, models))
        model = build(own, schema, base)
        _check_recipes(project, model)
        if project.train.privacy:
            require_private(model)
        described = f"{model.count_params():,} parameters, {_inputs(schema)} -> {schema.outputs}{_trains(model)}"
    compile_parts(project.train, schema)
    require_fits(project, schema)
    return [
        f"source   {project.data.source}: {_features(schema)}",
        f"prepare  {_steps(preprocessing)}",
        *(f"target   {alone.target}: {_target(alone)}" for alone, _ in schema.parts),
        f"model    {described}",
        f"train    {project.train.epochs} epochs, {project.train.workers} workers, batches of {project.train.batch_size}",
        "ok",
    ]


def _check_recipes(project: Project, model: Any) -> None:
    """The layers that recipes name, where they begin with the model as it is. Raises ModelError."""
    from .channels import narrowed
    from .shaping import kernels

    for name, steps in project.compress.recipes.items() if project.compress else ():
        where = f"{FILE}: compress.recipes.{name}[0]"
        match steps[0]:
            case Prune() as step:
                kernels(model, step.layers, where)
            case Channels() as step:
                narrowed(model, step.share, step.layers, where)


def _trains(model: Any) -> str:
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    return "" if trained == model.count_params() else f"; {trained:,} of them train"


def _features(schema: Schema) -> str:
    shown = ", ".join(map(_feature, schema.features[:8]))
    return shown + (f" and {len(schema.features) - 8} more" if len(schema.features) > 8 else "")


def _feature(feature: Feature) -> str:
    kind = str(list(feature.shape)) if feature.kind == "tensor" else "" if feature.kind == "number" else feature.kind
    return " ".join(filter(None, (feature.name, kind, "(may be empty)" if feature.optional else "")))


def _steps(preprocessing: Preprocessing) -> str:
    shown = []
    for step in preprocessing.steps:
        names = list(step.columns)
        shown.append(f"{step.step} {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else ""))
    return "; ".join(shown) or "as it is"


def _target(schema: Schema) -> str:
    return f"{len(schema.classes)} classes ({', '.join(map(str, schema.classes[:10]))})" if schema.classes else "a number"


def _inputs(schema: Schema) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in schema.inputs.items())
