"""heliograph from Python: what the command `run` does, for scripts and notebooks; `serve/here.py` has the other half.

import heliograph as hg

run = hg.run("examples/digits")
run.metrics["accuracy"]
with hg.serve(run.bundle) as served:
    served.predict([{"image": image}])
"""

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import project
from .names import Verb

if TYPE_CHECKING:
    from .jobs.display import Display

PIXELS = 640
"""Of the report's frame in a notebook."""


@dataclass(frozen=True)
class Run:
    """A run that was done to its end. In a notebook it shows its report."""

    folder: Path
    name: str
    """Of the model."""
    version: int
    registry: str
    """Where the model is; `version` is its number there."""
    report: dict[str, Any] = field(repr=False)
    """What `report.json` holds."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Figures of the test rows (`accuracy`, `rmse`, …), and `intervals`, `classes`, `slices`."""
        return self.report["test"]

    @property
    def bundle(self) -> Path:
        """The signed model."""
        return (self.folder / "bundle").resolve()

    @property
    def failed(self) -> list[str]:
        """What the project requires (`evaluate.require`) and the model did not reach: it is not for production then."""
        return self.report["validation"]["failed"]

    def _repr_html_(self) -> str:
        page = html.escape((self.folder / "report.html").read_text(), quote=True)
        return (
            f'<iframe title="{html.escape(self.name)}" srcdoc="{page}" width="100%" height="{PIXELS}" frameborder="0"></iframe>'
        )


def run(
    folder: str | Path,
    run: str | Path | None = None,
    *,
    port: int | None = None,
    registry: str | None = None,
    display: "Display | None" = None,
) -> Run:
    """Do what is not done yet of a project: prepare, train, evaluate, validate, bundle, and one sealed request.

    folder: of the project. run: the run's folder (default: PROJECT/runs/default). port, registry: instead of the project's.
    display: what shows the progress (default: a bar on a terminal, lines elsewhere). Raises the HeliographError of what is wrong;
    what was done is kept, and the same call goes on from there.
    """
    from .cluster.runtime import joined
    from .commands import run_folder, with_port, with_registry
    from .jobs import plan, report
    from .jobs.display import Display
    from .jobs.run import execute, key_store, opened
    from .jobs.track import require_mlflow, track
    from .serve import first_request
    from .serve.access import require_role

    base = Path(folder)
    loaded = with_registry(with_port(project.load(base), port), registry)
    base, held = base.resolve(), run_folder(base, None if run is None else str(run))
    require_role(key_store(loaded, base, held), Verb.TRAIN, loaded.name)
    require_mlflow(loaded)
    with opened(held, loaded.train.processes, display or Display()) as current:
        plan.note(loaded, held)
        if not joined():
            first_request.require_port(loaded, current)
        version = execute(loaded, base, current)
        if not joined():  # a cluster's own endpoints are for what it serves
            first_request.execute(loaded, base, current)
        models = loaded.registry if "://" in loaded.registry else str(Path(folder) / loaded.registry)
        made = report.write(loaded, base, current)
        track(loaded, base, current, made)
        return Run(held, loaded.name, version, models, made)
