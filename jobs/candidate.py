"""A candidate of compression: what a recipe makes of the trained model, in an actor that makes one after the other.

FOLDER/1-prune/        the training that a step is (a job's folder, without its checkpoints when it is done)
FOLDER/model.onnx      what is served: ONNX, LiteRT, or both where nothing was rounded
FOLDER/candidate.json  what was found out about it; written last
"""

import gzip
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.fit import Bundle
from ..cluster.runtime import explained
from ..cluster.sealed import Seal, read
from ..cluster.storage import write_json
from ..datasets.schema import Schema
from ..errors import ModelError
from ..project import Stop, Train
from ..recipes import AnyStep, Distil, Numbers, Prune, Trains
from .engine import FILES, RUNTIMES, Engine, Kind, keras_model
from .evaluate import judged
from .export import ROWS, answers, export, quantised, sample
from .group import Ranks, ready
from .shaping import Shrinking, sparsity
from .steps import claim
from .worker import Job

CANDIDATE = "candidate.json"
ROUNDS = 10
ROUND_SECONDS = 0.05


@dataclass(frozen=True)
class Task:
    """job: what all trainings share. trained: the folder of the model that recipes begin with; teachers: of each step."""

    name: str
    steps: tuple[AnyStep, ...]
    folder: Path
    job: Job
    trained: Path
    teachers: tuple[tuple[Path, ...], ...]

    @property
    def last(self) -> Path:
        """The folder of the Keras model that is converted."""
        trained = [self.place(i) for i, step in enumerate(self.steps) if isinstance(step, Trains)]
        return trained[-1] if trained else self.trained

    @property
    def numbers(self) -> Numbers | None:
        return self.steps[-1] if isinstance(self.steps[-1], Numbers) else None

    def place(self, i: int) -> Path:
        """The folder of a step."""
        return self.folder / f"{i + 1}-{self.steps[i].step}"


class Maker:
    """here: how many workers of recipes are on a machine at the same time; each: what a worker takes."""

    def __init__(self, here: int, each: Bundle):
        self.here, self.ranks = here, Ranks(here, each)

    def make(self, task: Task) -> str:
        """Make a candidate, as far as it is not made; why it cannot be made, or nothing."""
        began = time.monotonic()
        try:
            source = task.trained
            for i, step in enumerate(task.steps):
                if isinstance(step, Trains):
                    self._train(task, i, step, source)
                    source = task.place(i)
            if task.job.train.fewest_workers == 1:
                finish(task, began, self.here)
            else:  # not here: TensorFlow forms groups only where it has not computed yet
                import ray

                last: Any = ray.remote(num_cpus=0, max_calls=1)(finish)
                ray.get(last.remote(task, began, self.here))
        except Exception as error:
            if found := explained(error):
                return str(found)
            raise
        return ""

    def _train(self, task: Task, i: int, step: Trains, source: Path) -> None:
        folder = task.place(i)
        if (folder / "result.json").exists():
            return
        assert task.job.sealing
        where = f"compress.recipes.{task.name}[{i}]"
        shrinking = Shrinking(step, source, task.teachers[i], task.job.sealing, where)
        job = replace(task.job, train=settings(task.job.train, step), folder=folder, shrinking=shrinking)
        ready(job)
        self.ranks.train(job)
        if not (folder / "result.json").exists():
            raise InterruptedError(task.name)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def settings(train: Train, step: Trains) -> Train:
    """Of the training that a step is."""
    default = train.epochs if isinstance(step, Distil) else max(3, math.ceil(train.epochs / 3))
    rate = step.learning_rate or train.optimizer.learning_rate
    return train.model_copy(
        update={
            "epochs": step.epochs or default,
            "optimizer": train.optimizer.model_copy(update={"learning_rate": rate}),
            "stop": Stop(),
            "swa": None,
            "workers": train.fewest_workers,
            "export": "last" if isinstance(step, Prune) else train.export,  # the best epoch may be one before all is pruned
        }
    )


def finish(task: Task, began: float, here: int) -> None:
    """From the last Keras model to what is served, and what there is to say about it."""
    import keras

    job, numbers, folder = task.job, task.numbers, task.folder
    claim(here, 2)
    keras.backend.clear_session()
    folder.mkdir(parents=True, exist_ok=True)
    seal = Seal.make(folder, job.sealing) if job.train.encrypt and job.sealing else None
    model = keras_model(task.last, job.sealing)
    if numbers:
        quantised(model, numbers, job.prepared, job.keys, folder, seal)
    else:
        export(model, job.prepared, job.keys, folder, seal)
    note = described(task.name, folder, model, job)
    write_json(folder / CANDIDATE, note | {"seconds": round(time.monotonic() - began, 1)})


def described(name: str, folder: Path, model: Any, job: Job) -> dict[str, Any]:
    """What there is to say about a form of a model without its timings. Raises ModelError where it answers no numbers."""
    kinds: list[Kind] = [kind for kind in RUNTIMES if (folder / FILES[kind]).is_file()]
    engine = Engine(folder, job.prepared, 1, kinds[0], job.sealing)
    inputs, _ = sample(job.prepared, job.keys, "validation", ROWS)
    own, found = answers(model, inputs), engine.forward(inputs)
    if not np.isfinite(found).all():
        raise ModelError(f"{name}: {FILES[kinds[0]]} answers numbers that are not finite: more bits are needed")
    classes = bool(Schema.read(job.prepared).classes)
    contents = {kind: read(folder / FILES[kind], Seal.of(folder, job.sealing)) for kind in kinds}
    return {
        "name": name,
        "engines": {kind: {"bytes": len(c), "gzip": len(gzip.compress(c))} for kind, c in contents.items()},
        "gap": float(np.abs(own - found).max()),
        "agrees": float((own.argmax(1) == found.argmax(1)).mean()) if classes else None,
        "parameters": model.count_params(),
        "sparsity": round(sparsity(model), 4),
        "validation": judged(engine, job.prepared, "validation", job.keys),
        "test": judged(engine, job.prepared, "test", job.keys),
    }


def original(task: Task) -> dict[str, Any]:
    """The same of the model that recipes begin with."""
    claim(1, 2)
    return described("original", task.trained, keras_model(task.trained, task.job.sealing), task.job)


def timings(forms: list[tuple[Path, Kind]], job: Job) -> list[dict[str, float]]:
    """Milliseconds of a call, of 1 row and of 32, the median and the 99th percentile: all in turn, on one thread of a process in
    which nothing else is done."""
    engines = [Engine(folder, job.prepared, 1, kind, job.sealing) for folder, kind in forms]
    taken: list[dict[int, list[float]]] = [{1: [], 32: []} for _ in engines]
    for round_ in range(-1, ROUNDS):
        for engine, times in zip(engines, taken, strict=True):
            for rows, found in times.items():
                inputs, end = engine.zeros(rows, random=True), time.perf_counter() + ROUND_SECONDS
                while True:
                    started = time.perf_counter()
                    engine.forward(inputs)
                    now = time.perf_counter()
                    if round_ >= 0:
                        found.append(1000 * (now - started))
                    if now > end:
                        break
    return [
        {f"p{p}_{rows}": round(float(np.percentile(found, p)), 5) for rows, found in times.items() for p in (50, 99)}
        for times in taken
    ]
