"""Run: a project's stages in their order, from raw data to a signed bundle."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..cluster import storage
from ..cluster.audit import Audit
from ..cluster.bill import Meter
from ..cluster.keys import DATA_KEY, KeyStore, request_key
from ..cluster.mirror import stored
from ..cluster.runtime import cluster_here, joined
from ..cluster.sealed import SEALED_KEY, Seal, rewrap_all
from ..cluster.spec import Capacity
from ..cluster.storage import read_json, write_json
from ..datasets.schema import Schema
from ..datasets.shards import rotate_all
from ..datasets.sources import open_source
from ..errors import RunError
from ..project import Model, Project
from ..trust import Attack, Explain
from . import demand, transfer
from .archive import SEALED_RUN
from .baseline import baseline
from .bundle import make
from .card import CARD, card
from .display import Display
from .engine import COMPRESSED, FILES, TABLE
from .evaluate import METRICS, Sources, evaluate
from .explain import EXPLAINED, explain
from .fuse import Members, fuse, places_of, require_alike
from .guard import GUARD, REFERENCE
from .prepare import prepare
from .queue import PLACE, QUEUE, Place, turn
from .registry import Registry, registry_at
from .stages import Run, Stage
from .train import Job, train
from .validate import VERDICT, require_fits, validate

log = logging.getLogger("heliograph")
ATTACK = "attack.json"


def key_store(project: Project, base: Path, folder: Path) -> KeyStore:
    """The run's key store: `keys` of the project file, relative to it, or `keys` in the run's folder."""
    return KeyStore((base / Path(project.keys).expanduser()).resolve() if project.keys else folder / "keys")


def registry(project: Project, base: Path) -> Registry:
    """The project's registry: `registry` of the project file, relative to it. Raises StorageError."""
    return registry_at(project.registry, base)


@contextmanager
def opened(folder: Path, workers: int, display: Display) -> Iterator[Run]:
    """Hold a run's folder, with a cluster that starts when a stage needs it, and a log that says what happened.

    Raises RunError when the folder is in use, or was put away."""
    with storage.exclusive(folder):
        _require_out(folder)
        handler = logging.FileHandler(folder / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        loggers = [logging.getLogger("heliograph"), logging.getLogger("ray")]
        loggers[0].setLevel(logging.INFO)
        for logger in loggers:
            logger.addHandler(handler)
        try:
            capacity = joined()
            with (
                cluster_here(workers, folder / "ray-logs") as cluster,
                display.open(),
                _at_its_turn(capacity, folder, display),
                _metered(capacity, folder),
                stored(folder, display.say),
            ):
                yield Run(folder, cluster, display)
        except Exception:
            logging.getLogger("heliograph").exception("the run ended with an error")
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()


@contextmanager
def _at_its_turn(capacity: Capacity | None, folder: Path, display: Display) -> Iterator[None]:
    """Of those that were submitted to the same storage, where `folder` is runs/NAME."""
    if capacity is None or PLACE not in os.environ:
        yield
        return
    with turn(folder.parent.parent / QUEUE, Place(**json.loads(os.environ[PLACE])), capacity, display.say):
        yield


@contextmanager
def _metered(capacity: Capacity | None, folder: Path) -> Iterator[None]:
    """Raises RunError when the run was stopped because of what it costs."""
    if capacity is None:
        yield
        return
    meter = Meter(capacity, folder)
    meter.start()
    try:
        yield
    except BaseException:
        if meter.over:
            raise RunError(f"{meter.over}: raise it, and the same command goes on from the last checkpoint") from None
        raise
    finally:
        meter.stop()


def _require_out(folder: Path) -> None:
    if (folder / SEALED_RUN).exists():
        raise RunError(f"{folder}: is sealed: `heliograph unseal` takes it out again")


def rotate_keys(project: Project, base: Path, folder: Path, retire: bool) -> str:
    """Make new versions of the keys that wrap the keys of shards and of sealed folders, and wrap those of a run and of the
    model's versions anew; what they encrypt stays as it is.

    retire: then remove the older versions. Says what was done.
    """
    keys = key_store(project, base, folder)
    with storage.exclusive(folder), stored(folder, log.warning):
        _require_out(folder)
        version, sealed = keys.rotate(DATA_KEY), 0
        count = rotate_all(folder, keys)
        removed = keys.retire(DATA_KEY) if retire else 0
        if keys.versions(SEALED_KEY):
            keys.rotate(SEALED_KEY)
            sealed = rewrap_all(folder, keys) + registry(project, base).rewrap(project.name, keys)
            removed += keys.retire(SEALED_KEY) if retire else 0
        Audit(keys).write("rotate", f"{DATA_KEY}-{version}", removed=removed)
        for aside in folder.glob(".work/*/rows") if retire else ():
            shutil.rmtree(aside)  # rows of an unfinished preparation, which the older keys wrapped: they are sorted again
    older = f"{removed} older removed" if retire else "older ones stay (--retire removes them)"
    folders = f", and a new key those of {sealed} sealed folders" if sealed else ""
    return f"{keys.folder}: {DATA_KEY}-{version} now wraps the keys of {count} shards{folders}; {older}"


def rotate_request_key(project: Project, base: Path, folder: Path, retire: bool) -> str:
    """Make a new version of the key that opens sealed requests for the project's model. Endpoints offer it from then on.

    retire: remove the older versions, so that what was sealed with them opens no more. Says what was done."""
    keys, name = key_store(project, base, folder), request_key(project.name)
    version = keys.rotate(name)
    removed = keys.retire(name) if retire else 0
    Audit(keys).write("rotate", f"{name}-{version}", removed=removed)
    older = f"{removed} older removed" if retire else f"older ones open requests for {project.serve.key_grace_seconds:g} s more"
    return f"{keys.folder}: requests are sealed with {name}-{version} now; {older}"


def preparation(project: Project, base: Path, run: Run) -> Stage:
    """The stage that all others read from."""
    keys = key_store(project, base, run.folder) if project.data.encrypt else None

    def work(folder: Path) -> None:
        if keys and not keys.versions(DATA_KEY):
            keys.rotate(DATA_KEY)
        if capacity := joined():
            run.cluster.ask(demand.preparation(project.data, capacity).bundles)
        try:
            prepare(project.data, base, keys, folder, run.display.update)
        finally:
            run.cluster.ask(())

    prepared_by = {"data": project.data.model_dump(exclude={"augment"}), "source": open_source(project.data, base).identity()}
    if any(step.step == "function" for step in project.data.preprocess or []):
        prepared_by["code"] = code_of(base)
    return Stage("prepare", (), prepared_by, work)


def starting(project: Project, base: Path, run: Run) -> tuple[list[Stage], Model]:
    """The stage that takes the model which the project's starts from, if it does, and the model with the stage's folder."""
    start = project.model.start
    if start is None:
        return [], project.model
    found = transfer.find(start.model, base, key_store(project, base, run.folder), registry(project, base))

    def work(folder: Path) -> None:
        for text in transfer.take(found, run["prepare"], folder):
            run.display.say(text)

    stage = Stage("start", ("prepare",), {"model": transfer.digest(found)}, work)
    return [stage], project.model.started_from(run["start"].resolve())


def fusing(project: Project, base: Path, run: Run) -> Members | None:
    """What the project's model is fused of, if it is. Raises ModelError."""
    settings = project.model.fuse
    if settings is None:
        return None
    keys = key_store(project, base, run.folder)
    places = places_of(settings, base, keys, registry(project, base))
    shards, encrypt = keys if project.data.encrypt else None, project.train.encrypt
    members = Members(settings, tuple(places), run["prepare"].resolve(), run.fingerprints["prepare"], shards, keys, encrypt)
    require_alike(members)
    return members


def execute(project: Project, base: Path, run: Run) -> int:
    """Do what is not done yet of: prepare, train, evaluate, bundle. The version that the bundle has in the registry.

    Raises the HeliographError of the stage that fails."""
    keys = key_store(project, base, run.folder)
    sealing = keys if project.data.encrypt else None
    update = run.display.update

    run.execute(preparation(project, base, run))
    require_fits(project, Schema.read(run["prepare"]))
    start, model = starting(project, base, run)
    fused = fusing(project, base, run)

    def do_train(folder: Path) -> None:
        if fused:
            update(f"fusing {len(fused.places)} models by {fused.settings.by}")
            fuse(fused, folder)
            return
        if project.train.encrypt:
            Seal.make(folder, keys)
        job = Job(project.name, project.train, model, base, run["prepare"], sealing, folder, project.data.augment, keys)
        train(job, update, run.display.say)

    def do_validate(folder: Path) -> None:
        beside = {"epsilon": read_json(run["train"] / "result.json").get("privacy", {}).get("epsilon")}
        if project.evaluate.attack:
            beside["robust_accuracy"] = read_json(run["attack"] / ATTACK)["robust_accuracy"]
        small = next(run["compress"].glob(f"*/{COMPRESSED}.*"), None) if project.compress else None
        validate(sources, project.evaluate, run["evaluate"], beside, small and small.parent, folder, update)

    trained_by = {"train": project.train.model_dump(), "model": project.model.model_dump(), "code": code_of(base)}
    if fused:
        trained_by = {"members": fused.digest, "by": fused.settings.by, "encrypt": project.train.encrypt}
    if project.data.augment:
        trained_by["augment"] = project.data.augment.model_dump()
    sources = Sources(run["prepare"], run["train"], sealing, keys)
    smaller = [_compression(project, base, run)] if project.compress else []
    explained = [_explanation(project.explain, sources, update)] if project.explain else []
    beside = [_baseline(sources, update)] if has_baseline(project) else []
    attacked = [_attack(project.evaluate.attack, sources)] if project.evaluate.attack else []
    for stage in (
        *start,
        Stage("train", ("prepare", *(s.name for s in start)), trained_by, do_train),
        Stage(
            "evaluate",
            ("prepare", "train"),
            project.evaluate.model_dump(include={"slices", "worst", "confidence", "resamples", "costs"}),
            lambda folder: evaluate(sources, project.evaluate, folder, update),
        ),
        *beside,
        *explained,
        *attacked,
        *smaller,
        Stage(
            "validate",
            ("prepare", "train", "evaluate", *(s.name for s in (*attacked, *smaller))),
            project.evaluate.model_dump(include={"require", "behaviour"}),
            do_validate,
        ),
        Stage(
            "bundle",
            ("prepare", "train", "evaluate", *(s.name for s in (*explained, *attacked, *smaller)), "validate"),
            {"name": project.name},
            lambda folder: _bundle(project, base, run, fused, keys, folder),
        ),
    ):
        run.execute(stage)
    models = registry(project, base)
    known = models.versions(project.name)
    version = models.add(project.name, run["bundle"])
    if version not in known:
        Audit(keys).write("publish", f"{project.name}@{version}")
    return version


def _bundle(project: Project, base: Path, run: Run, fused: Members | None, keys: KeyStore, folder: Path) -> None:
    parts = [run["prepare"] / "schema.json", run["prepare"] / "preprocess.json", run["evaluate"] / METRICS]
    parts += [file for name in dict.fromkeys(FILES.values()) if (file := run["train"] / name).is_file()]
    parts += [run["validate"] / name for name in (VERDICT, REFERENCE, GUARD)]
    parts += [run["explain"] / EXPLAINED] if project.explain else []
    parts += [run["compress"] / TABLE, *run["compress"].glob(f"*/{COMPRESSED}.*")] if project.compress else []
    lineage = _lineage(project, base, run, fused)
    more = {name: read_json(file) for name, file in _told(run, project).items()}
    verdict = read_json(run["validate"] / VERDICT)
    test = read_json(run["evaluate"] / METRICS)
    text = card(project.name, Schema.read(run["prepare"]), lineage, test, verdict, more)
    with tempfile.TemporaryDirectory(prefix="heliograph-") as temp:
        (Path(temp) / CARD).write_text(text)
        make(folder, project.name, lineage, [*parts, Path(temp) / CARD], keys, verdict["failed"])


def _told(run: Run, project: Project) -> dict[str, Path]:
    """What stages said that not every run has, by name."""
    found = {"train": run["train"] / "result.json"}
    found |= {"attack": run["attack"] / ATTACK} if project.evaluate.attack else {}
    return found | ({"explain": run["explain"] / EXPLAINED} if project.explain else {})


def _lineage(project: Project, base: Path, run: Run, fused: Members | None) -> dict[str, Any]:
    """Where a bundle comes from."""
    lineage = {
        "source": project.data.source,
        "data": run.fingerprints["prepare"],
        "code": code_of(base),
        "configuration": run.fingerprints["train"],
        "settings": {"train": project.train.model_dump(mode="json"), "model": project.model.model_dump(mode="json")},
    }
    if project.model.start:
        lineage["start"] = read_json(run["start"] / transfer.NOTE)
        lineage["ancestor"] = lineage["start"]["ancestor"]
    return lineage | (fused.lineage() if fused else {})


def _explanation(settings: Explain, sources: Sources, update: Callable[..., None]) -> Stage:
    return Stage(
        "explain", ("prepare", "train"), settings.model_dump(), lambda folder: explain(sources, settings, folder, update)
    )


def has_baseline(project: Project) -> bool:
    """Whether scikit-learn's models are held against the project's."""
    asked = project.evaluate.baseline
    return not project.data.several and (bool(project.model.preset) if asked is None else asked)


def _baseline(sources: Sources, update: Callable[..., None]) -> Stage:
    return Stage("baseline", ("prepare", "train"), None, lambda folder: baseline(sources, folder, update))


def _attack(settings: Attack, sources: Sources) -> Stage:
    """In a process of its own, since TensorFlow takes the memory of a GPU as a whole."""

    def work(folder: Path) -> None:
        import ray

        from .attack import measure

        gpus = min(1, int(ray.cluster_resources().get("GPU", 0)))
        attacked: Any = ray.remote(num_gpus=gpus, max_calls=1)(measure)
        write_json(folder / ATTACK, ray.get(attacked.remote(sources, settings)))

    return Stage("attack", ("prepare", "train"), settings.model_dump(), work)


def _compression(project: Project, base: Path, run: Run) -> Stage:
    from .compress import compress

    assert project.compress
    settings = project.compress.model_dump(exclude={"parallel"})
    return Stage("compress", ("prepare", "train"), settings, lambda folder: compress(project, base, run, folder))


def code_of(base: Path) -> str:
    """A hash of the project's Python files: `model.py` and whatever it may import."""
    digest = hashlib.sha256()
    for file in sorted(base.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
