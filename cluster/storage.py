"""Writing so that nothing half-written is ever read: aside first, then one atomic rename."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import RunError

IN_MEMORY = Path("/dev/shm")  # noqa: S108  folders in it are mkdtemp's


def write_bytes(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Publish `data` at `path`: a reader sees the old content or the new, never a part. mode: what the umask leaves of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


@contextmanager
def in_memory(content: bytes, name: str) -> Iterator[Path]:
    """A path for what reads only files, to bytes that are on no disk."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        yield file


@contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `path` when the block ends well, and vanishes when it does not."""
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        replace_folder(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Put `new` in the place of `path` (two renames where there was one before)."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone; the system lets go when the process ends, however it ends.

    Raises RunError when another process holds it, and where it is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file: a run is a folder: name another --run")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise RunError(f"{folder}: in use by another heliograph (pid {holder}): wait for it or name another --run") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
