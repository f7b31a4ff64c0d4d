"""Whose turn it is on a cluster: runs wait for each other by priority, and nobody has more at a time than he may.

A run that waits or works holds a lock on a file of its own in the storage, queue/NAME.lock. The system lets go of it however
the run ends, so a place in the queue cannot outlive its run. Runs' drivers are all on the head, whose locks these are.
"""

import contextlib
import fcntl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..cluster.spec import Capacity
from ..cluster.storage import read_json, write_json

PLACE = "HELIOGRAPH_PLACE"
"""Of a run that was submitted: its `Place`."""
QUEUE = "queue"
SECONDS_BETWEEN = 1.0


@dataclass(frozen=True)
class Place:
    """A run in the queue."""

    run: str
    user: str
    priority: int
    """The higher, the sooner; runs that have begun are not interrupted."""
    since: float
    works: bool = False


@contextlib.contextmanager
def turn(folder: Path, place: Place, capacity: Capacity, update: Callable[[str], None]) -> Iterator[None]:
    """Wait until it is this run's turn, and keep the others waiting until it is done. folder: of the queue."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{place.run}.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        file = folder / f"{place.run}.json"
        try:
            write_json(file, asdict(place))
            while not _begins(folder, place, capacity, update):
                time.sleep(SECONDS_BETWEEN)
            yield
        finally:
            file.unlink(missing_ok=True)


def _begins(folder: Path, place: Place, capacity: Capacity, update: Callable[[str], None]) -> bool:
    """Whether a waiting run may work now; then it is noted that it does. One at a time looks."""
    with (folder / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        others = list(_others(folder, place.run))
        working = [p for p in others if p.works]
        users = Counter(p.user for p in working)
        most, each = capacity.runs or len(others) + 1, capacity.runs_per_user or len(others) + 1

        def sooner(p: Place) -> tuple[int, float, str]:
            return (-p.priority, p.since, p.run)

        before = [p for p in others if not p.works and users[p.user] < each and sooner(p) < sooner(place)]
        if len(working) + len(before) < most and users[place.user] < each:
            write_json(folder / f"{place.run}.json", asdict(place) | {"works": True})
            return True
    update(f"waiting: {len(working)} runs work, {len(before)} are before this one")
    return False


def _others(folder: Path, own: str) -> Iterator[Place]:
    """Those whose run is alive: it holds its lock."""
    for file in folder.glob("*.json"):
        if file.stem == own:
            continue
        with (folder / f"{file.stem}.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                with contextlib.suppress(OSError, ValueError):  # it ends just now
                    yield Place(**read_json(file))
                continue
        file.unlink(missing_ok=True)
