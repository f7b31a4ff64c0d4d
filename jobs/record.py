"""The record of a search: `trials.jsonl`, a line whenever a trial begins, waits, or ends.

It is all that there is to know: a search that was killed goes on from it. A trial counts for a search when the data, the code and
the metric are the same and its settings lie in the space, whatever was searched when it was made.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .schedule import Course
from .search import Config, Space
from .space import chosen
from .watch import read_lines

TRIALS = "trials.jsonl"
WHY = "failure.txt"
"""In a trial's folder: why its process failed."""
RUNNING, PAUSED, STOPPED, FINISHED, FAILED = "running", "paused", "stopped", "finished", "failed"
DONE = (FINISHED, STOPPED)
OVER = (*DONE, FAILED)


@dataclass
class Trial:
    """number: from 1 on, also of its folder. config: what the space chose of its settings."""

    number: int
    config: Config
    status: str
    values: dict[str, float] = field(default_factory=dict)
    """By metric, of its last level."""
    curve: list[float] = field(default_factory=list)
    """Of the first metric, by level."""
    why: str = ""
    """Why it failed or was stopped."""
    seconds: float = 0.0
    from_: int | None = None
    """The member of a population that it last took over."""

    def course(self, sign: float) -> Course:
        return Course(self.number, self.config, [sign * v for v in self.curve], self.status == PAUSED)


class Record:
    """folder: of the search. about: what trials must share to count for each other. own: the project's settings."""

    def __init__(self, folder: Path, about: str, space: Space, own: dict[str, Any]):
        self.file, self.about, self.space, self.own = folder / TRIALS, about, space, own
        self.began = time.monotonic()
        self.elapsed = 0.0
        """Seconds that the search took before."""
        self.last = 0
        """The highest number of all trials, those of other searches too."""
        self.trials: dict[int, Trial] = {}
        for line in read_lines(self.file):
            self.last = max(self.last, line["number"])
            if self._take(line):
                self.elapsed = max(self.elapsed, line["elapsed"])

    def _take(self, line: dict[str, Any]) -> bool:
        """Whether the line is of a trial that counts."""
        number = line["number"]
        if line["status"] == RUNNING:
            config = chosen(self.space, self.own, line["settings"]) if line["about"] == self.about else None
            if config is None:
                self.trials.pop(number, None)
                return False
            known = self.trials.setdefault(number, Trial(number, config, RUNNING))
            known.config, known.from_ = config, line["from"]
        known = self.trials.get(number)
        if known is None:
            return False
        known.status, known.why = line["status"], line.get("why", "")
        known.values, known.curve = line.get("values", known.values), line.get("curve", known.curve)
        known.seconds = line.get("seconds", known.seconds)
        return True

    @property
    def seconds(self) -> float:
        """That the search has taken, over all its interruptions."""
        return self.elapsed + time.monotonic() - self.began

    def begin(self, number: int, settings: dict[str, Any], from_: int | None = None, **said: Any) -> None:
        """Or go on; from_: with what another one has trained, whose `curve` is said."""
        self._write({"number": number, "status": RUNNING, "settings": settings, "about": self.about, "from": from_, **said})

    def end(self, number: int, status: str, **said: Any) -> None:
        """Or `paused`."""
        self._write({"number": number, "status": status, **said})

    def _write(self, line: dict[str, Any]) -> None:
        line |= {"elapsed": round(self.seconds, 1), "time": round(time.time(), 1)}
        self.last = max(self.last, line["number"])
        self._take(line)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, *statuses: str) -> list[Trial]:
        """By number."""
        return [t for _, t in sorted(self.trials.items()) if t.status in statuses]


def earlier(run: Path, record: Record, metric: str) -> tuple[list[tuple[Config, float]], list[tuple[Config, float]]]:
    """(configuration, value) of the trials of another run: those that count for this search as its own do, and the rest, moved
    into the space."""
    found: dict[int, tuple[Config, bool]] = {}
    same, others = [], []
    for line in read_lines(run / "tune" / TRIALS):
        if line["status"] == RUNNING:
            config = chosen(record.space, record.own, line["settings"]) if line["about"] == record.about else None
            moved = record.space.nearest(record.own | line["settings"])
            found[line["number"]] = (moved, False) if config is None else (config, True)
        elif line["status"] in DONE and line["number"] in found and metric in line["values"]:
            config, counts = found[line["number"]]
            (same if counts else others).append((config, line["values"][metric]))
    return same, others


def place(trials: Path, number: int) -> Path:
    """Where what a trial trained lies."""
    return trials / f"{number:04}"
