"""The registry: names → versions → aliases of bundles, in a folder.

    REGISTRY/NAME/3/           a bundle, as it was signed
    REGISTRY/NAME/state.json   which version is asked for by which alias, and the rollout that is under way

An endpoint follows `state.json`: whoever writes it (a rollout, a person with `heliograph deploy`) needs no door into the
endpoint. `production` is the alias that answers requests which name no version; while there is none, the newest does.
"""

import re
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ..cluster.storage import publish_folder, read_json, write_json
from ..errors import RegistryError
from ..project import NAME
from .bundle import SIGNATURE

PRODUCTION = "production"


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


class State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    aliases: dict[str, int] = {}
    rollout: Rollout | None = None


class Registry:
    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> list[str]:
        return sorted(p.name for p in self.folder.glob("*") if re.fullmatch(NAME, p.name) and self.versions(p.name))

    def versions(self, name: str) -> list[int]:
        """Oldest first."""
        return sorted(int(p.name) for p in (self.folder / name).glob("[0-9]*") if p.name.isdigit())

    def bundle(self, name: str, version: int) -> Path:
        """Raises RegistryError when there is none."""
        folder = self.folder / name / str(version)
        if not folder.is_dir():
            known = self.versions(name)
            have = f"it has {', '.join(map(str, known))}" if known else f"it knows {', '.join(self.names()) or 'no model yet'}"
            raise RegistryError(f"{self.folder}: has no {name}@{version}: {have}")
        return folder

    def add(self, name: str, bundle: Path) -> int:
        """Copy a bundle in, as the next version; the version that it has where it is there already."""
        signature = (bundle / SIGNATURE).read_bytes()
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
            raise RegistryError(f"{file}: is damaged ({type(error).__name__}): deploy a version anew") from None

    def write(self, name: str, state: State) -> None:
        write_json(self.folder / name / "state.json", state.model_dump())

    def resolve(self, name: str, state: State | None = None) -> int:
        """The version in production, or the newest while there is none. state: the model's, where it was read already.

        Raises RegistryError."""
        found = (state or self.state(name)).aliases.get(PRODUCTION) or max(self.versions(name), default=None)
        if found is None:
            raise RegistryError(f"{self.folder}: has no {name} yet")
        return found


def parse(text: str) -> tuple[str, int | None]:
    """`NAME@VERSION` or `NAME`. Raises RegistryError."""
    name, _, version = text.partition("@")
    if not re.fullmatch(NAME, name) or (version and not version.isdigit()) or text.endswith("@"):
        raise RegistryError(f"`{text}` names no model: write NAME@VERSION, such as digits@2")
    return name, int(version) if version else None
