"""Train: Keras 3 on Ray Train, from the driver's side: what to start, what to show, how to stop.

The workers (`worker.py`) keep all state in the job's folder, in checkpoints that every rank agreed on. So whatever ends
them (a lost worker, a lost node, a kill of this very process) the next start goes on from there, with as many workers as
there are. Ctrl-C and SIGTERM first ask them, by a file, for one more checkpoint.
"""

import contextlib
import functools
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..cluster.fit import Demand, fit, why_not
from ..cluster.runtime import joined
from ..cluster.storage import read_json, write_json
from ..errors import RunError
from .batch import largest_batch
from .checkpoint import newest, step_of
from .demand import worker_bundle
from .pipeline import check_settings, train_pipelined
from .watch import EVENTS, METRICS, STEPS, last_line, read_lines
from .worker import SAVE_FILE, STOP_FILE, Job, work

SECONDS_TO_STOP = 60
"""How long an interrupted training may take to save a checkpoint."""
SECONDS_FOR_A_REPLACEMENT = 10
"""How long an elastic training waits for another worker in a lost one's place, before it goes on with fewer."""
ELASTIC_CHECK_SECONDS = 10
"""How often an elastic training looks for room for more workers."""


def train(job: Job, update: Callable[..., None], say: Callable[[str], None]) -> None:
    """Train on the cluster until the end is in `job.folder`: model.keras, model.onnx, result.json.

    update: is told how far it is. say: is told what a person should know afterwards too, such as an anomaly.
    Raises ModelError for a model that does not fit, RunError for workers that the cluster can never hold, and
    KeyboardInterrupt, after a checkpoint, when it was interrupted.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(SECONDS_FOR_A_REPLACEMENT))
    resources = _resources(job)
    job = replace(job, batch_size=_batch_size(job, resources, update))
    if job.train.pipeline:
        check_settings(job)
        fit = functools.partial(train_pipelined, job, resources, update)
    else:
        fit = _trainer(job, resources).fit
    shutil.rmtree(job.folder / "ray", ignore_errors=True)
    for file in (STOP_FILE, SAVE_FILE):
        (job.folder / file).unlink(missing_ok=True)
    _watched(job, fit, update, say)
    shutil.rmtree(job.folder / "ray", ignore_errors=True)


def _trainer(job: Job, resources: dict[str, float]) -> Any:
    from ray.train import RunConfig, ScalingConfig

    from .backend import KerasConfig, Trainer

    fewest, most = job.train.fewest_workers, job.train.most_workers
    return Trainer(
        work,
        train_loop_config={"job": job},
        backend_config=KerasConfig(),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker=resources,
            placement_strategy=job.train.resources.placement,
            accelerator_type=job.train.resources.accelerator,
            elastic_resize_monitor_interval_s=ELASTIC_CHECK_SECONDS,
        ),
        run_config=RunConfig(name="train", storage_path=str(job.folder / "ray")),
    )


def _watched(job: Job, work: Callable[[], Any], update: Callable[..., None], say: Callable[[str], None]) -> None:
    """Do the work in a thread, and meanwhile show how far it is."""
    failure: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    reached = [step_of(c) for c in newest(job.folder / "checkpoints")]
    shown = len(read_lines(job.folder / EVENTS))
    draining: set[str] = set()
    update(f"starting workers, going on after step {reached[0]}" if reached else "starting workers")
    # In a thread, so that Ctrl-C reaches the main thread at once (Ray Train would catch it and wait). An event says when it
    # ends: in Python 3.11 a `join` that Ctrl-C interrupts takes the thread for dead.
    threading.Thread(target=run, daemon=True).start()
    try:
        while not done.wait(0.3):
            _save_before_a_node_goes(job, draining)
            shown = _show(job, shown, update, say)
    except KeyboardInterrupt:
        _stop(job, done, update)
        if failure:
            raise failure[0] from None
        raise
    if failure:
        raise failure[0]


def _batch_size(job: Job, resources: dict[str, float], update: Callable[..., None]) -> int:
    """`train.batch_size`, or the largest that fits, which is found once and kept for when the training goes on."""
    import ray

    if isinstance(job.train.batch_size, int):
        return job.train.batch_size
    found = job.folder / "batch.json"
    if not found.exists():
        update("finding the largest batch that fits")
        here = min(job.train.fewest_workers, max(1, int(ray.nodes()[0]["Resources"].get("CPU", 1))))
        once: Any = ray.remote(max_calls=1)(largest_batch)  # TensorFlow keeps what it found no room for
        trial = once.options(num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0))
        write_json(found, ray.get(trial.remote(job.train, job.model, job.project, job.prepared, here)))
    return read_json(found)


def _stop(job: Job, done: threading.Event, update: Callable[..., None]) -> None:
    """Ask the workers for a last checkpoint and wait for it; another Ctrl-C waits no longer."""
    if not read_lines(job.folder / EVENTS):
        return  # nothing was trained yet
    update("interrupted: saving a checkpoint")
    (job.folder / STOP_FILE).touch()
    with contextlib.suppress(KeyboardInterrupt):
        done.wait(SECONDS_TO_STOP)


def _resources(job: Job) -> dict[str, float]:
    """What a worker takes. Raises RunError when the cluster could never hold the workers."""
    import ray

    train, capacity = job.train, joined()
    wanted, workers = train.resources, train.fewest_workers * (train.pipeline.stages if train.pipeline else 1)
    each = worker_bundle(train, capacity.gpus if capacity else ray.cluster_resources().get("GPU", 0))
    if capacity:
        demand = Demand((each,) * workers, None if train.pipeline else wanted.placement)
        if fit(capacity, [demand]).unplaced:
            raise RunError(f"train.workers is {train.workers}: {why_not(capacity, demand)}")
    else:
        _require_room(job, each, workers)
    each.pop(f"accelerator_type:{wanted.accelerator}", None)  # Ray Train adds it
    return each


def _require_room(job: Job, each: dict[str, float], workers: int) -> None:
    """In a cluster that does not grow."""
    import ray

    placement = job.train.resources.placement
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = [min((int(node.get(n, 0) / amount) for n, amount in each.items()), default=workers) for node in nodes]
    if placement == "STRICT_PACK":
        room = [max(room)]
    elif placement == "STRICT_SPREAD":
        room = [min(1, r) for r in room]
    if sum(room) < workers:
        stages = f" times {job.train.pipeline.stages} stages" if job.train.pipeline else ""
        asked = " and ".join(f"{amount:g} {name}" for name, amount in each.items())
        raise RunError(
            f"train.workers is {job.train.workers}{stages} with {asked} each ({placement}), "
            f"but the cluster holds {sum(room)} of them: "
            f"{'lower train.workers or train.resources' if not sum(room) else f'use {sum(room)} or fewer'}, or add nodes"
        )


def _save_before_a_node_goes(job: Job, known: set[str]) -> None:
    """A node that is being drained (a spot notice) takes its worker with it: save before it does."""
    from ray._private.state import state

    draining = set(state.get_draining_nodes())
    if draining - known:
        (job.folder / SAVE_FILE).touch()
    known |= draining


def _show(job: Job, shown: int, update: Callable[..., None], say: Callable[[str], None]) -> int:
    """Say what is new; returns how many events have been said."""
    events = read_lines(job.folder / EVENTS)
    for event in events[shown:]:
        if event["kind"] != "workers" or event["step"]:
            say(f"step {event['step']}: {event['text']}")
    line, epoch = last_line(job.folder / STEPS), last_line(job.folder / METRICS)
    if line:
        said = f"epoch {line['epoch']}/{job.train.epochs}"
        said += f"  loss {line['loss']:.3f}" if line["loss"] is not None else ""
        said += "".join(f"  {k} {v:.3f}" for k, v in epoch.items() if k in ("val_loss", "val_accuracy", "val_mae"))
        update(f"{said}  {line['rows_per_second']:,.0f} rows/s", line["step"], line["end"])
    return len(events)
