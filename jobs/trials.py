"""The trials of a search: which begins next, and what comes of it, for Ray Tune, which runs them.

All that is decided here is decided on the record, so what decides has no state of its own that a kill could lose.
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..cluster import storage
from ..cluster.bill import COST
from ..cluster.runtime import quieten
from ..errors import ProjectError
from ..project import FILE, Project
from .choice import figure, said
from .demand import room
from .display import Display
from .record import DONE, FAILED, FINISHED, OVER, PAUSED, RUNNING, STOPPED, WHY, Record, Trial, earlier, place
from .run import key_store, preparation, starting
from .schedule import Course, scheduler
from .search import SEARCHES, Config, blended, expected_improvement, starts
from .space import MEASURED, configured, metrics_of, settings_of, shares, signs_of, tune_of
from .stages import Run, hashed
from .worker import Job

RETRIES = 1
"""Of a trial that fails."""
AVERAGED = 4
"""The last quarter of a trial's levels, which say how good it is."""
SMALLEST_ODDS = 0.003
"""That are told apart."""
ASIDE = ".taken"
"""Of the name of what a trial takes over."""


class Search:
    """One process' part of a search, from the record on."""

    def __init__(self, project: Project, base: Path, run: Run, record: Record):
        self.project, self.base, self.run_, self.record = project, base, run, record
        self.settings, self.space = tune_of(project), record.space
        self.metrics, self.signs = metrics_of(project), signs_of(project)
        self.shares = shares(project) if self.settings.scheduler != "none" else [1.0]
        s = self.settings
        self.scheduler = scheduler(s.scheduler, project.train.epochs, s.grace, self.space, s.seed, len(self.shares))
        self.trials = run.folder / "tune" / "trials"
        self.interrupted = [t.number for t in record.of(RUNNING)]
        for aside in self.trials.glob(f"*{ASIDE}"):
            if int(aside.stem) in self.interrupted and record.trials[int(aside.stem)].from_ is not None:
                storage.replace_folder(aside, aside.with_suffix(""))
            else:
                shutil.rmtree(aside)
        self.running: dict[str, int] = {}
        """By Ray Tune's name of the trial."""
        self.judged: dict[int, str] = {}
        """What the scheduler said of running trials that end because of it."""
        self.why = ""
        self.held = len(record.of(*OVER)), record.seconds
        self.warm = self._earlier()

    def _earlier(self) -> list[Config]:
        """Configurations to try first. What counts as our own trials do is added to the past."""
        self.known: list[tuple[Config, float]] = []
        hints: list[tuple[Config, float]] = []
        for run in self.settings.warm_start:
            folder = (self.base / Path(run).expanduser()).resolve()
            if folder == self.run_.folder.resolve():
                continue
            if not (folder / "tune").is_dir():
                raise ProjectError(f"{FILE}: tune.warm_start: {folder}: holds no search: name the folder of a run that was tuned")
            same, others = earlier(folder, self.record, self.metrics[0])
            self.known += [(config, told(value, self.signs[0])) for config, value in same]
            hints += [(config, told(value, self.signs[0])) for config, value in others if self.space.keeps(config)]
        if self.settings.warm_start:
            say = self.run_.display.say
            say(f"warm start: {len(self.known)} trials of earlier runs count, {len(hints)} say what to try first")
        best = {repr(config): config for config, value in sorted(hints, key=lambda h: h[1]) if math.isfinite(value)}
        return list(best.values())[: max(1, starts(self.space) // 2)]

    # What to try

    def next(self) -> tuple[int, Config, int | None] | None:
        """(trial, its configuration, the trial that it takes over). None: nothing now, and nothing more when none is running."""
        record = self.record
        if self.interrupted:
            number = self.interrupted.pop(0)
            return number, record.trials[number].config, None
        courses = self._courses()
        population = self.settings.scheduler == "pbt"
        found = None if population else self.scheduler.resume(courses, last=False)
        if found is None and (config := self._new()) is not None:
            return record.last + 1, config, None
        found = found or self.scheduler.resume(courses, last=not self.running)
        if found is None:
            return None
        if found.from_ is not None:
            self.run_.display.say(f"trial {found.number} takes over trial {found.from_}, with {said(found.config)}")
        return found.number, found.config, found.from_

    def _courses(self) -> list[Course]:
        """Of all that did not fail."""
        return [t.course(self.signs[0]) for t in self.record.of(RUNNING, PAUSED, *DONE)]

    def _new(self) -> Config | None:
        """A configuration that was not tried, as long as the budget lasts."""
        record, settings = self.record, self.settings
        begun = record.of(RUNNING, PAUSED, *OVER)
        if self.why or len(begun) >= settings.trials:
            return None
        tried = {repr(t.config) for t in begun}
        ended = [t for t in begun if t.status != RUNNING]
        values = np.array([[self._value(t, m, s) for m, s in zip(self.metrics, self.signs, strict=True)] for t in ended])
        if len(self.metrics) > 1 and ended:
            values = blended(values, settings.seed + len(begun))
        past = [*self.known, *((t.config, float(v)) for t, v in zip(ended, values.ravel(), strict=True))]
        if settings.hours and record.seconds > 3600 * settings.hours:
            self.why = f"{settings.hours:g} hours are over"
        elif settings.dollars and (spent := self._dollars()) >= settings.dollars:
            self.why = f"the run has cost ${spent:.2f}, or would with one more trial, and tune.dollars is ${settings.dollars:.2f}"
        elif settings.improvement and expected_improvement(self.space, past, settings.seed) < settings.improvement:
            self.why = f"no more than {settings.improvement:g} deviations of improvement are expected"
        else:
            while self.warm:
                config = self.warm.pop(0)
                if repr(config) not in tried:
                    return config
            running = [t.config for t in record.of(RUNNING)]
            config = SEARCHES[settings.search](self.space, past, running, settings.seed)
            if config is not None:
                return config
            self.why = "every configuration of the space was tried"
        self.run_.display.say(f"the search ends early: {self.why}")
        return None

    def _value(self, trial: Trial, metric: str, sign: float) -> float:
        """What the search is told of a trial; infinite for a failure."""
        if trial.status == FAILED or metric not in trial.values:
            return math.inf
        averaged = metric == self.metrics[0] and len(self.shares) == 1
        return told(late(trial.curve) if averaged else trial.values[metric], sign)

    def _dollars(self) -> float:
        """What the run will have cost when what runs has ended, and one trial more."""
        cost = storage.read_json(self.run_.folder / COST)["dollars"] if (self.run_.folder / COST).exists() else 0.0
        ended = len(self.record.of(*OVER)) - self.held[0]
        return (cost or 0.0) * (1 + (len(self.running) + 1) / ended if ended > 0 else 1.0)

    # What comes of it

    def began(self, name: str, number: int, config: Config, from_: int | None) -> dict[str, Any]:
        """What Ray Tune gives the trial."""
        trial = configured(self.project, config)
        if from_ is None:
            self.record.begin(number, settings_of(trial))
        else:
            self._take_over(number, settings_of(trial), from_)
        self.running[name] = number
        searched = any(key.startswith("data.") and not key.startswith("data.augment.") for key in config)
        prepared = self._prepared(trial) if searched else self.run_["prepare"]
        trial = trial.model_copy(update={"model": trial.model.started_from(self.run_["start"].resolve())})
        return {
            "number": number, "project": trial, "prepared": prepared.resolve(), "shares": self.shares,
            "judged": self.scheduler.rungs(number), "done": len(self.record.trials[number].curve),
            "measured": tuple(m for m in self.metrics if m in MEASURED[:2]),
        }  # fmt: skip

    def _take_over(self, number: int, settings: dict[str, Any], other: int) -> None:
        """Put what another trial has trained in the place of a trial's own. A kill between any two steps changes nothing: the
        copy takes its place when the record says so, here or when the search goes on."""
        from .trial import copied

        own = place(self.trials, number)
        aside = own.with_name(own.name + ASIDE)
        lines = copied(place(self.trials, other), aside)
        curve = [line[self.metrics[0]] for line in lines]
        self.record.begin(number, settings, other, curve=curve)
        storage.replace_folder(aside, own)

    def _prepared(self, trial: Project) -> Path:
        """The data of trials that search how it is prepared, made once for each way."""
        way = hashed(trial.data.model_dump(mode="json", exclude={"augment"}))
        keys = key_store(self.project, self.base, self.run_.folder).folder
        inner = Run(self.run_.folder / "tune" / "data" / way, self.run_.cluster, Display(Console(quiet=True)))
        inner.execute(preparation(trial.model_copy(update={"keys": str(keys)}), self.base, inner))
        return inner["prepare"]

    def came(self, name: str, result: dict[str, Any]) -> bool:
        """A trial reports a level; whether it goes on."""
        number = self.running[name]
        trial, level = self.record.trials[number], self._learn(self.record.trials[number], result)
        self.show()
        if level not in self.scheduler.rungs(number):
            return True
        if status := self.scheduler.judge(trial.course(self.signs[0]), self._courses()):
            self.judged[number] = status
        return not status

    def _standing(self, trial: Trial) -> str:
        """Where a trial was among all when it ended."""
        level = len(trial.curve)
        came = [course.curve[level - 1] for course in self._courses() if len(course.curve) >= level]
        rank = sum(value < self.signs[0] * trial.curve[-1] for value in came) + 1
        unit = "epoch" if len(self.shares) == 1 else "share of the data"
        return f"after {unit} {level} of {self.scheduler.levels} it was {_nth(rank)} of {len(came)}"

    def _learn(self, trial: Trial, result: dict[str, Any]) -> int:
        """The level that a result is of."""
        level = int(result.get("level", 0))
        if level and self.metrics[0] in result:
            trial.curve = [*trial.curve[: level - 1], float(result[self.metrics[0]])]
            trial.values = {m: float(result.get(m, math.nan)) for m in self.metrics}
        return level

    def ended(self, name: str, result: dict[str, Any], error: bool) -> None:
        number = self.running.pop(name)
        trial, status = self.record.trials[number], self.judged.pop(number, FINISHED)
        if not error:
            self._learn(trial, result)
        seconds = round(trial.seconds + float(result.get("time_total_s", 0.0)), 1)
        if why := self._failure(trial, result, error):
            self.record.end(number, FAILED, why=why, seconds=seconds)
            self.run_.display.say(f"trial {number} failed: {why}")
        else:
            self._end(trial, status, seconds)
        self.show()

    def _failure(self, trial: Trial, result: dict[str, Any], error: bool) -> str:
        """Why a trial that ended has no value; empty when it has."""
        if error:
            reason = place(self.trials, trial.number) / WHY
            return reason.read_text() if reason.exists() else "its process ended"
        bad = [f"its {m} is {trial.values.get(m)}" for m in self.metrics if not math.isfinite(trial.values.get(m, math.nan))]
        return result.get("failed") or (bad[0] if bad else "")

    def close(self) -> None:
        """What still waits when nothing more will run was behind."""
        for t in self.record.of(PAUSED):
            self._end(t, STOPPED, t.seconds)

    def _end(self, trial: Trial, status: str, seconds: float) -> None:
        why = self._standing(trial) if status == STOPPED else ""
        self.record.end(trial.number, status, values=trial.values, curve=trial.curve, why=why, seconds=seconds)
        if why:
            self.run_.display.say(f"trial {trial.number} stopped: {why}")

    def show(self) -> None:
        done, waiting, running = self.record.of(*OVER), self.record.of(PAUSED), self.record.of(RUNNING)
        of_all = [t for t in self.record.of(*DONE, PAUSED) if self.metrics[0] in t.values]
        best = min(of_all, key=lambda t: self.signs[0] * t.values[self.metrics[0]], default=None)
        value = f"{figure(best.values[self.metrics[0]])} (trial {best.number})" if best else ""
        parts = [f"best {self.metrics[0]} {value}" if best else "no value yet"]
        levels = self.scheduler.levels
        runs = [f"{t.number} ({len(t.curve)}/{levels}{f', {figure(t.curve[-1])}' if t.curve else ''})" for t in running]
        parts += [f"running {', '.join(runs)}"] if runs else []
        parts += [f"{len(waiting)} wait"] if waiting else []
        stopped = sum(t.status == STOPPED for t in done)
        parts += [f"{stopped} stopped"] if stopped else []
        if (since := len(done) + len(waiting) - self.held[0]) > 0:
            left = (self.record.seconds - self.held[1]) / since * max(0, self.settings.trials - len(done) - len(waiting)) / 60
            parts.append(f"about {left:.0f} min left")
        if self.settings.dollars:
            parts.append(f"${self._dollars():.2f} of ${self.settings.dollars:.2f}")
        self.run_.display.update(", ".join(parts), len(done), self.settings.trials)

    # With Ray Tune

    def run(self) -> None:
        project, run = self.project, self.run_
        start, _ = starting(project, self.base, run)
        for stage in (preparation(project, self.base, run), *start):
            run.execute(stage)
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # what it prints is for programs without a display of their own
        run.cluster.start()
        from ray import tune as raytune

        from .trial import Trial as Trainable

        quieten()
        with run.display.stage("tune"):
            each, processes, parallel = room(project.train, self.settings.parallel)
            keys = key_store(project, self.base, run.folder)
            sealing = keys if project.data.encrypt else None
            job = Job(project.name, project.train, project.model, self.base, Path(), sealing, self.trials, None, keys)
            ranks = [each] * processes
            if project.train.pipeline:
                ranks.insert(0, {"CPU": 0.001})
            trainable: Any = raytune.with_parameters(Trainable, job=job, here=parallel * processes, each=each)
            run.display.update(f"{parallel} trials at a time", self.held[0], self.settings.trials)
            ray_folder = run.folder / "tune" / "ray"
            shutil.rmtree(ray_folder, ignore_errors=True)
            searcher, judge = _asked_by_ray(self)
            raytune.Tuner(
                raytune.with_resources(
                    trainable, raytune.PlacementGroupFactory(ranks, strategy=project.train.resources.placement)
                ),
                tune_config=raytune.TuneConfig(  # without a metric, which Ray Tune would require of trials that fail, too
                    search_alg=searcher, num_samples=-1, scheduler=judge, max_concurrent_trials=parallel, reuse_actors=True,
                ),
                run_config=raytune.RunConfig(
                    name="ray", storage_path=str(ray_folder.parent), verbose=0,
                    failure_config=raytune.FailureConfig(max_failures=RETRIES),
                    checkpoint_config=raytune.CheckpointConfig(checkpoint_at_end=False),  # a trial keeps its own
                ),
            ).fit()  # fmt: skip
            shutil.rmtree(ray_folder, ignore_errors=True)
            self.close()


def late(curve: list[float]) -> float:
    """The mean over the last levels, whose noise is less than that of the last one alone."""
    return float(np.mean(curve[-max(1, len(curve) // AVERAGED) :]))


def told(value: float, sign: float) -> float:
    """A metric as the search is told it: less is better.

    Shares of which more is better, such as accuracies, become log odds, in which 0.99 is as far from 0.97 as 0.97 is from 0.91:
    else a surrogate sees little but which trials have failed to learn."""
    if sign > 0 or not 0 <= value <= 1:
        return sign * value
    return math.log((1 - value + SMALLEST_ODDS) / (value + SMALLEST_ODDS))


def _asked_by_ray(search: Search) -> tuple[Any, Any]:
    """The search as Ray Tune asks it: for trials, and whether one goes on."""
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher

    class Asked(Searcher):
        def suggest(self, trial_id: str) -> Any:
            found = search.next()
            if found is None:
                return None if search.running else Searcher.FINISHED
            return search.began(trial_id, *found)

        def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
            search.ended(trial_id, result or {}, error)

        def __reduce__(self) -> Any:
            return str, ("Ray Tune keeps a copy of its own settings; the record is what counts",)

        def save(self, checkpoint_path: str) -> None: ...

        def restore(self, checkpoint_path: str) -> None: ...

    class Judge(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
            return TrialScheduler.CONTINUE if search.came(trial.trial_id, result) else TrialScheduler.STOP

        def __reduce__(self) -> Any:
            return str, ("as above",)

    return Asked(), Judge()


def _nth(number: int) -> str:
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ends.get(number % 10, 'th')}"
