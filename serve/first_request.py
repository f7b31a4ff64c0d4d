"""The end of a run: its bundle behind real HTTP, one row of the test split sealed, sent, answered and opened."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..cluster.runtime import LOOPBACK, LocalCluster
from ..cluster.storage import write_json
from ..datasets import shards
from ..datasets.schema import Columns, Schema, to_instances, to_numpy
from ..datasets.shards import TARGET, Manifest
from ..jobs.display import silenced
from ..jobs.engine import Engine
from ..jobs.registry import alone
from ..jobs.run import key_store
from ..jobs.stages import Run, Stage
from ..project import Project
from .client import Client
from .endpoint import Endpoint, check_port, start


def execute(project: Project, base: Path, run: Run) -> None:
    """The stage `predict`: writes `request.json`, with the endpoint's answer, the local model's and the truth."""
    keys, cluster = key_store(project, base, run.folder), run.cluster
    assert isinstance(cluster, LocalCluster)

    def work(folder: Path) -> None:
        models = alone(folder / "registry", project.name, run["bundle"])  # whatever the project's holds
        # Among the processes of this run alone, so nobody needs a token or a certificate.
        private = {"host": LOOPBACK, "tls": False, "access": "open", "jwt": None, "encrypted": "accepted"}
        endpoint = Endpoint(project.name, models, keys, project.serve.model_copy(update=private))
        run.display.update(f"starting the endpoint on {endpoint.url}")
        columns, truth, schema = _test_row(run["prepare"], keys if project.data.encrypt else None)
        row = to_instances(columns, schema)
        with Client(start(endpoint, cluster), project.name, trust=keys.public_key()) as client:
            run.display.update("sending one sealed request")
            started = time.monotonic()
            answered = client.predict(row)[0]
            seconds = time.monotonic() - started
        with silenced():  # one of these answered
            own = [e.predict(columns)[0] for e in Engine.allowed(run["bundle"], 1, project.serve.engine, keys)]
        by_target = answered if schema.tasks else {schema.target: answered}
        answer = np.concatenate([np.atleast_1d(by_target[alone.target]) for alone, _ in schema.parts])
        said = [
            _said(np.atleast_1d(by_target[a.target]), t, a) for (a, _), t in zip(schema.parts, np.atleast_1d(truth), strict=True)
        ]
        seen: dict[str, Any] = said[0] if len(said) == 1 else {
            "prediction": ", ".join(f"{a.target} {s['prediction']}" for (a, _), s in zip(schema.parts, said, strict=True)),
            "truth": ", ".join(str(s["truth"]) for s in said),
        }  # fmt: skip
        gap = min(float(np.abs(answer - each).max()) for each in own)
        shutil.rmtree(models.folder)
        write_json(folder / "request.json", {**seen, "gap_to_local_model": gap, "seconds": round(seconds, 4), "inputs": row[0]})

    run.execute(Stage("predict", ("bundle",), project.serve.model_dump(), work))


def _said(answer: np.ndarray, truth: Any, alone: Schema) -> dict[str, Any]:
    """Of one target: what was predicted, how sure, and what is true."""
    if not alone.classes:
        return {"prediction": float(answer[0]), "truth": float(truth)}
    known = alone.classes[int(truth)] if np.isfinite(truth) and truth >= 0 else "not known"
    return {"prediction": alone.classes[int(answer.argmax())], "probability": float(answer.max()), "truth": known}


def require_port(project: Project, run: Run) -> None:
    """Raises PortInUse before any work, where the run would end on a port that something else holds."""
    if not run["predict"].is_dir():
        check_port(project.serve)


def _test_row(prepared: Path, keys: KeyStore | None) -> tuple[Columns, Any, Schema]:
    schema = Schema.read(prepared)
    file = prepared / Manifest.read(prepared).splits["test"][0].file
    with shards.open_shard(file, keys) as shard:
        table = shards.read_table(shard, file, [0]).slice(0, 1)
    return schema.columns(table), to_numpy(table.column(TARGET))[0], schema
