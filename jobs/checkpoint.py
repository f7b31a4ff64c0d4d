"""Checkpoints: what a training is after a step, written while it goes on, visible only when all ranks agree.

    checkpoints/step-00000690/state.npz   every variable of model and optimizer, then the metrics' sums
                              state.json  the step, the SHA-256 of the arrays, and the history so far

`save` copies the variables (a rank's main thread does no more) and a thread of each rank digests the copy; rank 0's also
writes it aside. Each rank's digest travels in the next training call's exchange (`steps.SAVED`, `steps.DIGEST`), and when
all are equal rank 0 publishes the folder by one rename. So every checkpoint that can be seen is whole, checked, and the
state of *all* ranks; one that is damaged later is passed over for the one before.

A full disk costs a checkpoint, not the training: the reason is logged and the next one is tried; only the last one, at the
end or at an interruption, must succeed.
"""

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.sealed import Seal, create, opened
from ..cluster.storage import replace_folder
from ..errors import ModelError, RunError, SealError
from .steps import DIGEST, SAVED

DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, SealError)
STATE, NOTE = "state.npz", "state.json"


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def newest(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def whole(folder: Path, seal: Seal | None, warn: Callable[[str], None]) -> Iterator[tuple[Path, dict, list[np.ndarray]]]:
    """(checkpoint, note, arrays) from the newest on, those left out that are damaged, of which `warn` is told."""
    for checkpoint in newest(folder):
        try:
            note, values = read(checkpoint, seal)
        except DAMAGED as error:
            warn(f"{checkpoint}: passed over: {error}")
            continue
        yield checkpoint, note, values


def write(aside: Path, values: list[np.ndarray], note: dict, sha256: str, seal: Seal | None) -> None:
    """Fill a folder that is there with what `read` reads. sha256: the arrays' `digest`."""
    with create(aside / STATE, seal, f"{note['step']}/{STATE}") as file:
        np.savez(file, *values)
    with create(aside / NOTE, seal, f"{note['step']}/{NOTE}") as file:
        file.write(json.dumps({**note, "sha256": sha256}, allow_nan=False).encode())


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` and the best one."""
    for old in newest(folder)[keep:]:
        if old != place(folder, best or 0):
            shutil.rmtree(old, ignore_errors=True)


def forget_after(folder: Path, step: int) -> None:
    for checkpoint in newest(folder):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint, ignore_errors=True)


def read(checkpoint: Path, seal: Seal | None) -> tuple[dict, list[np.ndarray]]:
    """(note, arrays) of a checkpoint. Raises ValueError or another of DAMAGED when it is not what was written."""
    step = step_of(checkpoint)
    with opened(checkpoint / NOTE, seal, f"{step}/{NOTE}") as file:
        note = json.loads(file.read())
    with opened(checkpoint / STATE, seal, f"{step}/{STATE}") as state, np.load(state, allow_pickle=False) as file:
        values = [file[f"arr_{i}"] for i in range(len(file.files))]
    if digest(values) != note["sha256"]:
        raise ValueError("its checksum differs")
    return note, values


def digest(values: list[np.ndarray]) -> str:
    """SHA-256 of arrays, in order."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


class Checkpoints:
    """seal: what they are sealed with, if they are. warn: is told what went wrong and did not end the training."""

    def __init__(
        self, folder: Path, seal: Seal | None, variables: list[Any], strategy: Any, rank: int, keep: int,
        warn: Callable[[str], None],
    ):  # fmt: skip
        self.folder, self.variables, self.strategy, self.rank, self.keep = folder, variables, strategy, rank, keep
        self.seal, self.warn = seal, warn
        self.best: int | None = None
        """The step of the best one, which is kept."""
        self.digests: list[str] = []
        """Of the last one that was settled, a rank each."""
        self._thread = ThreadPoolExecutor(1)
        self._saving: Future[str] | None = None
        self._count = 0
        self._aside: Path | None = None
        if rank == 0:
            for half in folder.glob(".step-*"):
                shutil.rmtree(half, ignore_errors=True)

    def restore(self) -> tuple[dict, list[np.ndarray]] | None:
        """The newest whole checkpoint's (note, extra arrays); the variables now hold it. None when there is none.

        Raises ModelError when it belongs to another model.
        """
        for checkpoint, note, values in whole(self.folder, self.seal, self.warn):
            own, extra = values[: len(self.variables)], values[len(self.variables) :]
            if [v.shape for v in own] != [tuple(v.shape) for v in self.variables]:
                raise ModelError(
                    f"{checkpoint}: is of another model or optimizer ({len(values) - len(extra)} arrays, first of shape "
                    f"{list(own[0].shape) if own else []}): delete {self.folder} to begin anew, or name another --run"
                )
            for variable, value in zip(self.variables, own, strict=True):
                variable.assign(value)
            self.best = note["best"]
            return note, extra
        return None

    @property
    def settled(self) -> bool:
        return self._saving is None

    def save(self, step: int, note: dict, extra: list[np.ndarray]) -> None:
        """Begin a checkpoint of the present state; called by all ranks after the same step, when the last one is settled."""
        assert self._saving is None
        values = [np.array(v) for v in self.variables] + extra
        self._count += 1
        self._aside = self.folder / f".step-{step:08d}.part"
        self._saving = self._thread.submit(self._write, self._aside, values, {"step": step, **note, "best": self.best})

    def _write(self, aside: Path, values: list[np.ndarray], note: dict) -> str:
        sha = digest(values)
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write(aside, values, note, sha, self.seal)
        return sha

    def say(self, host: np.ndarray) -> None:
        """Put what this rank has digested into what it says to the others."""
        if self._saving is None or not self._saving.done():
            host[SAVED] = 0
            return
        host[SAVED] = self._count
        # A rank that could not write says so by a digest of nothing, and nobody publishes.
        failed = self._saving.exception() is not None
        host[DIGEST] = [0 if failed else int(self._saving.result()[i : i + 6], 16) for i in (0, 6, 12)]

    def hear(self, hosts: np.ndarray) -> None:
        """Settle the checkpoint when every rank has said the same digest of it."""
        if self._saving is None or not (hosts[:, SAVED] == self._count).all():
            return
        heard = {tuple(row) for row in hosts[:, DIGEST].astype(int).tolist()}
        failed = not any(hosts[0, DIGEST])
        if len(heard) > 1 and not failed:
            raise RuntimeError(f"the ranks' states differ at {self._aside}: {heard}")
        self._publish()

    def settle(self, must: bool = False) -> None:
        """Wait for the checkpoint in hand; called by all ranks together. must: raises RunError when it was not written."""
        if self._saving is None:
            return
        import tensorflow as tf

        try:
            own = bytes.fromhex(self._saving.result())
        except OSError:
            own = bytes(32)
        gathered = self.strategy.gather(tf.constant([list(own)], tf.int32), axis=0).numpy()
        self.digests = [bytes(row.tolist()).hex() for row in gathered]
        failed = not any(gathered[0])
        if len(set(self.digests)) > 1 and not failed:
            raise RuntimeError(f"the ranks' states differ at {self._aside}: {self.digests}")
        self._publish()
        if failed and must:
            raise RunError(f"{self.folder}: a checkpoint cannot be written, the disk may be full: free some and run it again")

    def _publish(self) -> None:
        saving, aside = self._saving, self._aside
        self._saving = None
        assert saving and aside
        if self.rank:
            return
        if (error := saving.exception()) is not None:
            shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(error, OSError):
                raise error
            self.warn(f"{self.folder}: a checkpoint was not written ({error.strerror or error}); training goes on without it")
            return
        replace_folder(aside, self.folder / aside.name[1:].removesuffix(".part"))
        prune(self.folder, self.keep, self.best)
