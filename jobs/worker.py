"""One rank of a training, from its start to its end.

All ranks run the same loop. What they must decide together (save now, stop, go back) is decided on what the last call's
exchange told all of them (`steps.Signals`), so no rank can take another way than the rest.
"""

import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..cluster.keys import KeyStore
from ..cluster.runtime import LOOPBACK, keep_on_loopback
from ..cluster.sealed import Seal, create
from ..cluster.storage import write_json
from ..datasets.ingest import Block, Part, blocks, drawn
from ..datasets.schema import Schema
from ..datasets.shards import Manifest
from ..errors import RunError
from ..project import Augment, Model, Train
from . import private
from .anomaly import Detector, load_models
from .attack import Box, hardening
from .averages import Averages, collect_statistics
from .checkpoint import Checkpoints, forget_after, place, read
from .course import judge, last_step, reached
from .engine import Engine
from .export import export
from .model import build, compile_parts
from .rate import rate
from .shaping import Shrinking, shaped
from .steps import HOST, MEMORY, ORDER, OWN, ROWS, STEP, WAIT, Fed, Feed, LossScale, Objective, Signals, Steps, claim
from .tasks import Losses
from .transfer import ADAPTERS, adapters, merged, pace
from .watch import BOARD, METRICS, Watch, write_lines

SAVE, STOP, TIME_IS_UP, BACK, GIVE_UP = 1, 2, 4, 8, 16
"""Orders of rank 0 to all: save a checkpoint; save one and stop; the same, and the training is done; go back to the last
checkpoint; end because of an anomaly."""
CALL_SECONDS = 0.2
"""What a call should take: long enough to cost nothing, short enough for Ctrl-C."""
MOST_ROLLBACKS = 3
ROLLBACK_RATE = 0.3
STOP_FILE, SAVE_FILE = "stop", "save"
"""What the driver puts into the job's folder when it was interrupted, and when a node is about to be taken away."""
PROFILE_FROM = 20
INTERRUPTED, ANOMALY = "interrupted", "anomaly"
SUSPECT_STEPS = 5
"""How late an anomaly may be seen: younger checkpoints may hold it already."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; keys go by reference."""

    name: str
    train: Train
    model: Model
    project: Path
    prepared: Path
    keys: KeyStore | None
    folder: Path
    """checkpoints/, what `watch` writes, and at the end model.keras, model.onnx, result.json."""
    augment: Augment | None = None
    sealing: KeyStore | None = None
    """Opens the seal of `folder`, if it has one: then checkpoints and models are sealed with it."""
    batch_size: int = 0
    """What `train.batch_size` came out as."""

    export: bool = True
    """Whether models are wanted at the end; a trial of a search needs none."""
    share: float = 1.0
    """Of the training shards."""
    judged: frozenset[int] = frozenset()
    """Epochs after which rank 0 asks whether the training goes on."""
    measured: tuple[str, ...] = ()
    """Of `parameters` and `latency_ms` (of a row in ONNX Runtime), what stands beside the figures of each epoch."""
    shrinking: Shrinking | None = None
    """The step of a recipe that this training is."""

    def build(self, schema: Schema) -> Any:
        """The model as the training begins with it."""
        if self.shrinking:
            return self.shrinking.model(schema, self.model, self.project)
        return build(self.model, schema, self.project)

    @property
    def seal(self) -> Seal | None:
        return Seal.of(self.folder, self.sealing)


def work_as(job: Job, rank: int, ranks: int, here: int, goes_on: Callable[[int], bool] | None = None) -> None:
    """The same without Ray Train. here: how many do so on this machine at the same time. goes_on: is asked by rank 0 after the
    epochs that are judged; while it waits, all do."""
    _Rank(job, rank, ranks, here, goes_on).run()


def work(config: dict) -> None:
    """What Ray Train runs on each worker."""
    import ray.train

    context = ray.train.get_context()
    _Rank(config["job"], context.get_world_rank(), context.get_world_size(), context.get_local_world_size()).run()


class _Rank:
    def __init__(self, job: Job, rank: int, ranks: int, ranks_here: int, goes_on: Callable[[int], bool] | None = None):
        import keras

        self.job, self.rank, self.ranks, self.goes_on = job, rank, ranks, goes_on
        gpus = claim(ranks_here, 2)
        train = job.train
        self.schema, self.manifest = Schema.read(job.prepared), Manifest.read(job.prepared).of_train(job.share)
        keras.utils.set_random_seed(train.seed)
        keras.mixed_precision.set_global_policy(train.precision)
        self.device, self.strategy = _strategy(ranks, gpus)
        batch = job.batch_size
        self.part = Part(job.prepared, self.manifest, "train", job.keys, rank, ranks, batch, train.seed)
        self.held_out = Part(job.prepared, self.manifest, "validation", job.keys, rank, ranks, 4 * batch, None)
        self.end = last_step(train, self.part.steps)
        with self.strategy.scope():
            self.model = job.build(self.schema)
            schedule, self.factor = rate(train, self.end)
            parts = compile_parts(train, self.schema, self.manifest, schedule)
            self.optimizer = parts.optimizer
            if job.model.start and not job.shrinking:
                pace(self.optimizer, self.model, job.model.start, self.part.steps)
            self.shaping = shaped(job.shrinking, self.model, self.schema, self.end)
            self.shaping.hook(self.optimizer)
            self.objective = Objective(
                parts.loss, self.shaping.guide, self.shaping.labels, self.manifest.labelled, self._hardening(), self._privacy()
            )  # fmt: skip
            self.averages = Averages(train, self.model, self.optimizer)
            self.optimizer.build([*self.model.trainable_variables, *self.objective.variables])
            meters, scale = parts.meters(), LossScale() if train.precision == "mixed_float16" else None
        self.twins = parts.meters()
        """Meters outside the strategy, which turn the ranks' sums into figures."""
        state = [*self.model.variables, *self.optimizer.variables, self.factor]
        state += [scale.variable, scale.counter] if scale else []
        state += [*self.averages.variables, *self.shaping.variables, *self.objective.variables]
        specs = (self.schema.inputs, parts.target)
        self.steps = Steps(
            self.model, self.objective, self.optimizer, meters, self.strategy, specs, rank, ranks, train.accumulate, scale,
            train.xla, (job.augment, self.schema.ids),
        )  # fmt: skip
        self.measured = self._measure() if rank == 0 and job.measured else {}
        self.watch: Watch | None = None
        self.anomaly, self.anomaly_at = "", 0
        self.profiled: int | None = None
        """The step at which the profile began; -1 when it is done."""
        self.warnings: list[str] = []
        folder = job.folder / "checkpoints"
        self.checkpoints = Checkpoints(folder, job.seal, state, self.strategy, rank, train.checkpoint.keep, self._warn)
        self.detector = Detector(ranks)
        self.looking = ThreadPoolExecutor(1)
        """Where rank 0's detector works, so that training does not wait while it learns."""
        self.looks: list[Future] = []
        self.host = np.zeros(HOST, np.float32)
        self.orders = 0

    def _hardening(self) -> Callable[..., dict[str, Any]] | None:
        settings = self.job.train.adversarial
        if settings is None:
            return None
        box = Box.of(self.job.prepared, self.job.keys, settings.fixed, "train.adversarial")
        return hardening(settings, box, self.job.train.seed)

    def _privacy(self) -> tuple[float, float] | None:
        """(clip, noise)."""
        settings = self.job.train.privacy
        if settings is None:
            return None
        private.require_private(self.model)
        return settings.clip, private.noise_of(self.job.train, self.manifest, self.part.batch_size, self.end)

    def _spent(self) -> dict[str, float]:
        """Of the budget of a private training."""
        if self.objective.private is None:
            return {}
        rows = self.manifest.rows("train")
        delta, share = private.delta_of(self.job.train, rows), min(1.0, self.part.batch_size / rows)
        return {"epsilon": round(private.spent(self.objective.private[1], share, self.step, delta), 4)}

    def _blocks(self) -> Iterator[Block]:
        """Of the training rows, from this step on."""
        if self.objective.private:
            parts = self.strategy.num_replicas_in_sync // self.ranks * self.job.train.accumulate
            return drawn(self.part, self.step, self.end, parts)
        return blocks(self.part, self.step, self.end, self.job.augment)

    def _measure(self) -> dict[str, float]:
        """Of the model as it begins, which costs the same as the trained one."""
        found = {"parameters": float(self.model.count_params())}
        if "latency_ms" in self.job.measured:
            logging.disable(logging.WARNING)
            plain = self.job.build(self.schema)
            with tempfile.TemporaryDirectory() as folder:
                plain.export(Path(folder) / "model.onnx", format="onnx", verbose=False)
                found["latency_ms"] = round(1000 * Engine(Path(folder), self.job.prepared, threads=1).measure(), 4)
        return found

    def _warn(self, text: str) -> None:
        if self.watch:
            self.watch.event(self.step, "checkpoint", text)
        else:
            self.warnings.append(text)

    def _restore(self) -> None:
        """Take up the newest checkpoint, or the beginning."""
        extra = []
        self.step, self.history, self.seconds, self.rollbacks, self.lowered = 0, [], 0.0, 0, 0
        if found := self.checkpoints.restore():
            note, extra = found
            self.step, self.history, self.seconds = note["step"], note["history"], note["seconds"]
            self.rollbacks, self.lowered = note["rollbacks"], note["lowered"]
        self.steps.reset()
        if self.rank == 0 and self.step % self.part.steps:
            self.steps.take_up(extra)

    def run(self) -> None:
        self._restore()
        if self.rank == 0:
            self.watch = Watch(self.job.folder, self.job.name, self.step, self.end)
            self.watch.event(self.step, "workers", started(self.ranks, self.step))
            self.looking.submit(load_models)  # not before: the other ranks wait for this one
            for text in self.warnings:
                self._warn(text)
        try:
            reason = self._loop()
            self.checkpoints.settle(must=True)
            if reason == ANOMALY:
                if self.rank == 0:
                    raise RunError(f"training stopped: {self.anomaly} (train.on_anomaly is {self.job.train.on_anomaly})")
            elif reason != INTERRUPTED:
                self._finish(reason)
        finally:
            self._end_profile()
            if self.watch:
                self._hear_detector(wait=True)
                self.watch.close()

    def _loop(self) -> str:
        """Train to the end; why it ended."""
        reason = self._reached()
        while not reason:
            feed = Feed(self._blocks(), self.device)
            held_out = self._held_out()
            try:
                reason = self._from_here(feed, held_out)
            finally:
                for each in (feed, held_out):
                    if each:
                        each.close()
        return reason

    def _held_out(self) -> Feed | None:
        if not self.held_out.rows:
            return None
        epochs = -(-self.end // self.part.steps)
        done = self.step // self.part.steps
        return Feed(blocks(self.held_out, done * self.held_out.steps, epochs * self.held_out.steps), self.device)

    def _from_here(self, feed: Feed, held_out: Feed | None) -> str:
        """Until the training ends (why), or goes back to a checkpoint (an empty text)."""
        saved, count = time.monotonic(), 1
        self.epoch_began, self.rows = time.monotonic(), 0.0
        while True:
            block = next(feed)
            first = 0
            while first < block.steps:
                count = min(count, block.steps - first, self.shaping.pause(self.step))
                signals = self._call(block, first, count, feed)
                first, self.step = first + count, self.step + count
                self.shaping.grow(self.step)
                self.rows += float(signals.steps[:, ROWS].sum())
                self.checkpoints.hear(signals.hosts)
                count = max(1, int(CALL_SECONDS / max(1e-6, float(signals.hosts[:, STEP].max()) or CALL_SECONDS)))
                if self.rank == 0:
                    self._look(signals, saved)
                if signals.ordered(BACK):
                    self._go_back()
                    return ""
                epoch_ends = self.step % self.part.steps == 0 or self.step == self.end
                reason = self._epoch(held_out) if epoch_ends else ""
                if signals.ordered(GIVE_UP):
                    return ANOMALY
                if signals.ordered(TIME_IS_UP):
                    reason = reason or f"{self.job.train.stop.minutes:g} minutes"
                if signals.ordered(STOP):
                    reason = reason or INTERRUPTED
                if epoch_ends or reason or (signals.ordered(SAVE) and self.checkpoints.settled):
                    self._save()
                    saved = time.monotonic()
                if reason:
                    return reason

    def _call(self, block: Fed, first: int, count: int, feed: Feed) -> Signals:
        self._profile()
        self.host[ORDER], self.orders = self.orders, 0
        self.host[MEMORY] = psutil.Process().memory_info().rss / 2**20
        self.checkpoints.say(self.host)
        started, waited = time.monotonic(), feed.waited
        signals = self.steps.train(block, first, count, self.host)
        seconds = time.monotonic() - started
        self.seconds += seconds
        self.host[STEP] = seconds / count
        self.host[WAIT] = min(1.0, (feed.waited - waited) / max(seconds, 1e-6))
        return signals

    def _profile(self) -> None:
        """Begin and end the profile that `train.watch.profile` asks for: rank 0's, once the first steps are over."""
        import tensorflow as tf

        if not (self.rank == 0 and self.job.train.watch.profile):
            return
        if self.profiled is None and self.step >= PROFILE_FROM:
            tf.profiler.experimental.start(str(self.job.folder / BOARD))
            self.profiled = self.step
        elif self.profiled is not None and 0 <= self.profiled <= self.step - self.job.train.watch.profile:
            self._end_profile()

    def _end_profile(self) -> None:
        import tensorflow as tf

        if self.profiled is not None and self.profiled >= 0:
            tf.profiler.experimental.stop()
            self.profiled = -1

    def _look(self, signals: Signals, saved: float) -> None:
        """Rank 0 between calls: show what was done, and see what all must do next."""
        assert self.watch
        train, folder = self.job.train, self.job.folder
        self.watch.see(self.step, (self.step - 1) // self.part.steps + 1, signals)
        if not self.watch.has_graph:
            self.watch.graph(self.steps.graph())
        done, steps = self.step - len(signals.steps), signals.steps
        self.looks.append(self.looking.submit(self.detector.see, done, steps[:, :OWN], steps[:, OWN:]))
        self._hear_detector(wait=self.step % self.part.steps == 0)
        if time.monotonic() - saved > train.checkpoint.seconds:
            self.orders |= SAVE
        if train.stop.minutes and self.seconds > 60 * train.stop.minutes:
            self.orders |= TIME_IS_UP
        if (folder / STOP_FILE).exists():
            self.orders |= STOP
        if (folder / SAVE_FILE).exists():
            (folder / SAVE_FILE).unlink(missing_ok=True)
            self.orders |= SAVE

    def _hear_detector(self, wait: bool) -> None:
        """What the detector found in the calls that it is through with; in all, where there is time to wait."""
        assert self.watch
        while self.looks and (wait or self.looks[0].done()):
            for found in self.looks.pop(0).result():
                self.watch.event(found.step, "anomaly", f"{found.text}; {self._rows_of(found.step)}")
                if found.serious and self.job.train.on_anomaly != "warn" and not self.anomaly:
                    self.anomaly, self.anomaly_at = found.text, found.step
                    again = self.job.train.on_anomaly == "rollback" and self.rollbacks < MOST_ROLLBACKS
                    self.orders |= BACK if again else GIVE_UP

    def _rows_of(self, step: int) -> str:
        """Where a step's rows lie."""
        epoch, place = divmod(step - 1, self.part.steps)
        return f"epoch {epoch + 1}, rows {self.part.edge(place)} to {self.part.edge(place + 1) - 1} in its order"

    def _epoch(self, held_out: Feed | None) -> str:
        """What ends with an epoch: figures, validation, the rate's plateau, the best so far; why training ends, if it does."""
        train = self.job.train
        figures: dict[str, Any] = {"epoch": -(-self.step // self.part.steps), "step": self.step, **self._figures()}
        seconds = time.monotonic() - self.epoch_began
        if self.step % self.part.steps == 0:
            self.averages.end_of(figures["epoch"])
        with self.averages.inside():
            if held_out:
                done = 0
                while done < self.held_out.steps:
                    block = next(held_out)
                    self.steps.evaluate(block)
                    done += block.steps
                figures |= {f"val_{name}": value for name, value in self._figures().items()}
            weights = [(v.path, np.asarray(v)) for v in self.model.weights] if train.watch.histograms else []
        rate = round(self.rows / seconds, 1)
        if isinstance(self.objective.loss, Losses):
            figures |= self.objective.loss.learned()
        figures |= self.measured | {"seconds": round(seconds, 3), "rows_per_second": rate, "workers": self.ranks}
        self.history = [*self.history, figures]
        if self.watch:
            self.watch.epoch(figures, weights)
        reason = self._judge() or self._asked(figures["epoch"])
        self.epoch_began, self.rows = time.monotonic(), 0.0
        return reason

    def _figures(self) -> dict[str, float]:
        """The meters' results over all ranks; they begin anew."""
        sums = self.steps.collect()
        for variable, value in zip((v for twin in self.twins for v in twin.variables), sums, strict=True):
            variable.assign(value)
        self.steps.reset()
        return {twin.name: float(twin.result()) for twin in self.twins}

    def _judge(self) -> str:
        """Hold the last epoch against the ones before; why training ends, if it does."""
        verdict = judge(self.job.train, self.history, self.lowered)
        if verdict.best:
            self.checkpoints.best = self.step
        if verdict.factor is not None:
            self.factor.assign(verdict.factor(float(np.asarray(self.factor))))
            self.lowered = self.history[-1]["epoch"]
        return verdict.reason or self._reached()

    def _asked(self, epoch: int) -> str:
        """Whether the one who judges lets the training go on, as all ranks are told."""
        import tensorflow as tf

        if epoch not in self.job.judged:
            return ""
        on = self.goes_on(epoch) if self.goes_on else True
        return "" if self.strategy.gather(tf.constant([int(on)]), axis=0).numpy().all() else INTERRUPTED

    def _reached(self) -> str:
        return reached(self.job.train, self.step, self.end)

    def _save(self) -> None:
        if self.watch:
            self.watch.flush()
        self.checkpoints.settle()
        sums = self.steps.collect()
        note = {"history": self.history, "seconds": self.seconds, "rollbacks": self.rollbacks, "lowered": self.lowered}
        self.checkpoints.save(self.step, note, sums)

    def _go_back(self) -> None:
        """To the last checkpoint that is good, with a smaller learning rate."""
        at = self.step
        self.checkpoints.settle()
        if self.rank == 0:
            self._hear_detector(wait=True)
            forget_after(self.checkpoints.folder, self.anomaly_at - SUSPECT_STEPS)
        self.steps.collect()  # all wait here until rank 0 has removed them
        rollbacks = self.rollbacks + 1
        self._restore()
        self.rollbacks = rollbacks
        self.factor.assign(ROLLBACK_RATE**rollbacks)
        self.anomaly = ""
        if self.watch:
            self.watch.back_to(self.step)
            self.watch.event(at, "rollback", f"back to step {self.step}, learning rate ×{ROLLBACK_RATE**rollbacks:.2g}")
            self.detector.forget()

    def _finish(self, stopped: str) -> None:
        """What is left in the folder when the training is done."""
        import keras

        job = self.job
        if self.rank or self.watch is None:
            return
        self.watch.close()
        write_lines(job.folder / METRICS, self.history)
        if not job.export:
            write_json(job.folder / "result.json", {"stopped": stopped, **self.history[-1]})
            return
        # Outside the strategy's scope and in float32: a plain model with the same weights, which any Keras can load.
        keras.mixed_precision.set_global_policy("float32")
        plain = job.build(self.schema)
        plain.set_weights(self._exported())
        if job.train.swa:
            collect_statistics(plain, job.prepared, job.keys)
        self.shaping.finish(plain)
        if job.model.start and job.model.start.lora and not job.shrinking:
            with create(job.folder / ADAPTERS, job.seal) as out:
                found: dict[str, Any] = {**adapters(plain)}
                np.savez(out, **found)
            plain = merged(job.model.start, self.schema, plain)
        gaps = export(plain, job.prepared, job.keys, job.folder, job.seal)
        figures = {
            "workers": self.ranks,
            "weights_sha256": self.checkpoints.digests,
            "parameters": plain.count_params(),
            **gaps,
            "stopped": stopped,
            "batch_size": self.part.batch_size,
        }
        if self.objective.private:
            clip, noise = self.objective.private
            rows = self.manifest.rows("train")
            figures["privacy"] = {**self._spent(), "delta": private.delta_of(job.train, rows), "noise": noise, "clip": clip}
            figures["privacy"] |= {"share": self.part.batch_size / rows, "steps": self.step}
        write_json(job.folder / "result.json", {**figures, **self.history[-1]})

    def _exported(self) -> list[np.ndarray]:
        """The model's weights that become the bundle, in the order of `model.weights`."""
        best = place(self.checkpoints.folder, self.checkpoints.best or 0)
        if self.job.train.export == "best" and best.exists():
            with self.strategy.scope():
                for variable, value in zip(self.checkpoints.variables, read(best, self.job.seal)[1], strict=False):
                    variable.assign(value)
        with self.averages.inside():
            return [np.asarray(w) for w in self.model.weights]


def started(workers: int, step: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}, {'going on' if step else 'from the start'}"


def _strategy(ranks: int, gpus: list[Any]) -> tuple[str, Any]:
    """(the device that batches go to, the strategy) of a rank: all GPUs that Ray gave it, mirrored, and the other ranks.

    HELIOGRAPH_LOGICAL_DEVICES=n stands in for n GPUs where there is none: n logical CPU devices (one worker only).
    """
    import tensorflow as tf

    logical = int(os.environ.get("HELIOGRAPH_LOGICAL_DEVICES", "1"))
    device = "GPU:0" if len(gpus) == 1 else "CPU:0"
    if ranks > 1:
        return device, _multi_worker()
    if len(gpus) > 1:
        return device, tf.distribute.MirroredStrategy()
    if logical > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * logical)
        names = [f"CPU:{i}" for i in range(logical)]
        return device, tf.distribute.MirroredStrategy(names, tf.distribute.ReductionToOneDevice())
    return device, tf.distribute.get_strategy()


@functools.cache
def _multi_worker() -> Any:
    """MultiWorkerMirroredStrategy, one for all trainings of a process: it starts TensorFlow's server.

    Its thread that watches the peers sleeps 30 s at a time, and the end of training would wait for it to wake: one second
    instead."""
    import tensorflow as tf
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

    CollectiveAllReduceExtended._check_health_interval = 1
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    if all(address.startswith(LOOPBACK) for address in json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"]):
        keep_on_loopback()
    return strategy
