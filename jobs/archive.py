"""A run that is put away: all of its folder but the key store in one sealed file.

    RUN/run.sealed     a tar of everything else, sealed with the key that `key.wrapped` beside it holds (`cluster.sealed`)

The plain files go when the sealed one is whole and was read back, and the sealed one goes when the plain files are all there
again; whatever stops either in between, the same command goes on.
"""

import logging
import shutil
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..cluster.keys import KeyStore
from ..cluster.mirror import stored
from ..cluster.sealed import KEY_FILE, Seal, create, opened
from ..cluster.storage import exclusive
from ..errors import RunError

log = logging.getLogger("heliograph")

SEALED_RUN = "run.sealed"
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Of some work on so many bytes; yields what is told how many more are done."""


def seal(folder: Path, keys: KeyStore, progress: Progress) -> str:
    """Put a run away; says what was done. Raises RunError when there is none, or it is in use."""
    _require(folder)
    with exclusive(folder), stored(folder, log.warning):
        sealed, aside = folder / SEALED_RUN, folder / f".{SEALED_RUN}.part"
        if not sealed.exists():
            own = Seal.make(folder, keys)
            parts = [p for p in sorted(folder.iterdir()) if not _stays(p, folder, keys)]
            total = sum(p.stat().st_size for part in parts for p in (part, *part.rglob("*")) if p.is_file())
            if not total:
                raise RunError(f"{folder}: holds nothing to seal: run `heliograph run` first")
            with (
                progress("sealing", total) as told,
                create(aside, own, SEALED_RUN) as out,
                tarfile.open(fileobj=cast(BinaryIO, _Counted(out, told)), mode="w|") as tar,
            ):
                for part in parts:
                    tar.add(part, part.name)
            with progress("checking", aside.stat().st_size) as told, opened(aside, own, SEALED_RUN) as source:
                while piece := source.read(1 << 20):
                    told(len(piece))
            aside.replace(sealed)
        for part in folder.iterdir():
            if not _stays(part, folder, keys):
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        return f"{sealed}: {sealed.stat().st_size:,} bytes; `heliograph unseal` takes the run out again"


def unseal(folder: Path, keys: KeyStore, progress: Progress) -> str:
    """Take a run out; says what was done. Raises RunError when none was put away, KeyStoreError, SealError."""
    _require(folder)
    sealed, aside = folder / SEALED_RUN, folder / ".unsealed.part"
    with exclusive(folder), stored(folder, log.warning):
        if not sealed.exists():
            raise RunError(f"{folder}: has no {SEALED_RUN}: nothing was put away here")
        shutil.rmtree(aside, ignore_errors=True)
        with (
            progress("opening", sealed.stat().st_size) as told,
            opened(sealed, Seal.of(folder, keys), SEALED_RUN) as source,
            tarfile.open(fileobj=cast(BinaryIO, _Counted(source, told)), mode="r|") as tar,
        ):
            tar.extractall(aside, filter="data")
        for part in aside.iterdir():
            place = folder / part.name
            if place.exists():  # of an attempt that was stopped
                shutil.rmtree(place) if place.is_dir() else place.unlink()
            part.rename(place)
        aside.rmdir()
        sealed.unlink()
        return f"{folder}: is out again"


def _require(folder: Path) -> None:
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run: run `heliograph run` first, or name another --run")


def _stays(part: Path, folder: Path, keys: KeyStore) -> bool:
    return part.name in (".lock", SEALED_RUN, f".{SEALED_RUN}.part", KEY_FILE) or part.resolve() == keys.folder.resolve()


class _Counted:
    """A file that tells how much went through it."""

    def __init__(self, file: Any, told: Callable[[int], None]):
        self._file, self._told = file, told

    def write(self, data: bytes) -> int:
        self._told(len(data))
        return self._file.write(data)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._told(len(data))
        return data
