"""Tune: search the project's keys that `tune.space` names, with Ray Tune, each trial a training job.

    RUN/tune/trials.jsonl     a line whenever a trial begins, and when it ends: its configuration, its value or why it has none
    RUN/tune/trials/0007      what a trial trained; the checkpoints of the best ones stay
    RUN/tune/best             the best configuration as a project that can be run
    RUN/tune/report.html      history, what each parameter did, and how much it mattered

`trials.jsonl` is all that there is to know: a search that was killed goes on from it, first with the trials that had begun. Its
trials count for a changed space too, as long as they lie in it, the data and the metric are the same.
"""

import itertools
import json
import logging
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..cluster import storage
from ..cluster.runtime import quieten
from ..errors import ModelError, ProjectError
from ..project import FILE, Project, Range, Tune
from .course import falls
from .demand import MOST_PARALLEL
from .run import code_of, key_store, preparation, registry
from .search import SEARCHES, Config, Dimension, Space, expected_improvement
from .stages import Run
from .watch import read_lines
from .worker import Job

log = logging.getLogger("heliograph")
SEARCHED = ("train.", "model.hp.", "data.augment.")
RETRIES = 1
"""Of a trial that fails."""


def space_of(project: Project) -> Space:
    """The space that a project names. Raises ProjectError with a line for each mistake."""
    tune = _tune(project)
    problems = []
    for key, given in tune.space.items():
        where = f"{FILE}: tune.space.{key}"
        if not key.startswith(SEARCHED):
            problems.append(f"{where}: cannot be searched: keys of train, model.hp and data.augment can")
        elif key.startswith("model.hp.") and key.removeprefix("model.hp.") not in project.model.hp:
            have = ", ".join(project.model.hp) or "none"
            problems.append(f"{where}: model.hp has no such parameter: it has {have}")
        for other in given.when:
            if other not in itertools.takewhile(lambda name, key=key: name != key, tune.space):
                problems.append(f"{where}: when: `{other}` is not searched before it")
        ends = given.choice or given.uniform or given.log_uniform or given.integer or []
        for value in ends if not problems else ():
            try:
                configured(project, {key: value})
            except ValidationError as error:
                said = error.errors()[0]["msg"].removeprefix("Value error, ").removeprefix("Input ")
                problems.append(f"{where}: {value!r}: {said}")
                break
    try:
        space = Space({key: _dimension(given) for key, given in tune.space.items()}, tuple(tune.constraints))
    except ValueError as error:
        problems.append(f"{FILE}: tune.constraints: {error}")
    if not tune.space:
        problems.append(f"{FILE}: tune.space: is empty: name a key, such as train.optimizer.learning_rate, and its range")
    metric, measured = metric_of(project)[0], _measured(project)
    if metric not in measured:
        problems.append(f"{FILE}: tune.metric: {metric} is not measured: {', '.join(measured)} are")
    if project.train.batch_size == "auto" and "train.batch_size" not in tune.space:
        problems.append(f"{FILE}: train.batch_size: auto is found for one model at a time: name a number to tune with")
    if problems:
        raise ProjectError("\n".join(problems))
    return space  # pyright: ignore[reportPossiblyUnboundVariable]


def _tune(project: Project) -> Tune:
    if project.tune is None:
        raise ProjectError(f"{FILE}: tune: is missing: a section with at least `space`, key to range")
    return project.tune


def _dimension(given: Range) -> Dimension:
    when = tuple((key, tuple(values)) for key, values in given.when.items())
    if given.choice is not None:
        return Dimension(choices=tuple(given.choice), when=when)
    low, high = given.uniform or given.log_uniform or given.integer or [0, 1]
    return Dimension(low, high, given.log or given.log_uniform is not None, given.integer is not None, given.step, (), when)


def metric_of(project: Project) -> tuple[str, str]:
    """(metric, `max` or `min`)."""
    tune = _tune(project)
    regression = project.data.task == "regression" or (project.train.loss or "").startswith("mean")
    metric = tune.metric or ("val_loss" if regression else "val_accuracy")
    return metric, tune.mode or ("min" if falls(metric) else "max")


def _measured(project: Project) -> list[str]:
    metrics = project.train.metrics or ["accuracy", "mean_absolute_error", "mae"]
    names = ["loss", *metrics]
    return [*names, *(f"val_{name}" for name in names if project.data.split.validation)]


def configured(project: Project, config: Config) -> Project:
    """A project with some of its keys set. Raises pydantic's ValidationError."""
    value = project.model_dump(exclude_unset=True, exclude={"tune"})
    for key, given in config.items():
        *path, last = key.split(".")
        here = value
        for part in path:
            here = here.setdefault(part, {})
        here[last] = given
    return Project.model_validate(value)


class Record:
    """What is known of the trials of a folder. about: what trials must share to count for each other."""

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.file, self.about = folder / "trials.jsonl", about
        self.trials: dict[int, dict[str, Any]] = {}
        for line in read_lines(self.file):
            self.trials.setdefault(line["number"], {}).update(line)

    def write(self, number: int, **said: Any) -> None:
        line = {"number": number, **said, "time": round(time.time(), 1)}
        self.trials.setdefault(number, {}).update(line)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, space: Space, *statuses: str) -> list[dict[str, Any]]:
        known = (t for _, t in sorted(self.trials.items()) if t["about"] == self.about and t["status"] in statuses)
        return [t for t in known if space.holds(t["config"])]


DONE = ("finished", "stopped")


def tune(project: Project, base: Path, run: Run) -> list[str]:
    """Search until the budget is used or nothing new is left; says what was found.

    Raises ProjectError, and ModelError when every trial fails."""
    space, settings, (metric, mode) = space_of(project), _tune(project), metric_of(project)
    stage = preparation(project, base, run)
    run.execute(stage)
    folder = run.folder / "tune"
    fixed = configured(project, {}).model_dump(mode="json", include={"train", "model"})
    for key in space.dimensions:
        _forget(fixed, key)
    about = {"prepared": run.fingerprints["prepare"], "metric": metric, "code": code_of(base), "fixed": _hash(fixed)}
    record = Record(folder, about)
    _search(project, base, run, space, record)
    sign = -1.0 if mode == "max" else 1.0
    ranked = sorted(record.of(space, *DONE), key=lambda t: sign * t["value"])
    if not ranked:
        failed = record.of(space, "failed")
        raise ModelError(f"every trial failed; the last because: {failed[-1]['why'] if failed else 'none was run'}")
    _keep(folder / "trials", {t["number"] for t in ranked[: settings.keep]})
    _write_best(project, base, run, folder / "best", ranked[0]["config"])
    from .tune_report import write

    write(folder / "report.html", project.name, space, record.of(space, *DONE, "failed"), metric, mode)
    lines = [f"{len(ranked)} trials, {len(record.of(space, 'failed'))} failed; the best {metric}:"]
    lines += [f"  {t['value']:.4f}  trial {t['number']}  {_said(t['config'])}" for t in ranked[:5]]
    return [*lines, f"report: {folder / 'report.html'}; train the best to the end: heliograph run {folder / 'best'}"]


def _search(project: Project, base: Path, run: Run, space: Space, record: Record) -> None:
    settings, (metric, mode) = _tune(project), metric_of(project)
    began, over = time.monotonic(), len(record.of(space, *DONE, "failed"))
    left = settings.trials - over
    if left <= 0:
        return
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # what it prints is for programs without a display of their own
    run.cluster.start()
    import ray
    from ray import tune as raytune
    from ray.tune.search import Searcher

    from .trial import WHY, Trial, place

    quieten()
    with run.display.stage("tune"):
        sign = -1.0 if mode == "max" else 1.0
        workers, each = project.train.processes, project.train.resources
        room = int(ray.cluster_resources().get("CPU", 1) / max(0.1, workers * each.cpus)) or 1
        parallel = min(settings.parallel or min(MOST_PARALLEL, room), room)
        keys = key_store(project, base, run.folder)
        job = Job(
            project.name, project.train, project.model, base, run["prepare"].resolve(),
            keys if project.data.encrypt else None, record.file.parent / "trials", project.data.augment, keys,
        )  # fmt: skip
        resumed = record.of(space, "running")
        numbers = itertools.count(max(record.trials, default=0) + 1)

        class Numbered(Searcher):
            """Unfinished trials first, then what the search suggests; all that it knows is the record."""

            def __init__(self) -> None:
                super().__init__(metric=metric, mode=mode)
                self.running: dict[str, int] = {}
                self.why = ""

            def suggest(self, trial_id: str) -> Any:
                if resumed:
                    number, config = resumed[0]["number"], resumed.pop(0)["config"]
                else:
                    config = self._next()
                    if config is None:
                        return Searcher.FINISHED
                    number = next(numbers)
                self.running[trial_id] = number
                record.write(number, config=config, status="running", about=record.about)
                return {"number": number, "project": configured(project, config)}

            def _next(self) -> Config | None:
                if self.why:
                    return None
                past = [(t["config"], sign * t["value"]) for t in record.of(space, *DONE)]
                past += [(t["config"], math.inf) for t in record.of(space, "failed")]
                if settings.hours and time.monotonic() - began > 3600 * settings.hours:
                    self.why = f"{settings.hours:g} hours are over"
                elif settings.improvement and expected_improvement(space, past, settings.seed) < settings.improvement:
                    self.why = f"no more than {settings.improvement:g} deviations of improvement are expected"
                else:
                    running = [record.trials[n]["config"] for n in self.running.values()]
                    config = SEARCHES[settings.search](space, past, running, settings.seed)
                    if config is not None:
                        return config
                    self.why = "every configuration of the space was tried"
                run.display.say(f"the search ends early: {self.why}")
                return None

            def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
                number = self.running.pop(trial_id)
                value = float((result or {}).get(metric, math.nan))
                if error or not math.isfinite(value):
                    told = place(job.folder, number) / WHY
                    why = told.read_text() if told.exists() else "its process ended" if error else f"its {metric} is {value}"
                    record.write(number, status="failed", why=why)
                    run.display.say(f"trial {number} failed: {why}")
                else:
                    epochs, epoch = project.train.epochs, int((result or {}).get("epoch", 0))
                    wanted = record.trials[number]["config"].get("train.epochs", epochs)
                    ended = "stopped" if epoch < wanted and settings.scheduler != "none" else "finished"
                    seconds = round(float((result or {}).get("time_total_s", 0)), 1)
                    record.write(number, status=ended, value=value, epochs=epoch, seconds=seconds)
                self._show()

            def _show(self) -> None:
                done = record.of(space, *DONE, "failed")
                best = min((t for t in done if t["status"] != "failed"), key=lambda t: sign * t["value"], default=None)
                note = f"best {metric} {best['value']:.4f} (trial {best['number']})" if best else "no value yet"
                pace = (time.monotonic() - began) / max(1, len(done) - over)
                minutes = pace * (settings.trials - len(done)) / 60
                note += f", {sum(t['status'] == 'stopped' for t in done)} stopped early" if settings.scheduler != "none" else ""
                run.display.update(f"{note}, about {minutes:.0f} min left", len(done), settings.trials)

            def __reduce__(self) -> Any:
                return str, ("Ray Tune keeps a copy of its own settings; the record is what counts",)

            def save(self, checkpoint_path: str) -> None: ...

            def restore(self, checkpoint_path: str) -> None: ...

        alone = workers == 1
        resources = {"CPU": each.cpus, "GPU": each.gpus or 0} if alone else {"CPU": 0.001}
        trainable: Any = raytune.with_parameters(Trial, job=job, beside=parallel)
        tuner = raytune.Tuner(
            raytune.with_resources(trainable, {k: v for k, v in resources.items() if v}),
            tune_config=raytune.TuneConfig(
                search_alg=Numbered(), num_samples=left, scheduler=_scheduler(project), max_concurrent_trials=parallel,
                reuse_actors=alone, metric=metric, mode=mode,
            ),
            run_config=raytune.RunConfig(
                name="ray", storage_path=str(record.file.parent), verbose=0,
                failure_config=raytune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=raytune.CheckpointConfig(checkpoint_at_end=False),  # a trial keeps its own
            ),
        )  # fmt: skip
        run.display.update(f"{parallel} trials at a time", over, settings.trials)
        shutil.rmtree(record.file.parent / "ray", ignore_errors=True)
        tuner.fit()
        shutil.rmtree(record.file.parent / "ray", ignore_errors=True)


def _scheduler(project: Project) -> Any:
    from ray.tune import schedulers

    settings = _tune(project)
    if settings.scheduler == "asha":
        return schedulers.ASHAScheduler(
            max_t=max(project.train.epochs, settings.grace), grace_period=settings.grace, reduction_factor=3
        )
    if settings.scheduler == "median":
        return schedulers.MedianStoppingRule(time_attr="training_iteration", grace_period=settings.grace, min_samples_required=3)
    return None


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
    text = f"# The best of `heliograph tune`: {_said(config)}\n" + yaml.safe_dump(value, sort_keys=False)
    storage.write_bytes(folder / FILE, text.encode())


def _said(config: Config) -> str:
    return ", ".join(
        f"{key.rpartition('.')[2]} {value:.4g}" if isinstance(value, float) else f"{key.rpartition('.')[2]} {value}"
        for key, value in config.items()
    )


def _forget(value: dict[str, Any], key: str) -> None:
    *path, last = key.split(".")
    for part in path:
        value = value.get(part) or {}
    value.pop(last, None)


def _hash(value: Any) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
