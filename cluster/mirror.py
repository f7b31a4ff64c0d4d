"""A run whose home is object storage, and which works in a folder here.

    s3://BUCKET/RUN/manifest.json      every file: its path, digest and size
    s3://BUCKET/RUN/objects/DIGEST     their contents

Object storage has no rename, and a run is made of renames. So what is stored is one snapshot after the other: contents first,
then the manifest, in one conditional write. Whoever reads has a whole snapshot; two machines that work on one run cannot both
write; what is there already is not sent again. A snapshot is not taken across a stage's commit, which would put a new record
beside an old folder: it is begun again when one came between.

Keys do not go there: the key store beside the data would open it to whoever reads the bucket. They stay in the folder here,
unless `keys` of the project file names another place.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RunError, StorageError
from .bytecode import CACHE
from .objects import PART_BYTES, SCHEME, THREADS, Bucket, Changed, digest_of
from .storage import read_json, write_json

log = logging.getLogger("heliograph")
MANIFEST, NOTE = "manifest.json", ".mirror.json"
LEFT_HERE = ("keys", "ray-logs")
SECONDS_BETWEEN = 5.0
RUNS = CACHE / "runs"
Stamp = tuple[int, int]
"""(nanoseconds of the last change, bytes)."""


@dataclass
class _Known:
    """What is known of the last snapshot: kept beside the run, so that nothing is hashed or sent twice."""

    tag: str | None = None
    """Of the manifest that this folder is up to."""
    files: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    """Path to (changed, bytes, digest)."""


def folder_of(url: str) -> Path:
    """Where a run works on this machine."""
    return RUNS / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def url_of(folder: Path) -> str | None:
    """The home of a run that works in a folder; None where the folder is its home."""
    try:
        return read_json(folder / NOTE)["url"]
    except (OSError, ValueError, KeyError):
        return None


class Mirror:
    def __init__(self, folder: Path, url: str):
        self.folder, self.bucket = folder, Bucket(url)
        self._known = _Known()
        with contextlib.suppress(OSError, ValueError, KeyError):
            note = read_json(folder / NOTE)
            if note["url"] == self.bucket.url:
                self._known = _Known(note["tag"], {path: tuple(stamp) for path, stamp in note["files"].items()})

    def pull(self, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Make the folder what is stored, unless it is that or later already. told: bytes that are done, of how many.

        Raises StorageError."""
        for _ in range(3):
            found = self.bucket.get(MANIFEST)
            if found is None:
                self._known = _Known()  # what was stored before was taken away: all of it follows anew
            if found is None or found[1] == self._known.tag:
                self._note()
                return
            try:
                self._fetch(json.loads(found[0])["files"], told)
            except StorageError:
                again = self.bucket.get(MANIFEST)
                if again is None or again[1] == found[1]:
                    raise
                continue  # another snapshot came between, and took contents away
            self._known.tag = found[1]
            self._note()
            return

    def push(self) -> bool:
        """Store a snapshot; whether there was anything new. Raises StorageError, and RunError when another machine stored one."""
        before = self._commits()
        stored = {digest for _, _, digest in self._known.files.values()}

        def look(item: tuple[str, Stamp]) -> tuple[str, tuple[int, int, str]] | None:
            path, stamp = item
            known = self._known.files.get(path)
            try:
                return path, known if known and known[:2] == stamp else self._store(path, stamp, stored)
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(THREADS) as threads:
            files = dict(found for found in threads.map(look, self._listed().items()) if found)
        if files == self._known.files and self._known.tag:
            return False
        if self._commits() != before:
            return self.push()
        manifest = {"format": 1, "files": {path: [digest, size] for path, (_, size, digest) in sorted(files.items())}}
        try:
            tag = self.bucket.put(MANIFEST, json.dumps(manifest).encode(), self._known.tag)
        except Changed:
            raise RunError(f"{self.bucket.url}: another machine works on this run: stop one of them") from None
        self._known = _Known(tag, files)
        self._note()
        self.bucket.delete(f"objects/{digest}" for digest in stored - {digest for _, _, digest in files.values()})
        return True

    def _store(self, path: str, stamp: Stamp, stored: set[str]) -> tuple[int, int, str]:
        """Send what is in a file now, unless it is there; what to know of it. A small file may grow meanwhile."""
        file = self.folder / path
        if stamp[1] <= PART_BYTES:
            content = file.read_bytes()
            digest = digest_of(io.BytesIO(content))
            if digest not in stored:
                self.bucket.send(f"objects/{digest}", content)
            return stamp[0], len(content), digest
        with file.open("rb") as opened:
            digest = digest_of(opened)
        if digest not in stored and self.bucket.upload(file, f"objects/{digest}") != digest:
            raise _Moved(path)
        return *stamp, digest

    def _fetch(self, files: dict[str, list[Any]], told: Callable[[int, int], None]) -> None:
        here = self._listed()
        known = {path: stamp for path, stamp in self._known.files.items() if here.get(path) == tuple(stamp[:2])}
        wanted = {path: entry for path, entry in files.items() if path not in known or known[path][2] != entry[0]}
        total, done, lock = sum(size for _, size in wanted.values()), [0], threading.Lock()

        def count(more: int) -> None:
            with lock:
                done[0] += more
                told(done[0], total)

        def fetch(item: tuple[str, list[Any]]) -> None:
            path, (digest, _) = item
            self.bucket.download(f"objects/{digest}", self.folder / path, digest, count)

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(fetch, wanted.items()))
        for path in set(here) - set(files):
            (self.folder / path).unlink(missing_ok=True)
        now = self._listed()
        self._known.files = {path: (*now[path], digest) for path, (digest, _) in files.items()}

    def _listed(self) -> dict[str, Stamp]:
        """Every file that belongs to the run."""
        out = {}
        for folder, folders, names in os.walk(self.folder):
            place = Path(folder).relative_to(self.folder)
            if place == Path():
                folders[:] = [name for name in folders if name not in LEFT_HERE]
            folders[:] = [name for name in folders if name != "ray" and not name.endswith((".part", ".old"))]
            for name in names:
                if name in (NOTE, ".lock") or name.endswith(".part"):
                    continue
                with contextlib.suppress(OSError):
                    found = (self.folder / place / name).stat()
                    out[str(place / name)] = (found.st_mtime_ns, found.st_size)
        return out

    def _commits(self) -> list[tuple[str, int]]:
        """What changes when a stage is committed."""
        out = [(p.name, p.stat().st_ino) for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
        for pattern in ("stages/*.json", ".work/*.done"):
            for file in self.folder.glob(pattern):
                with contextlib.suppress(OSError):
                    out.append((file.name, file.stat().st_mtime_ns))
        return sorted(out)

    def _note(self) -> None:
        write_json(self.folder / NOTE, {"url": self.bucket.url, "tag": self._known.tag, "files": self._known.files})


class _Moved(Exception):
    """A file that was to be stored is another one already."""


@contextlib.contextmanager
def stored(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """While a run works in its folder, store it every few seconds, and at the end in any case.

    say: told when the storage does not answer; the run goes on, and what is missing there follows. Raises StorageError, or
    RunError, when the end cannot be stored."""
    url = url_of(folder)
    if url is None:
        yield
        return
    mirror, ended, failed = Mirror(folder, url), threading.Event(), ""

    def work() -> None:
        nonlocal failed
        while not ended.wait(SECONDS_BETWEEN):
            try:
                mirror.push()
                failed = ""
            except _Moved:
                pass  # at the next look
            except (StorageError, RunError) as error:
                if str(error) != failed:
                    say(f"{error}; the run goes on, and is stored when it can be")
                failed = str(error)
            except Exception:
                log.exception("the run cannot be stored")

    thread = threading.Thread(target=work, daemon=True, name="mirror")
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        try:
            mirror.push()
        except Exception as error:
            say(f"what was done last is not stored: {error or 'a file changed'}; it is in {folder}, from where the run goes on")
        raise
    ended.set()
    thread.join()
    mirror.push()


def placed(run: str) -> Path:
    """The folder in which a run works: its own, or one here for a run whose home is object storage, with what is stored there.

    Raises StorageError."""
    if not run.startswith(SCHEME):
        return Path(run).resolve()
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    folder = folder_of(run)
    folder.mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(f"fetching {run}", total=None)
        Mirror(folder, run).pull(lambda done, total: bar.update(task, completed=done, total=total))
    return folder
