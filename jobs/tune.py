"""Tune: search the project's keys that `tune.space` names, with Ray Tune, each trial a training job.

    RUN/tune/trials.jsonl     a line whenever a trial begins, waits or ends: see `record`
    RUN/tune/trials/0007      what a trial trained; the checkpoints of the best ones stay
    RUN/tune/data/…           the data of trials that search keys of `data`
    RUN/tune/best             the best configuration as a project that can be run
    RUN/tune/report.html      history, what each parameter did, and how much it mattered; search.html is that for other reports

The first is all that there is to know: a search that was killed goes on from it.
"""

import re
import shutil
from pathlib import Path

import yaml

from ..cluster import storage
from ..cluster.runtime import joined
from ..datasets.sources import open_source
from ..errors import ModelError, ProjectError
from ..project import FILE, Project
from .choice import Choice, said
from .record import DONE, FAILED, OVER, PAUSED, RUNNING, Record
from .run import code_of, key_store, registry
from .search import Config
from .space import configured, metrics_of, settings_of, space_of, tune_of
from .stages import Run, hashed
from .trials import Search


def tune(project: Project, base: Path, run: Run) -> list[str]:
    """Search until the budget is used or nothing new is left; says what was found.

    Raises ProjectError, and ModelError when every trial fails."""
    space, settings, metrics = space_of(project), tune_of(project), metrics_of(project)
    _require_prices(project)
    folder = run.folder / "tune"
    about = {"source": open_source(project.data, base).identity(), "code": code_of(base), "metric": metrics[0]}
    record = Record(folder, hashed(about), space, settings_of(project))
    if len(record.of(*OVER)) < settings.trials or record.of(PAUSED, RUNNING):
        Search(project, base, run, record).run()
    done = record.of(*DONE)
    if not done:
        failed = record.of(FAILED)
        raise ModelError(f"every trial failed; the last because: {failed[-1].why if failed else 'none was run'}")
    choice = Choice(project, done)
    _keep(folder / "trials", {t.number for t in choice.ranked[: settings.keep]})
    _write_best(project, base, run, folder / "best", choice.best.config)
    from .tune_report import write

    write(folder, project.name, space, record.of(*OVER), choice)
    lines = [f"{len(done)} trials, {len(record.of(FAILED))} failed; {choice.said}:"]
    lines += [f"  {choice.values(t)}  trial {t.number}  {said(t.config)}" for t in choice.ranked[:5]]
    return [*lines, f"report: {folder / 'report.html'}; train the best to the end: heliograph run {folder / 'best'}"]


def _require_prices(project: Project) -> None:
    if tune_of(project).dollars is None:
        return
    capacity = joined()
    if capacity is None:
        raise ProjectError(f"{FILE}: tune.dollars: is counted by a cluster's prices: `heliograph submit --tune` sends it to one")
    if unknown := [g.name for g in (capacity.head, *capacity.groups) if g.dollars is None]:
        names = ", ".join(unknown)
        raise ProjectError(f"{FILE}: tune.dollars: nodes without a price: {names}: write `dollars_per_hour` beside them")


def _keep(trials: Path, best: set[int]) -> None:
    """Checkpoints of the best trials stay, figures of all."""
    for folder in trials.glob("[0-9]*"):
        if int(folder.name) not in best:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _write_best(project: Project, base: Path, run: Run, folder: Path, config: Config) -> None:
    """A project beside the search: its files are copies, its paths lead to where the first one's led."""
    value = configured(project, config).model_dump(mode="json", exclude_unset=True)
    source = project.data.source
    if "://" not in source and not re.fullmatch(r"\w+:\w+", source):
        value["data"]["source"] = str((base / Path(source).expanduser()).resolve())
    value["keys"] = str(key_store(project, base, run.folder).folder)
    value["registry"] = str(registry(project, base))
    folder.mkdir(parents=True, exist_ok=True)
    for file in base.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    text = f"# The best of `heliograph tune`: {said(config)}\n" + yaml.safe_dump(value, sort_keys=False)
    storage.write_bytes(folder / FILE, text.encode())
