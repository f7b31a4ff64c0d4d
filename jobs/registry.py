"""The registry: names → versions → aliases of bundles, in a folder (in object storage: `bucket_registry`).

    REGISTRY/NAME/3/           a bundle, as it was signed
    REGISTRY/NAME/state.json   which version is asked for by which alias, who moved it when, and the rollout that is under way

An endpoint follows `state.json`: whoever writes it (a rollout, a person with `heliograph deploy`) needs no door into the
endpoint. `production` is the alias that answers requests which name no version; while there is none, the newest does that
reached what it had to.

Two who change a model's state at the same time cannot both win: a change says what it was made from, and is refused when that is
no longer so. Locks are the system's (`flock`), so whoever dies holds none.
"""

import contextlib
import fcntl
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from ..cluster.keys import KeyStore
from ..cluster.objects import SCHEME
from ..cluster.sealed import KEY_FILE, rewrap_all
from ..cluster.storage import publish_folder, read_json, write_json
from ..errors import RegistryError
from ..project import NAME
from .bundle import SIGNATURE

PRODUCTION = "production"
MOST_HISTORY = 1000
ALIAS = r"[a-z][a-z0-9_-]{0,62}"


class Rollout(BaseModel):
    """A new version that takes a share of the requests until it is promoted or rolled back."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int
    percent: float
    started: float
    """Seconds since 1970."""
    seconds: float
    """It is judged for at least so long, and by at least so many requests:"""
    requests: int
    verdict: str = ""
    """Empty while it is under way; then `promoted` or `rolled back`, and why."""

    @property
    def active(self) -> bool:
        return not self.verdict


class Change(BaseModel):
    """An alias that was moved."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    alias: str
    version: int
    before: int | None
    time: float
    """Seconds since 1970."""


class State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    aliases: dict[str, int] = {}
    rollout: Rollout | None = None
    history: tuple[Change, ...] = ()
    """Oldest first."""

    @property
    def named(self) -> set[int]:
        """Versions that are asked for: they must stay."""
        rolling = {self.rollout.version} if self.rollout and self.rollout.active else set()
        return {*self.aliases.values(), *rolling}

    def moved(self, alias: str, version: int) -> "State":
        before = self.aliases.get(alias)
        if before == version:
            return self
        history = (*self.history, Change(alias=alias, version=version, before=before, time=time.time()))
        return self.model_copy(update={"aliases": {**self.aliases, alias: version}, "history": history[-MOST_HISTORY:]})


class Held(Protocol):
    """A version that is kept from being collected until this is closed."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Facts:
    """What is told of a version."""

    made: float
    """Seconds since 1970."""
    note: dict[str, Any]
    """What `bundle.json` says."""
    test: dict[str, Any]
    """Of the test split; empty where the bundle is sealed."""

    @classmethod
    def of(cls, bundle: Path) -> "Facts":
        test = {} if (bundle / KEY_FILE).exists() else read_json(bundle / "metrics.json")
        return cls((bundle / SIGNATURE).stat().st_mtime, read_json(bundle / "bundle.json"), test)


def alone(folder: Path, name: str, bundle: Path) -> "Registry":
    """A new registry of one bundle, which is in production whatever it had to reach."""
    models = Registry(folder)
    version, state = models.add(name, bundle), models.state(name)
    models.replace(name, state, state.moved(PRODUCTION, version))
    return models


class Registry:
    seconds = 0.5
    """Between two looks of those who follow it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._failed: dict[tuple[str, int], list[str]] = {}

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        return sorted(p.name for p in self.folder.glob("*") if re.fullmatch(NAME, p.name) and self.versions(p.name))

    def versions(self, name: str) -> list[int]:
        """Oldest first."""
        return sorted(int(p.name) for p in (self.folder / name).glob("[0-9]*") if p.name.isdigit())

    def bundle(self, name: str, version: int) -> Path:
        """A folder with a version. Raises RegistryError when there is none."""
        folder = self.folder / name / str(version)
        if not folder.is_dir():
            raise self.missing(name, version)
        return folder

    def add(self, name: str, bundle: Path) -> int:
        """Copy a bundle in, as the next version; the version that it has where it is there already."""
        signature = (bundle / SIGNATURE).read_bytes()
        with self._locked(name):
            for version in reversed(self.versions(name)):
                if (self.folder / name / str(version) / SIGNATURE).read_bytes() == signature:
                    return version
            version = max(self.versions(name), default=0) + 1
            with publish_folder(self.folder / name / str(version)) as aside:
                shutil.copytree(bundle, aside, dirs_exist_ok=True)
        return version

    def state(self, name: str) -> State:
        file = self.folder / name / "state.json"
        try:
            return State.model_validate(read_json(file))
        except FileNotFoundError:
            return State()
        except ValueError as error:
            raise damaged(str(file), error) from None

    def replace(self, name: str, seen: State, state: State) -> None:
        """Put a state in the place of the one that was `seen`.

        Raises RegistryError when that is no longer the model's, or a version is not there that the new one names."""
        with self._locked(name):
            if self.state(name) != seen:
                raise raced(name)
            for version in (state.named - seen.named) - set(self.versions(name)):
                raise self.missing(name, version)
            write_json(self.folder / name / "state.json", state.model_dump())

    def resolve(self, name: str, state: State | None = None) -> int:
        """The version in production; while there is none, the newest that reached what it had to. state: the model's, where it
        was read already.

        Raises RegistryError."""
        if found := (state or self.state(name)).aliases.get(PRODUCTION):
            return found
        versions = self.versions(name)
        if not versions:
            raise RegistryError(f"{self}: has no {name} yet")
        passed = next((v for v in reversed(versions) if not self.failed(name, v)), None)
        if passed is None:
            newest = f"{name}@{versions[-1]}"
            raise RegistryError(
                f"{self}: no version of {name} reached what `evaluate.require` asks for ({newest}: "
                f"{'; '.join(self.failed(name, versions[-1]))}): `heliograph deploy {newest} --force` takes it anyway"
            )
        return passed

    def failed(self, name: str, version: int) -> list[str]:
        """What a version had to reach and did not."""
        if (name, version) not in self._failed:
            self._failed[name, version] = self.facts(name, version).note.get("failed", [])
        return self._failed[name, version]

    def hold(self, name: str, version: int) -> Held | None:
        """Keep a version from being collected until what is returned is closed, or this process ends.

        None where the registry cannot be written: then nobody here collects."""
        try:
            file = self._use_file(name, version).open("ab")
        except OSError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        return file

    def collect(self, name: str, keep: int) -> list[int]:
        """Remove versions, but not the newest `keep` (one at least), none that an alias or a rollout names, and none that an
        endpoint holds. Returns what was removed."""
        removed = []
        with self._locked(name):
            named = self.state(name).named
            for version in self.versions(name)[: -max(1, keep)]:
                if version in named or not self._unused(name, version):
                    continue
                gone = self.folder / name / f".{version}.gone"
                (self.folder / name / str(version)).rename(gone)
                shutil.rmtree(gone)
                self._use_file(name, version).unlink(missing_ok=True)
                removed.append(version)
        return removed

    def describe(self, name: str) -> list[str]:
        """A line for each version, the newest first: aliases, when it was made, from what, and how it did on the test split."""
        state, out = self.state(name), []
        for version in reversed(self.versions(name)):
            facts = self.facts(name, version)
            aliases = [alias for alias, of in sorted(state.aliases.items()) if of == version]
            if state.rollout and state.rollout.active and state.rollout.version == version:
                aliases.append(f"rollout {state.rollout.percent:g} %")
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.made))
            figures = [f"{k} {facts.test[k]:.4f}" for k in ("accuracy", "rmse") if facts.test.get(k) is not None]
            lineage = facts.note.get("lineage", {})
            origin = [f"from {lineage['source']}"] if "source" in lineage else []
            origin += [f"{k} {str(lineage[k])[:12]}" for k in ("data", "code", "configuration") if k in lineage]
            aliases += [f"failed: {text}" for text in self.failed(name, version)]
            out.append("  ".join([f"{name}@{version}", made, *figures, *origin, *(f"[{a}]" for a in aliases)]))
        return out

    def facts(self, name: str, version: int) -> Facts:
        return Facts.of(self.bundle(name, version))

    def rewrap(self, name: str, keys: KeyStore) -> int:
        """Wrap the keys of a model's sealed versions with the newest key; how many there are."""
        return rewrap_all(self.folder / name, keys)

    def missing(self, name: str, version: int) -> RegistryError:
        known = self.versions(name)
        have = f"it has {', '.join(map(str, known))}" if known else f"it knows {', '.join(self.names()) or 'no model yet'}"
        return RegistryError(f"{self}: has no {name}@{version}: {have}")

    def _use_file(self, name: str, version: int) -> Path:
        return self.folder / name / f".{version}.used"

    def _unused(self, name: str, version: int) -> bool:
        file = self._use_file(name, version)
        if not file.exists():
            return True
        with file.open("ab") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        with (self.folder / name / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def registry_at(place: str, base: Path) -> Registry:
    """In the folder `place`, relative to `base`, or in object storage (`s3://BUCKET/FOLDER`). Raises StorageError."""
    if place.startswith(SCHEME):
        from .bucket_registry import BucketRegistry

        return BucketRegistry(place)
    return Registry((base / Path(place).expanduser()).resolve())


def raced(name: str) -> RegistryError:
    return RegistryError(f"{name}: somebody else changed its aliases or its rollout meanwhile: look, and try again")


def damaged(place: str, error: ValueError) -> RegistryError:
    return RegistryError(f"{place}: is damaged ({type(error).__name__}): deploy a version anew")


def parse(text: str) -> tuple[str, int | None]:
    """`NAME@VERSION` or `NAME`. Raises RegistryError."""
    name, _, version = text.partition("@")
    if not re.fullmatch(NAME, name) or (version and not version.isdigit()) or text.endswith("@"):
        raise RegistryError(f"`{text}` names no model: write NAME@VERSION, such as digits@2")
    return name, int(version) if version else None
