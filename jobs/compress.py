"""Compress: smaller and faster forms of the trained model, made side by side on the cluster, and the best of them chosen.

    RUN/candidates/HASH/       a candidate (`candidate.py`), named by what it is made of, so that a change of one recipe makes one
    RUN/compress/compress.json figures of the original and of each candidate, verdicts, what was chosen
                 form/compressed.*  the chosen one's file, a variant of the model in the bundle

Candidates are chosen by the validation rows and described by the test rows too, so that the test figure of the chosen one is not
the luckiest of many. Times are measured one after the other when nothing else runs, on one thread.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from ..cluster.sealed import Seal, copy
from ..cluster.storage import read_json, write_json
from ..errors import ModelError
from ..project import FILE, Project, Train
from ..recipes import FIGURES, Compress, Distil
from . import candidate, transfer
from .candidate import CANDIDATE, Task
from .demand import MOST_PARALLEL, room
from .engine import COMPRESSED, FILES, TABLE
from .run import code_of, key_store, registry
from .stages import Run, hashed
from .watch import METRICS, STEPS, last_line
from .worker import STOP_FILE, Job

SECONDS_TO_STOP = 60
RETRIES = 3
"""Of a candidate whose machine is lost: it goes on from its last checkpoint."""


def compress(project: Project, base: Path, run: Run, folder: Path) -> None:
    """Make what is not made, choose, and fill the stage's folder. Raises ModelError, a line for each recipe that fails."""
    wanted = project.compress
    assert wanted
    tasks = _tasks(project, base, run, wanted)
    originals = _make(project.train, wanted, run, tasks)
    forms = [("original", run["train"], read_json(originals))]
    forms += [(task.name, task.folder, read_json(task.folder / CANDIDATE)) for task in tasks]
    table = _timed(forms, tasks[0].job, run)
    rows = [_judged(row, table[0], wanted) for row in table]
    good = [row for row in rows[1:] if row["meets"]]
    chosen = min(good, key=lambda row: row["figures"]["latency_ms" if wanted.prefer == "latency" else "size"], default=None)
    if chosen:
        keys, file, form = key_store(project, base, run.folder), FILES[chosen["engine"]], folder / "form"
        form.mkdir(exist_ok=True)
        seal = Seal.make(form, keys) if project.train.encrypt else None
        copy(run.folder / chosen["place"] / file, form / file.replace("model", COMPRESSED), keys, seal)
    note = {
        "require": wanted.require,
        "prefer": wanted.prefer,
        "judged_by": "validation" if rows[0]["validation"] else "test",
        "candidates": rows,
        "chosen": chosen["name"] if chosen else None,
        "original_serves": rows[0]["meets"] or chosen is None,
    }
    write_json(folder / TABLE, note)
    for old in (run.folder / "candidates").iterdir():
        if old.is_dir() and old not in {task.folder for task in tasks}:
            shutil.rmtree(old, ignore_errors=True)
    if chosen is None:
        near = "; ".join(f"{row['name']}: {', '.join(row['missed'])}" for row in rows[1:])
        run.display.say(f"no candidate meets compress.require, so the bundle has the original alone ({near})")


def _tasks(project: Project, base: Path, run: Run, wanted: Compress) -> list[Task]:
    keys = key_store(project, base, run.folder)
    trained = read_json(run["train"] / "result.json")
    job = Job(
        project.name, project.train, project.model, base, run["prepare"].resolve(), keys if project.data.encrypt else None,
        run.folder / "candidates", project.data.augment, keys, batch_size=trained["batch_size"],
    )  # fmt: skip
    models, tasks = registry(project, base), []
    for name, steps in wanted.recipes.items():
        teachers = []
        for i, step in enumerate(steps):
            named = step.teachers if isinstance(step, Distil) else []
            where = f"compress.recipes.{name}[{i}].teachers"
            found = [transfer.find(address, base, keys, models, f"{FILE}: {where}") for address in named]
            for text in (text for place in found for text in transfer.compared(place, run["prepare"], where)):
                run.display.say(text)
            teachers.append(tuple(found) or (run["train"].resolve(),))
        known = [[transfer.digest(teacher) for teacher in each] for each in teachers]
        made_of = [run.fingerprints["train"], code_of(base), [step.model_dump() for step in steps], known]
        place = run.folder / "candidates" / hashed(made_of)
        tasks.append(Task(name, tuple(steps), place, job, run["train"].resolve(), tuple(teachers)))
    return tasks


def _make(train: Train, wanted: Compress, run: Run, tasks: list[Task]) -> Path:
    """Make the candidates that are not there; the file that describes the original."""
    import ray

    originals = run.folder / "candidates" / f"original-{run.fingerprints['train'][:16]}.json"
    if not originals.exists():
        describe: Any = ray.remote(max_calls=1)(candidate.original)
        write_json(originals, ray.get(describe.remote(tasks[0])))
    missing = [task for task in tasks if not (task.folder / CANDIDATE).exists()]
    if missing:
        each, ranks, parallel = room(train, min(wanted.parallel or MOST_PARALLEL, len(missing)))
        with _makers(each, ranks, parallel, train.resources.placement) as makers:
            _by(makers, run, tasks, missing)
    return originals


def _by(makers: list[Any], run: Run, tasks: list[Task], missing: list[Task]) -> None:
    """Each maker a candidate after the other. Raises ModelError, when all others are made, for those that cannot be."""
    import ray

    waiting, working, failed = list(missing), {}, []
    free = list(makers)
    try:
        while waiting or working:
            while waiting and free:
                maker, task = free.pop(0), waiting.pop(0)
                working[maker.make.remote(task)] = maker, task
            done, _ = ray.wait(list(working), timeout=0.3)
            for reference in done:
                maker, task = working.pop(reference)
                free.append(maker)
                if why := ray.get(reference):
                    failed.append(why if why.startswith("compress.") else f"compress.recipes.{task.name}: {why}")
            _show(run, tasks, [task for _, task in working.values()], len(waiting))
    except KeyboardInterrupt:
        _stop(run, working)
        raise
    if failed:
        raise ModelError("\n".join(f"{FILE}: {why}" for why in failed))


def _stop(run: Run, working: dict[Any, Any]) -> None:
    """Ask what trains for a last checkpoint."""
    import ray

    run.display.update("interrupted: saving checkpoints")
    for _, task in working.values():
        for folder in task.folder.glob("[0-9]*-*"):
            (folder / STOP_FILE).touch()
    with contextlib.suppress(KeyboardInterrupt):
        ray.wait(list(working), num_returns=len(working), timeout=SECONDS_TO_STOP)


def _show(run: Run, tasks: list[Task], working: list[Task], waiting: int) -> None:
    said, progress = [], 0.0
    for task in working:
        of = f"{task.name}: loading" if not task.folder.exists() else f"{task.name}: converting"
        for i, step in enumerate(task.steps):
            line, epoch = last_line(task.place(i) / STEPS), last_line(task.place(i) / METRICS)
            if line and not (task.place(i) / "result.json").exists():
                value = next((f" {epoch[k]:.3f}" for k in ("val_accuracy", "val_loss") if k in epoch), "")
                of = f"{task.name}: {step.step} {100 * line['step'] / line['end']:.0f} %{value}"
                progress += line["step"] / line["end"] / len(task.steps)
        said.append(of)
    done = len(tasks) - waiting - len(working)
    run.display.update(", ".join(said), done + progress, len(tasks))


@contextlib.contextmanager
def _makers(each: dict[str, float], ranks: int, parallel: int, placement: str) -> Any:
    """Actors that make candidates, each with room for all ranks of a training."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from .group import options

    groups = [placement_group([each] * ranks, strategy=placement) for _ in range(parallel)]
    try:
        maker: Any = ray.remote(candidate.Maker)
        yield [
            maker.options(
                **options(each),
                max_restarts=RETRIES,
                max_task_retries=RETRIES,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True),
            ).remote(parallel * ranks, each)
            for group in groups
        ]
    finally:
        for group in groups:
            remove_placement_group(group)


def _timed(forms: list[tuple[str, Path, dict[str, Any]]], job: Job, run: Run) -> list[dict[str, Any]]:
    """What is known of each form, and its times in the fastest engine that runs it."""
    import ray

    run.display.update("measuring times", len(forms), len(forms))
    every = [(folder.resolve(), kind) for _, folder, note in forms for kind in note["engines"]]
    measure: Any = ray.remote(max_calls=1)(candidate.timings)
    times = dict(zip(every, ray.get(measure.remote(every, job)), strict=True))
    rows = []
    for name, folder, note in forms:
        kind = min(note["engines"], key=lambda k: times[folder.resolve(), k]["p50_1"])
        known = {key: value for key, value in note.items() if key not in ("engines", "name")}
        place = {"place": str(folder.relative_to(run.folder)), "latency_ms": times[folder.resolve(), kind]}
        rows.append({"name": name, "engine": kind, **note["engines"][kind], **known, **place})
    return rows


def _judged(row: dict[str, Any], original: dict[str, Any], wanted: Compress) -> dict[str, Any]:
    """With the figures that a requirement may name, and what is missed of it."""
    by, of_original = row["validation"] or row["test"], original["validation"] or original["test"]
    main = "accuracy" if "accuracy" in by else "r2"
    figures = {name: by[name] for name in FIGURES if by.get(name) is not None}
    figures |= {
        "drop": (of_original.get(main) or 0.0) - (by.get(main) or 0.0),
        "size": row["bytes"] / original["bytes"],
        "gzip": row["gzip"] / original["gzip"],
        "latency": row["latency_ms"]["p50_1"] / original["latency_ms"]["p50_1"],
        "latency_ms": row["latency_ms"]["p50_1"],
    }
    missed = []
    for name, limit in wanted.require.items():
        sign, bound = limit[:2], float(limit[2:])
        value = figures.get(name)
        if value is None:
            raise ModelError(f"{FILE}: compress.require.{name}: these rows have no such figure: there are {', '.join(figures)}")
        if not (value <= bound + 1e-9 if sign == "<=" else value >= bound - 1e-9):
            missed.append(f"{name} is {value:.4g}, not {limit}")
    return {**row, "figures": figures, "missed": missed, "meets": not missed}
