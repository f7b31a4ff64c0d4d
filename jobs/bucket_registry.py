"""The registry in object storage, where there are neither renames nor locks.

    s3://BUCKET/FOLDER/versions/NAME/3.json     of version 3: its files' digests, and what is told of it
    s3://BUCKET/FOLDER/contents/ID/FILE         its files
    s3://BUCKET/FOLDER/states/NAME.json         aliases, their history, the rollout
    s3://BUCKET/FOLDER/held/NAME/3/ID           until when somebody keeps version 3 from being collected

A version is there when its JSON is: written last, and only if it is not there yet, so of two who publish at the same time each
gets a number of its own. A state is replaced only if it is still the one that was read (a conditional write). A version that is
asked for is fetched once, checked, and kept in a folder of this machine.
"""

import contextlib
import json
import logging
import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..cluster.keys import KeyStore
from ..cluster.mirror import folder_of
from ..cluster.objects import THREADS, Bucket, Changed, digest_of
from ..cluster.sealed import KEY_FILE, rewrap_all
from ..cluster.storage import publish_folder, read_json, write_json
from ..errors import StorageError
from .bundle import SIGNATURE
from .registry import Facts, Registry, State, damaged, raced

log = logging.getLogger("heliograph")
MANIFEST = "version.json"
"""Beside the files of a version that was fetched: what was fetched."""
HELD_SECONDS = 3600.0
"""A version stays so long after its holder was last heard of; more than clocks that the storage accepts can differ."""


@dataclass(frozen=True)
class _Version:
    contents: str
    """The folder of its files."""
    files: dict[str, str]
    """Name to digest."""
    facts: Facts

    @classmethod
    def of(cls, content: bytes) -> "_Version":
        said = json.loads(content)
        return cls(said["contents"], said["files"], Facts(**said["facts"]))

    def dumps(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class BucketRegistry(Registry):
    seconds = 5.0

    def __init__(self, url: str):
        self.bucket = Bucket(url)
        super().__init__(folder_of(self.bucket.url))
        self._seen: tuple[float, dict[str, list[int]]] | None = None

    def __str__(self) -> str:
        return self.bucket.url

    def names(self) -> list[str]:
        return sorted(self._listed(0))

    def versions(self, name: str) -> list[int]:
        """Oldest first, as they were a few seconds ago: whoever answers requests must not wait for the storage."""
        return self._listed(2 * self.seconds).get(name, [])

    def bundle(self, name: str, version: int) -> Path:
        return self._fetched(name, version, self._version(name, version)[0])

    def facts(self, name: str, version: int) -> Facts:
        return self._version(name, version)[0].facts

    def add(self, name: str, bundle: Path) -> int:
        with (bundle / SIGNATURE).open("rb") as opened:
            signature = digest_of(opened)
        versions = self._listed(0).get(name, [])
        for version in reversed(versions):
            if self._version(name, version)[0].files[SIGNATURE] == signature:
                return version
        contents = f"contents/{uuid.uuid4().hex}"
        files = [file for file in bundle.rglob("*") if file.is_file()]
        with ThreadPoolExecutor(THREADS) as threads:
            digests = list(threads.map(lambda file: self._store(file, contents), files))
        names = [str(file.relative_to(bundle)) for file in files]
        made = _Version(contents, dict(zip(names, digests, strict=True)), Facts.of(bundle))
        version = max(versions, default=0) + 1
        while True:
            try:
                self.bucket.put(_place(name, version), made.dumps(), None)
            except Changed:
                version += 1  # somebody else published meanwhile
                continue
            self._seen = None
            return version

    def state(self, name: str) -> State:
        return self._state(name)[0]

    def replace(self, name: str, seen: State, state: State) -> None:
        found, tag = self._state(name)
        if found != seen:
            raise raced(name)
        tag = self._write(name, state, tag)
        # Looked for after it was written: a version that is collected meanwhile is either seen to be asked for, or missed here.
        for version in (state.named - seen.named) - set(self._listed(0).get(name, [])):
            self._write(name, seen, tag)
            raise self.missing(name, version)

    def hold(self, name: str, version: int) -> "_Lease | None":
        try:
            return _Lease(self.bucket, f"{_held(name, version)}/{uuid.uuid4().hex}")
        except StorageError as error:  # such as that it may only be read
            log.warning("%s@%d can be collected while it is in use: %s", name, version, error)
            return None

    def collect(self, name: str, keep: int) -> list[int]:
        removed = []
        for version in self._listed(0).get(name, [])[: -max(1, keep)]:
            if self._wanted(name, version):
                continue
            known, _ = self._version(name, version)
            self.bucket.delete([_place(name, version)])
            if self._wanted(name, version):  # since just now
                self.bucket.put(_place(name, version), known.dumps(), None)
                continue
            self.bucket.delete(f"{known.contents}/{digest}" for digest in known.files.values())
            removed.append(version)
        self._seen = None
        return removed

    def rewrap(self, name: str, keys: KeyStore) -> int:
        count = 0
        for version in self._listed(0).get(name, []):
            known, tag = self._version(name, version)
            if KEY_FILE not in known.files:
                continue
            folder = self.bundle(name, version)
            count += rewrap_all(folder, keys)
            files = {**known.files, KEY_FILE: self._store(folder / KEY_FILE, known.contents)}
            try:
                self.bucket.put(_place(name, version), replace(known, files=files).dumps(), tag)
            except Changed:
                raise raced(f"{name}@{version}") from None
            self.bucket.delete([f"{known.contents}/{known.files[KEY_FILE]}"])
        return count

    def _listed(self, seconds: float) -> dict[str, list[int]]:
        """The versions of each model, oldest first; as old as `seconds` at most."""
        if self._seen is None or time.monotonic() - self._seen[0] > seconds:
            found: dict[str, list[int]] = {}
            for key in self.bucket.names("versions/"):
                if match := re.fullmatch(r"versions/([^/]+)/(\d+)\.json", key):
                    found.setdefault(match[1], []).append(int(match[2]))
            self._seen = (time.monotonic(), {name: sorted(versions) for name, versions in found.items()})
        return self._seen[1]

    def _version(self, name: str, version: int) -> tuple[_Version, str]:
        """And its tag. Raises RegistryError."""
        found = self.bucket.get(_place(name, version))
        if found is None:
            raise self.missing(name, version)
        return _Version.of(found[0]), found[1]

    def _fetched(self, name: str, version: int, known: _Version) -> Path:
        """A folder here with a version's files. Raises StorageError."""
        folder = self.folder / name / str(version)
        with self._locked(name):
            with contextlib.suppress(OSError, ValueError):
                if read_json(folder / MANIFEST) == known.files:
                    return folder / "files"
            with publish_folder(folder) as aside, ThreadPoolExecutor(THREADS) as threads:

                def fetch(item: tuple[str, str]) -> None:
                    self.bucket.download(f"{known.contents}/{item[1]}", aside / "files" / item[0], item[1])

                list(threads.map(fetch, known.files.items()))
                write_json(aside / MANIFEST, known.files)
        return folder / "files"

    def _store(self, file: Path, contents: str) -> str:
        """Under its digest, which is returned."""
        with file.open("rb") as opened:
            digest = digest_of(opened)
        if self.bucket.upload(file, f"{contents}/{digest}") != digest:
            raise StorageError(f"{file}: changed while it was stored: try again")
        return digest

    def _state(self, name: str) -> tuple[State, str | None]:
        """And its tag; None while nobody wrote one."""
        found = self.bucket.get(f"states/{name}.json")
        if found is None:
            return State(), None
        try:
            return State.model_validate_json(found[0]), found[1]
        except ValueError as error:
            raise damaged(f"{self.bucket.url}/states/{name}.json", error) from None

    def _write(self, name: str, state: State, seen: str | None) -> str:
        try:
            return self.bucket.put(f"states/{name}.json", state.model_dump_json().encode(), seen)
        except Changed:
            raise raced(name) from None

    def _wanted(self, name: str, version: int) -> bool:
        """Whether an alias, a rollout or an endpoint has it."""
        if version in self.state(name).named:
            return True
        leases = self.bucket.names(f"{_held(name, version)}/")
        until = {key: float(found[0]) for key in leases if (found := self.bucket.get(key))}
        self.bucket.delete(key for key, end in until.items() if end < time.time())
        return any(end >= time.time() for end in until.values())


class _Lease:
    """Says again and again until when a version is held."""

    def __init__(self, bucket: Bucket, key: str):
        self._bucket, self._key, self._closed = bucket, key, threading.Event()
        self._say()
        threading.Thread(target=self._work, daemon=True, name="lease").start()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(StorageError):  # then it ends by itself
            self._bucket.delete([self._key])

    def _say(self) -> None:
        self._bucket.send(self._key, str(time.time() + HELD_SECONDS).encode())

    def _work(self) -> None:
        while not self._closed.wait(HELD_SECONDS / 6):
            with contextlib.suppress(StorageError):  # there are five more tries
                self._say()


def _place(name: str, version: int) -> str:
    return f"versions/{name}/{version}.json"


def _held(name: str, version: int) -> str:
    return f"held/{name}/{version}"
