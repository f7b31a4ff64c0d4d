"""Run: a project's stages in their order, from raw data to a signed bundle."""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..cluster import storage
from ..cluster.keys import DATA_KEY, KeyStore
from ..cluster.runtime import LocalCluster
from ..datasets.shards import rotate_all
from ..datasets.sources import open_source
from ..project import Project
from .bundle import make
from .display import Display
from .engine import FILES
from .evaluate import evaluate
from .prepare import prepare
from .registry import Registry
from .stages import Run, Stage
from .train import Job, train


def key_store(project: Project, base: Path, folder: Path) -> KeyStore:
    """The run's key store: `keys` of the project file, relative to it, or `keys` in the run's folder."""
    return KeyStore((base / Path(project.keys).expanduser()).resolve() if project.keys else folder / "keys")


def registry(project: Project, base: Path) -> Registry:
    """The project's registry: `registry` of the project file, relative to it."""
    return Registry((base / Path(project.registry).expanduser()).resolve())


@contextmanager
def opened(folder: Path, workers: int, display: Display) -> Iterator[Run]:
    """Hold a run's folder, with a cluster that starts when a stage needs it, and a log that says what happened."""
    with storage.exclusive(folder):
        handler = logging.FileHandler(folder / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        loggers = [logging.getLogger("heliograph"), logging.getLogger("ray")]
        loggers[0].setLevel(logging.INFO)
        for logger in loggers:
            logger.addHandler(handler)
        try:
            with LocalCluster(workers, logs=folder / "ray-logs") as cluster, display.open():
                yield Run(folder, cluster, display)
        except Exception:
            logging.getLogger("heliograph").exception("the run ended with an error")
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()


def rotate_keys(project: Project, base: Path, folder: Path, retire: bool) -> str:
    """Make a new version of the key that wraps the shards' keys, and wrap those of a run anew; the data stays as it is.

    retire: then remove the older versions. Says what was done.
    """
    keys = key_store(project, base, folder)
    with storage.exclusive(folder):
        version = keys.rotate(DATA_KEY)
        count = rotate_all(folder, keys)
        removed = keys.retire(DATA_KEY) if retire else 0
        for aside in folder.glob(".work/*/rows") if retire else ():
            shutil.rmtree(aside)  # rows of an unfinished preparation, which the older keys wrapped: they are sorted again
    older = f"{removed} older removed" if retire else "older ones stay (--retire removes them)"
    return f"{keys.folder}: {DATA_KEY}-{version} now wraps the keys of {count} shards; {older}"


def execute(project: Project, base: Path, run: Run) -> int:
    """Do what is not done yet of: prepare, train, evaluate, bundle. The version that the bundle has in the registry.

    Raises the HeliographError of the stage that fails."""
    keys = key_store(project, base, run.folder)
    sealing = keys if project.data.encrypt else None
    update = run.display.update

    def do_prepare(folder: Path) -> None:
        if sealing and not sealing.versions(DATA_KEY):
            sealing.rotate(DATA_KEY)
        prepare(project.data, base, sealing, folder, update)

    def do_train(folder: Path) -> None:
        job = Job(project.name, project.train, project.model, base, run["prepare"], sealing, folder, project.data.augment)
        train(job, update, run.display.say)

    def do_bundle(folder: Path) -> None:
        parts = [run["prepare"] / "schema.json", run["prepare"] / "preprocess.json", run["evaluate"] / "metrics.json"]
        parts += [file for name in dict.fromkeys(FILES.values()) if (file := run["train"] / name).is_file()]
        lineage = {"source": project.data.source, "stages": {n: run.fingerprints[n] for n in ("prepare", "train", "evaluate")}}
        make(folder, project.name, lineage, parts, keys)

    source = open_source(project.data, base)
    trained_by = {"train": project.train.model_dump(), "model": project.model.model_dump(), "code": _code(base)}
    if project.data.augment:
        trained_by["augment"] = project.data.augment.model_dump()
    prepared_by = {"data": project.data.model_dump(exclude={"augment"}), "source": source.identity()}
    if any(step.step == "function" for step in project.data.preprocess or []):
        prepared_by["code"] = _code(base)
    for stage in (
        Stage("prepare", (), prepared_by, do_prepare),
        Stage("train", ("prepare",), trained_by, do_train),
        Stage(
            "evaluate", ("prepare", "train"), {}, lambda folder: evaluate(run["prepare"], run["train"], sealing, folder, update)
        ),
        Stage("bundle", ("prepare", "train", "evaluate"), {"name": project.name}, do_bundle),
    ):
        run.execute(stage)
    return registry(project, base).add(project.name, run["bundle"])


def _code(base: Path) -> str:
    """A hash of the project's Python files: `model.py` and whatever it may import."""
    digest = hashlib.sha256()
    for file in sorted(base.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
