"""A trial of a search: a training job in an actor of Ray Tune, a level a step.

The actor is rank 0 of the training, actors beside it are the other ranks, and all of them stay for the next trials, so that only
the first ones load TensorFlow and form a group (a trainer of Ray Train's for each would take a minute to start). What a trial has
trained stays in its folder, so one that was cut off or that waited goes on from its last checkpoint.
"""

import contextlib
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from ..cluster.fit import Bundle
from ..cluster.runtime import explained
from ..cluster.sealed import KEY_FILE
from ..errors import ModelError, RunError
from ..project import Project
from .checkpoint import newest, step_of
from .group import Ranks, ready
from .record import WHY, place
from .train import train
from .watch import METRICS, read_lines, write_lines
from .worker import STOP_FILE, Job

SECONDS_TO_STOP = 60
SECONDS_BETWEEN = 0.05
TRIES = 10


class Trial(Trainable):
    """config: `number`, `project` (this trial's), `prepared` (its data), `shares` (of the training rows that it trains on, one
    after the other; a level each where there are several, else an epoch is a level), `judged` (the levels after which it waits
    until it is told to go on), `done` (levels that it has) and `measured`.

    job: what all trials share; its folder holds theirs. here: how many workers of trials are on a machine at the same time. each:
    what a worker takes.
    """

    def setup(self, config: dict[str, Any], job: Job, here: int, each: Bundle) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.shared, self.ranks = job, Ranks(here, each)
        self.thread: threading.Thread | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return self._end()

    def _begin(self, config: dict[str, Any]) -> threading.Thread:
        """At the first step and not before: Ray Tune may set up an actor for a trial that then goes to another one."""
        project: Project = config["project"]
        folder = place(self.shared.folder, config["number"])
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / METRICS).exists():  # what came after the checkpoint that it goes on from is done again
            write_lines(folder / METRICS, lines_of(folder))
        size = project.train.batch_size
        assert isinstance(size, int)
        self.job = replace(
            self.shared, train=project.train, model=project.model, augment=project.data.augment, prepared=config["prepared"],
            folder=folder, batch_size=size, export=False, measured=config["measured"],
        )  # fmt: skip
        self.shares, self.judged = config["shares"], frozenset(config["judged"])
        self.done = self.told = config["done"]
        self.failure, self.stopping = None, False
        self.allowed = threading.Condition()
        self.lines: list[dict[str, Any]] = []
        """Of the levels that are done, where levels are shares."""
        thread = threading.Thread(target=self._train, daemon=True)
        thread.start()
        return thread

    def _train(self) -> None:
        try:
            if len(self.shares) == 1:
                self._fit(self.job)
                return
            self.lines = [read_lines(self.job.folder / f"level-{k}" / METRICS)[-1] for k in range(1, self.done + 1)]
            for level in range(self.done + 1, len(self.shares) + 1):
                job = replace(self.job, share=self.shares[level - 1], folder=self.job.folder / f"level-{level}")
                self._fit(job)
                if self.stopping:
                    return
                self.lines = [*self.lines, read_lines(job.folder / METRICS)[-1]]
                if level in self.judged and not self._goes_on(level):
                    return
        except BaseException as error:
            self.failure = error

    def _fit(self, job: Job) -> None:
        ready(job)
        job = replace(job, judged=frozenset() if len(self.shares) > 1 else self.judged)
        if job.train.pipeline:
            train(job, lambda *_: None, lambda _: None)
        else:
            self.ranks.train(job, self._goes_on)

    def _goes_on(self, level: int) -> bool:
        """Wait until Tune asks for what comes after a level, or ends the trial."""
        with self.allowed:
            self.allowed.wait_for(lambda: self.told > level or self.stopping)
        return not self.stopping

    def step(self) -> dict[str, Any]:
        self.thread = self.thread or self._begin(self.config)
        with self.allowed:
            self.told += 1
            self.allowed.notify_all()
        while True:
            over = not self.thread.is_alive()
            lines = self.lines if len(self.shares) > 1 else read_lines(self.job.folder / METRICS)
            if len(lines) >= self.told:
                line, last = lines[self.told - 1], over and self.told == len(lines) and not self.failure
                spent = sum(each.get("seconds", 0.0) for each in lines)
                return {**line, "seconds": spent, "level": self.told, "done": last}
            if over:
                if self.failure:
                    if isinstance(explained(self.failure), ModelError) and not self.ranks.group:
                        return {"failed": _said(self.failure), "level": 0, "done": True}  # which would only happen again
                    (self.job.folder / WHY).write_text(_said(self.failure))
                    raise self.failure
                return {**(lines[-1] if lines else {}), "level": len(lines), "done": True}
            if self.ranks.group:
                self.ranks.group.check()
            time.sleep(SECONDS_BETWEEN)

    def _end(self) -> bool:
        """Stop what runs; whether it has."""
        if self.thread is None:
            return True
        with self.allowed:
            self.stopping = True
            self.allowed.notify_all()
        for folder in (self.job.folder, *self.job.folder.glob("level-*")):
            (folder / STOP_FILE).touch()
        self.thread.join(SECONDS_TO_STOP)
        stopped, self.thread = not self.thread.is_alive(), None
        return stopped

    def cleanup(self) -> None:
        self._end()


def copied(other: Path, aside: Path) -> list[dict[str, Any]]:
    """Copy what another trial has trained; its epochs. It may train on meanwhile, and so remove a checkpoint that is copied."""
    for _ in range(TRIES):
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError, IndexError):
            checkpoint = newest(other / "checkpoints")[0]
            shutil.copytree(checkpoint, aside / "checkpoints" / checkpoint.name)
            for file in (METRICS, KEY_FILE):
                if (other / file).exists():
                    shutil.copyfile(other / file, aside / file)
            return lines_of(aside)
    raise RunError(f"{other}: has no checkpoint to take over")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The epochs that a training's newest checkpoint has."""
    last = max(map(step_of, newest(folder / "checkpoints")), default=0)
    return [line for line in read_lines(folder / METRICS) if line["step"] <= last]


def _said(error: BaseException) -> str:
    found = explained(error)
    return str(found or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:300]}")
