"""A trial of a search: a training job in an actor of Ray Tune, an epoch a step.

One worker trains in the actor itself, so that the next trial finds TensorFlow loaded; several are started by Ray Train from
here. What a trial has trained stays in its folder, so one that was cut off goes on from its last checkpoint.
"""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from ..cluster.runtime import explained
from ..project import Project
from .train import train
from .watch import METRICS, read_lines
from .worker import STOP_FILE, Job, work_alone

SECONDS_TO_STOP = 60
WHY = "failure.txt"


class Trial(Trainable):
    """config: `number`, and `project`, which is this trial's. job: what all trials share; its folder holds theirs."""

    def setup(self, config: dict[str, Any], job: Job, beside: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.shared, self.beside = job, beside
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        project: Project = config["project"]
        folder = place(self.shared.folder, config["number"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP_FILE).unlink(missing_ok=True)
        self.job = replace(
            self.shared, train=project.train, model=project.model, augment=project.data.augment, folder=folder, export=False
        )
        self.shown, self.failure = 0, None
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        try:
            if self.job.train.processes == 1:
                import keras

                keras.backend.clear_session()
                size = self.job.train.batch_size
                assert isinstance(size, int)
                work_alone(replace(self.job, batch_size=size), self.beside)
            else:
                train(self.job, lambda *_: None, lambda _: None)
        except BaseException as error:
            self.failure = error

    def step(self) -> dict[str, Any]:
        while True:
            over = not self.thread.is_alive()
            lines = read_lines(self.job.folder / METRICS)
            if len(lines) > self.shown:
                self.shown += 1
                return {**lines[self.shown - 1], "done": over and self.shown == len(lines) and not self.failure}
            if over:
                if self.failure:
                    (self.job.folder / WHY).write_text(_said(self.failure))
                    raise self.failure
                return {**(lines[-1] if lines else {}), "done": True}
            time.sleep(0.05)

    def _end(self) -> None:
        if self.thread.is_alive():
            (self.job.folder / STOP_FILE).touch()
            self.thread.join(SECONDS_TO_STOP)

    def cleanup(self) -> None:
        self._end()


def _said(error: BaseException) -> str:
    found = explained(error)
    return str(found or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:300]}")


def place(folder: Path, number: int) -> Path:
    """Where a trial lies."""
    return folder / f"{number:04}"
