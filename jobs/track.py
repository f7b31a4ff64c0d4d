"""MLflow: a finished run as a run of its tracking server, or of a folder, so that it stands beside those of other tools."""

import importlib.util
import os
import re
import time
from pathlib import Path
from typing import Any

from ..cluster.storage import read_json, write_json
from ..errors import ProjectError, StorageError
from ..project import FILE, Project
from .stages import Run
from .watch import METRICS, read_lines

NOTE = "mlflow.json"
LONGEST = 500
"""Characters of a parameter's value."""
BATCH = 500
"""Metrics that are sent at once."""


def require_mlflow(project: Project) -> None:
    """Raises ProjectError where the project asks for MLflow and it is not installed."""
    if project.mlflow and importlib.util.find_spec("mlflow") is None:
        raise ProjectError(f"{FILE}: mlflow: is not installed: `pip install heliograph[mlflow]`")


def track(project: Project, base: Path, run: Run, report: dict[str, Any]) -> None:
    """Log parameters (every key of the project file), metrics (each epoch's and the test rows'), report and model card; once for
    what a run made. Raises StorageError where MLflow cannot be reached."""
    if project.mlflow is None:
        return
    made, note = run.fingerprints["bundle"], run.folder / NOTE
    if note.exists() and read_json(note).get("bundle") == made:
        return
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow keeps folders as they are, and asks whether one knows
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    where = project.mlflow if "://" in project.mlflow else (base / project.mlflow).resolve().as_uri()
    try:
        client = MlflowClient(tracking_uri=where)
        known = client.get_experiment_by_name(project.name)
        experiment = known.experiment_id if known else client.create_experiment(project.name)
        logged = client.create_run(experiment, run_name=run.folder.name).info.run_id
        settings = _flat(project.model_dump(mode="json", exclude_defaults=True))
        params = [Param(re.sub(r"[^\w\-./: ]", "_", key), str(value)[:LONGEST]) for key, value in settings.items()]
        now = int(1000 * time.time())
        metrics = [
            Metric(key, float(value), now, int(line["epoch"])) for line in read_lines(run["train"] / METRICS)
            for key, value in line.items() if key != "epoch" and isinstance(value, int | float)
        ]  # fmt: skip
        metrics += [Metric(f"test_{k}", v, now, 0) for k, v in report["test"].items() if isinstance(v, float)]
        tags = [RunTag("heliograph.bundle", made), RunTag("heliograph.source", project.data.source)]
        for first in range(0, max(len(metrics), 1), BATCH):
            client.log_batch(logged, metrics[first : first + BATCH], params[:100] if not first else [], tags if not first else [])
        for file in (run.folder / "report.html", run["bundle"] / "README.md"):
            client.log_artifact(logged, str(file))
        client.set_terminated(logged, "FINISHED" if not report["validation"]["failed"] else "FAILED")
    except MlflowException as error:
        raise StorageError(f"{FILE}: mlflow: {where}: {str(error).splitlines()[0]}") from None
    write_json(note, {"bundle": made, "run": logged, "uri": where})


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """`{a: {b: 1}}` as `{"a.b": 1}`."""
    if not isinstance(value, dict) or not value:
        return {name: value} if name else {}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else str(key)).items()}
