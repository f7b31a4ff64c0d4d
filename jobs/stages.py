"""A run is a folder, and a stage is a step of it that is done once.

    RUN/prepare, train, …       what each stage made: whole, or not there
    RUN/stages/NAME.json        the fingerprint that the output belongs to, and the seconds it took
    RUN/.work/NAME-FINGERPRINT  a stage at work; what it keeps there (checkpoints) is found again after a kill
    RUN/run.log                 what happened, with the traceback of every bug

A fingerprint is the SHA-256 of everything that a stage depends on: its settings, the fingerprints of the stages that it
reads, and heliograph's version. So a change in the project file reruns what depends on it and nothing else.

Committing takes two renames and a record. A `.done` file in `.work` is written first, and whatever it announces is
finished when the run is opened again, so a kill between any two of these steps changes nothing.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..cluster.runtime import JoinedCluster, LocalCluster
from ..cluster.storage import read_json, replace_folder, write_json
from .display import Display

log = logging.getLogger("heliograph")


@dataclass(frozen=True)
class Stage:
    """name: also its folder. work: fills the folder that it is given; needs: the stages whose folders it reads."""

    name: str
    needs: tuple[str, ...]
    settings: Any
    work: Callable[[Path], None]


def digested(value: Any) -> str:
    """SHA-256 of what JSON can say, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hashed(value: Any) -> str:
    """Its beginning, which is enough for a name."""
    return digested(value)[:16]


class Run:
    """An open run. Its folder must be held by `storage.exclusive`."""

    def __init__(self, folder: Path, cluster: LocalCluster | JoinedCluster, display: Display):
        self.folder, self.cluster, self.display = folder, cluster, display
        self.fingerprints: dict[str, str] = {}
        self.stages: list[dict] = []
        for announced in (folder / ".work").glob("*.done"):
            self._commit(announced)

    def __getitem__(self, stage: str) -> Path:
        return self.folder / stage

    def execute(self, stage: Stage) -> None:
        """Do a stage, or find it done. Raises what its work raises; what it has made so far stays in `.work`."""
        fingerprint = self._fingerprint(stage)
        record = self.folder / "stages" / f"{stage.name}.json"
        self.fingerprints[stage.name] = fingerprint
        known = read_json(record) if record.exists() and self[stage.name].is_dir() else {}
        if known.get("fingerprint") == fingerprint:
            self.display.reused(stage.name)
            self.stages.append({"name": stage.name, "seconds": known["seconds"], "reused": True})
            return
        work = self.folder / ".work" / f"{stage.name}-{fingerprint[:16]}"
        for stale in (self.folder / ".work").glob(f"{stage.name}-*"):
            if stale != work:
                shutil.rmtree(stale, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        log.info("%s: starts (%s)", stage.name, fingerprint[:16])
        started = time.monotonic()
        with self.display.stage(stage.name):
            self.cluster.start()
            stage.work(work)
        seconds = round(time.monotonic() - started, 2)
        announced = work.with_name(work.name + ".done")
        write_json(announced, {"name": stage.name, "fingerprint": fingerprint, "seconds": seconds})
        self._commit(announced)
        log.info("%s: done in %.1f s", stage.name, seconds)
        self.stages.append({"name": stage.name, "seconds": seconds, "reused": False})

    def _fingerprint(self, stage: Stage) -> str:
        return digested([__version__, stage.name, stage.settings, [self.fingerprints[n] for n in stage.needs]])

    def _commit(self, announced: Path) -> None:
        record = read_json(announced)
        work = announced.with_suffix("")
        if work.exists():
            replace_folder(work, self[record["name"]])
        write_json(self.folder / "stages" / f"{record['name']}.json", record)
        announced.unlink()
