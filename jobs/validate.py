"""Validate: what a bundle must reach before it may go into production, held against what was measured.

The verdict stands in the bundle's signed description, so whoever promotes it (`serve.rollout`) needs nothing else, and nobody can
change it unseen.
"""

import fnmatch
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.storage import read_json, write_bytes, write_json
from ..datasets.schema import Schema, as_fed
from ..errors import BundleError, DataError
from ..project import FILE, Project
from ..trust import LIMIT, Evaluate
from . import behaviour
from .engine import COMPRESSED, FILES, Engine
from .evaluate import METRICS, Sources, costs_of, test_rows
from .explain import require_explainable
from .export import sample
from .guard import GUARD, MOST_ROWS, REFERENCE, Guard, reference
from .slices import parsed

VERDICT = "validation.json"
CALLS = 300
"""Of one row, that are timed."""
ROWS = 64
"""That a clean process answers, too."""
EQUAL = 1e-6


def require_fits(project: Project, schema: Schema) -> None:
    """What can be known to be wrong once there is a schema. Raises DataError and ProjectError."""
    settings = project.evaluate
    if project.explain:
        require_explainable(project.explain, schema)
    parsed(settings.slices, schema, "evaluate.slices")
    costs_of(settings.costs, schema)
    behaviour.require_fits(settings.behaviour, schema)
    if settings.attack and not schema.classes:
        raise DataError(f"{FILE}: evaluate.attack: measures the accuracy that is left, which needs one target with classes")
    for name in settings.require:
        figure = name.rpartition(".")[2] if name.startswith("slice:") else name
        if schema.task == "regression" and figure in _OF_CLASSES:
            raise DataError(
                f"{FILE}: evaluate.require: `{name}` is for classes, and `{schema.target}` is a number: there are mae, rmse, r2"
            )
        if schema.task == "classification" and figure in ("mae", "rmse", "r2"):
            raise DataError(f"{FILE}: evaluate.require: `{name}` is for numbers, and `{schema.target}` has classes")
        if name.startswith("slice:") and not settings.slices:
            raise DataError(f"{FILE}: evaluate.require: `{name}` needs slices: write `slices: [...]` beside it")


_OF_CLASSES = (
    "accuracy", "balanced_accuracy", "roc_auc", "average_precision", "log_loss", "brier", "ece", "mcc", "top_3", "top_5",
    "precision", "recall", "f1", "robust_accuracy", "cost",
)  # fmt: skip


def validate(
    sources: Sources, settings: Evaluate, evaluated: Path, extra: dict[str, Any], compressed: Path | None, folder: Path,
    update: Callable[..., None],
) -> None:  # fmt: skip
    """Write `reference.json` and `guard.npz` (see `guard`), and `validation.json`: {gates, behaviour, latency_ms, size_mb,
    reload_gap, failed}. extra: figures of other stages.
    compressed: the folder of the chosen form, if there is one. Raises BundleError when a clean process answers otherwise."""
    figures = read_json(evaluated / METRICS)
    update("loading the model in a clean process")
    engine, columns = sources.engine(), test_rows(sources, None)[0]
    gap = _reloaded(sources, engine)
    update("timing the model")
    form = COMPRESSED if compressed else "model"
    kind: Any = next(k for k, name in FILES.items() if ((compressed or sources.trained) / name.replace("model", form)).is_file())
    answering = Engine(compressed, sources.prepared, 1, kind, sources.sealing, COMPRESSED) if compressed else engine
    times = _times(answering)
    file = (compressed or sources.trained) / FILES[kind].replace("model", form)
    said: dict[str, Any] = {"latency_ms": times, "size_mb": round(file.stat().st_size / 1e6, 4), "reload_gap": gap}
    if settings.behaviour:
        update("trying its behaviour")
        said["behaviour"] = behaviour.run(settings.behaviour, engine, columns)
    beside = {
        "latency_p50_ms": times["p50"], "latency_p99_ms": times["p99"], "size_mb": said["size_mb"], **extra,
        "membership_advantage": figures.get("membership", {}).get("advantage"), "cost": figures.get("costs", {}).get("cost"),
    }  # fmt: skip
    if settings.behaviour:
        beside["behaviour"] = float(np.mean([test["ok"] for test in said["behaviour"]]))
    said["gates"] = [_gate(name, limit, figures, beside) for name, limit in settings.require.items()]
    said["failed"] = [gate["text"] for gate in said["gates"] if not gate["passed"]]
    update("learning what rows are familiar")
    write_json(folder / REFERENCE, reference(engine, sources, columns).model_dump())
    held = {n: as_fed(v) for n, v in engine.preprocessing.apply(columns).items()}
    learnt, _ = sample(sources.prepared, sources.keys, "train", MOST_ROWS)
    write_bytes(folder / GUARD, Guard.fit(learnt, held).dump())
    write_json(folder / VERDICT, said)


def _gate(name: str, limit: str, figures: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
    found = re.fullmatch(LIMIT, limit)
    assert found
    least, bound = found["sign"] == ">=", float(found["value"])
    value: float | None
    shown = name
    if name.startswith("slice:"):
        pattern, _, figure = name.removeprefix("slice:").rpartition(".")
        every = [(s[figure], s["slice"]) for s in figures["slices"] if figure in s and fnmatch.fnmatchcase(s["slice"], pattern)]
        if not every:
            names = ", ".join(s["slice"] for s in figures["slices"])
            raise DataError(f"{FILE}: evaluate.require: `{name}` means no slice: there are {names}")
        value, where = (min if least else max)(every)
        shown = f"{figure} of {where}"
    elif found["ci"]:
        value = figures.get("intervals", {}).get(name, [None, None])["high" in found["ci"]]
        shown = f"{name} {found['ci']}"
    else:
        value = beside.get(name, figures.get(name))
    passed = value is not None and (value >= bound if least else value <= bound)
    told = "not known" if value is None else f"{value:.4g}"
    return {
        "gate": name, "limit": limit, "value": value, "passed": passed,
        "text": f"{shown} is {told}, {found['sign']} {bound:g} is required",
    }  # fmt: skip


def _times(engine: Engine) -> dict[str, float]:
    """Milliseconds of one row."""
    rows, seconds = engine.zeros(1), []
    for _ in range(CALLS):
        began = time.perf_counter()
        engine.forward(rows)
        seconds.append(time.perf_counter() - began)
    return {f"p{q}": round(1000 * float(np.quantile(seconds, q / 100)), 4) for q in (50, 99)}


def _reloaded(sources: Sources, engine: Engine) -> float:
    """The largest difference between the answers of this process and of a new one that has nothing but the files."""
    own = engine.predict(test_rows(sources, ROWS)[0])
    with tempfile.TemporaryDirectory(prefix="heliograph-") as temp:
        out = Path(temp) / "answers.npy"
        command = [sys.executable, "-m", "heliograph.jobs.reload", str(out)]
        done = subprocess.run(command, input=pickle.dumps(sources), capture_output=True, check=False)  # noqa: S603  ours
        if done.returncode:
            last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason was given"])[-1]
            raise BundleError(f"{sources.trained}: cannot be loaded in a new process: {last[:200]}")
        other = np.load(out)
    gap = float(np.abs(own - other).max())
    if gap > EQUAL:
        raise BundleError(
            f"{sources.trained}: answers otherwise in a new process (by {gap:.1e}): the model keeps something aside"
        )
    return gap
