"""Pipeline parallelism: a model too large for one device, as sub-networks in actors of their own, times replicas of them all.

A step's rows are cut into micro-batches. Each stage does its forward and backward passes in the order 1F1B (Narayanan et
al., PipeDream, 2019; the flush at the end of a step as in Megatron-LM), which holds no more than `stages` micro-batches of
activations. Ray runs an actor's calls in the order of their submission and each when its arguments are there, so the order
of submission is all the scheduler there is; activations travel through the object store.

Gradients of a step are summed over micro-batches and replicas and clipped by the norm over all stages, so the result is the
one process's, to rounding. (Batch normalisation is the exception, as everywhere: its batch is the micro-batch.) A checkpoint
is the ordinary whole model's, in the layout of `checkpoint.py`. A lost stage restarts all of them from the last one.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from ..cluster.storage import publish_folder, write_json
from ..datasets.ingest import Part
from ..datasets.shards import Manifest
from ..errors import ModelError, RunError
from .checkpoint import digest, forget_after, place, prune, read, whole, write
from .course import judge, last_step, reached
from .cut import Cut
from .stage import Stage
from .steps import HOST, MEMORY, OWN, Signals
from .watch import METRICS, write_lines
from .worker import INTERRUPTED, MOST_ROLLBACKS, ROLLBACK_RATE, STOP_FILE, SUSPECT_STEPS, Job

STEPS_AHEAD = 2
"""Steps that are submitted before the oldest one is waited for."""
MOST_RESTARTS = 100


def order(stage: int, stages: int, micro: int) -> list[tuple[str, int]]:
    """1F1B: ("forward" or "backward", micro-batch) in the order in which a stage does them."""
    warm = min(micro, stages - 1 - stage)
    done = [("forward", m) for m in range(warm)]
    for m in range(micro - warm):
        done += [("forward", warm + m), ("backward", m)]
    return done + [("backward", m) for m in range(micro - warm, micro)]


def train_pipelined(job: Job, resources: dict[str, float], update: Callable[..., None]) -> None:
    """Train to the end, or until the stop file is there, after a step, which a checkpoint then follows."""
    import ray

    for restart in itertools.count():
        run = None
        try:
            run = _Pipeline(job, resources)
            if run.train():
                return
        except ray.exceptions.RayActorError:  # pyright: ignore[reportAttributeAccessIssue]
            if restart >= MOST_RESTARTS:
                raise
            update("a stage was lost: starting again from the last checkpoint")
        finally:
            if run:
                run.close()


class _Pipeline:
    def __init__(self, job: Job, resources: dict[str, float]):
        import ray

        assert job.train.pipeline
        self.job, train = job, job.train
        self.stages, self.micro, self.replicas = job.train.pipeline.stages, job.train.pipeline.micro_batches, train.most_workers
        manifest = Manifest.read(job.prepared)
        self.part = Part(job.prepared, manifest, "train", None, 0, self.replicas, job.batch_size, None)
        self.held_out = Part(job.prepared, manifest, "validation", None, 0, self.replicas, 4 * job.batch_size, None)
        self.folder = job.folder / "checkpoints"
        self.end = last_step(train, self.part.steps)
        actor: Any = ray.remote(Stage).options(num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0))
        here = self.stages * self.replicas
        self.actors: list[list[Any]] = []

        def start(stage: int, replica: int, cut: Any) -> Any:
            return actor.remote(job, (stage, self.stages), (replica, self.replicas), cut, self.end, here)

        try:
            first = start(0, 0, None)
            self.actors = [[first]]
            cut: Any = ray.get(first.ready.remote())
            self.actors = [
                [first if (s, r) == (0, 0) else start(s, r, cut) for r in range(self.replicas)] for s in range(self.stages)
            ]
            ray.get([a.ready.remote() for stage in self.actors for a in stage])
            self.cut: Cut = cut
            self._restore()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        import ray

        for actor in itertools.chain(*self.actors):
            ray.kill(actor)

    def _restore(self) -> None:
        import ray

        self.step, self.history, self.seconds, self.rollbacks, self.lowered, self.best = 0, [], 0.0, 0, 0, None
        said: list[str] = []
        for _, note, values in whole(self.folder, self.job.seal, said.append):
            self._take(values, note["step"] % self.part.steps > 0)
            self.step, self.history, self.seconds = note["step"], note["history"], note["seconds"]
            self.rollbacks, self.lowered, self.best = note["rollbacks"], note["lowered"], note["best"]
            break
        self.chief = self.actors[-1][0]
        ray.get(self.chief.open_watch.remote(self.step, self.end, said))

    def _take(self, values: list[np.ndarray], within_an_epoch: bool = False) -> None:
        import ray

        held = ray.put(values)
        ray.get([a.restore.remote(held, within_an_epoch) for stage in self.actors for a in stage])

    def train(self) -> bool:
        """To the end; False when it went back to a checkpoint and must be started again."""
        import ray

        epochs = -(-self.end // self.part.steps)
        for actor in self.actors[0]:
            actor.load.remote("train", self.step, self.end)
            if self.held_out.rows:
                done = self.step // self.part.steps
                actor.load.remote("validation", done * self.held_out.steps, epochs * self.held_out.steps)
        reason, flying, began, saved = reached(self.job.train, self.step, self.end), deque(), time.monotonic(), time.monotonic()
        submitted = self.step
        while not reason:
            last = min(self.end, (self.step // self.part.steps + 1) * self.part.steps)
            while submitted < last and len(flying) < STEPS_AHEAD:
                flying.append(self._submit())
                submitted += 1
            started = time.monotonic()
            found = self._finish(flying.popleft())
            self.seconds += time.monotonic() - started
            if any(anomaly.serious for anomaly in found) and self.job.train.on_anomaly != "warn":
                return self._alarmed(found[0].text)
            stopping = (self.job.folder / STOP_FILE).exists()
            minutes = self.job.train.stop.minutes
            over = bool(minutes) and self.seconds > 60 * (minutes or 0)
            due = time.monotonic() - saved > self.job.train.checkpoint.seconds
            if stopping or over or due:
                while flying:  # a checkpoint is of a step that is wholly done
                    self._finish(flying.popleft())
                reason = INTERRUPTED if stopping else f"{minutes:g} minutes" if over else ""
            if self.step == last and not flying:
                reason = reason or self._epoch(time.monotonic() - began)
                began = time.monotonic()
            if not flying and (reason or self.step == last or due):
                self._save()
                saved = time.monotonic()
        if reason != INTERRUPTED:
            self._export(reason)
        ray.get(self.chief.close.remote())
        return True

    def _submit(self) -> list[Any]:
        """Submit one step's calls to all stages; what to wait for: losses, rows, and what each stage's `apply` returns."""
        losses, rows = [], []
        for replica in range(self.replicas):
            stages = [stage[replica] for stage in self.actors]
            *targets, everyone = stages[0].begin.options(num_returns=self.micro + 1).remote("train")
            rows.append(everyone)
            made: dict[tuple[str, int, int], Any] = {}
            queues = [deque(order(s, self.stages, self.micro)) for s in range(self.stages)]
            while any(queues):
                for s, queue in enumerate(queues):
                    while queue and self._call(made, stages, s, *queue[0], targets, everyone, losses):
                        queue.popleft()
        applied = []
        squares = []
        for stage in self.actors:
            sums = [a.gradient.remote() for a in stage] if self.replicas > 1 else []
            squares.append([a.norm.remote(*sums) for a in stage])
        for s, stage in enumerate(self.actors):
            applied += [
                a.apply.remote(*(squares[t][r if t == s else 0] for t in range(self.stages))) for r, a in enumerate(stage)
            ]
        return [losses, rows[0], applied]

    def _call(
        self, made: dict, stages: list[Any], s: int, kind: str, m: int, targets: list[Any], everyone: Any, losses: list[Any]
    ) -> bool:
        """Submit one pass of one stage if what it needs was submitted already."""
        final = s == self.stages - 1
        if kind == "forward":
            if s and ("forward", s - 1, m) not in made:
                return False
            inputs = [made["forward", s - 1, m]] if s else []
            if final:
                made["backward", s, m], loss = stages[s].last.options(num_returns=2).remote(m, targets[m], everyone, *inputs)
                losses.append(loss)
            else:
                made["forward", s, m] = stages[s].forward.remote(m, *inputs)
        elif not final:
            if ("backward", s + 1, m) not in made:
                return False
            made["backward", s, m] = stages[s].backward.remote(m, made["backward", s + 1, m])
        return True

    def _finish(self, step: list[Any]) -> list[Any]:
        """Wait for a step; what its signals say."""
        import ray

        losses, everyone, applied = step
        loss, rows, done = sum(ray.get(losses)), ray.get(everyone), ray.get(applied)
        self.step += 1
        norm, rate = done[0][:2]
        seconds = [max(d[2] for d in done[s * self.replicas : (s + 1) * self.replicas]) for s in range(self.stages)]
        hosts = np.zeros((self.stages, HOST), np.float32)
        hosts[:, MEMORY] = [done[s * self.replicas][3] for s in range(self.stages)]
        own = np.zeros((1, OWN + self.stages), np.float32)
        own[0] = [loss, norm, rate, np.isfinite(norm), rows, *seconds]
        return ray.get(self.chief.see.remote(self.step, (self.step - 1) // self.part.steps + 1, Signals(own, hosts)))

    def _epoch(self, seconds: float) -> str:
        import ray

        train = self.job.train
        figures = {"epoch": -(-self.step // self.part.steps), "step": self.step, **self._figures()}
        if self.held_out.rows:
            for _ in range(self.held_out.steps):
                for replica in range(self.replicas):
                    stages = [stage[replica] for stage in self.actors]
                    *targets, _ = stages[0].begin.options(num_returns=self.micro + 1).remote("validation")
                    for m, target in enumerate(targets):
                        passed: list[Any] = []
                        for stage in stages[:-1]:
                            passed = [stage.evaluate.remote(m, *passed)]
                        stages[-1].judge.remote(m, target, *passed)
            figures |= {f"val_{name}": value for name, value in self._figures().items()}
        rows = self.part.edge((self.step - 1) % self.part.steps + 1)
        figures |= {"seconds": round(seconds, 3), "rows_per_second": round(rows / seconds, 1), "workers": self.replicas}
        self.history = [*self.history, figures]
        ray.get(self.chief.tell.remote(figures))
        verdict = judge(train, self.history, self.lowered)
        if verdict.best:
            self.best = self.step
        if verdict.factor:
            self.lowered = figures["epoch"]
            values = self._values()
            self._take([*values[:-1], np.array(verdict.factor(float(values[-1])), np.float32)])
        return verdict.reason or reached(train, self.step, self.end)

    def _figures(self) -> dict[str, float]:
        import ray

        sums = ray.get([a.sums.remote() for a in self.actors[-1]])
        ray.get([a.reset.remote() for a in self.actors[-1]])
        return ray.get(self.chief.figures.remote(*sums))

    def _values(self) -> list[np.ndarray]:
        """The whole model's variables, the optimizer's and the rate's factor: as an ordinary training has them."""
        import ray

        states = ray.get([stage[0].state.remote() for stage in self.actors])
        variables = {place: value for own, _, _ in states for place, value in own.items()}
        slots = {place: value for _, _, own in states for place, value in own.items()}
        head = states[0][1]
        tail = [value for place in sorted(slots) for value in slots[place]]
        return [*(variables[place] for place in sorted(variables)), *head[:-1], *tail, head[-1]]

    def _save(self) -> None:
        import ray

        ray.get(self.chief.flush.remote())
        sums = zip(*ray.get([a.sums.remote() for a in self.actors[-1]]), strict=True)
        values = [*self._values(), *(np.sum(v, axis=0) for v in sums)]
        note = {"step": self.step, "history": self.history, "seconds": self.seconds, "rollbacks": self.rollbacks}
        note |= {"lowered": self.lowered, "best": self.best}
        self.digest = digest(values)
        try:
            with publish_folder(place(self.folder, self.step)) as aside:
                write(aside, values, note, self.digest, self.job.seal)
        except OSError as error:
            text = f"{self.folder}: a checkpoint cannot be written ({error.strerror}): free some space and run it again"
            raise RunError(text) from None
        prune(self.folder, self.job.train.checkpoint.keep, self.best)

    def _alarmed(self, text: str) -> bool:
        """An anomaly that is not only to be warned of: end, or go back to the last good checkpoint with a smaller rate."""
        import ray

        if self.job.train.on_anomaly == "stop" or self.rollbacks >= MOST_ROLLBACKS:
            raise RunError(f"training stopped: {text} (train.on_anomaly is {self.job.train.on_anomaly})")
        ray.get(self.chief.close.remote())
        forget_after(self.folder, self.step - SUSPECT_STEPS)
        for checkpoint, note, values in whole(self.folder, self.job.seal, lambda _: None):
            size: Any = ray.get(self.chief.size.remote())
            values[size - 1] = np.array(ROLLBACK_RATE ** (self.rollbacks + 1), np.float32)
            with publish_folder(checkpoint) as aside:
                write(aside, values, {**note, "rollbacks": self.rollbacks + 1}, digest(values), self.job.seal)
            return False
        raise RunError(f"training stopped: {text}; there is no checkpoint from before it to go back to")

    def _export(self, reason: str) -> None:
        import ray

        values = self._values()
        best = place(self.folder, self.best or 0)
        if self.job.train.export == "best" and best.exists():
            values = read(best, self.job.seal)[1]
        gaps, parameters = ray.get(self.actors[0][0].export.remote(ray.put(values)))
        write_lines(self.job.folder / METRICS, self.history)
        pipeline = {"cuts": self.cut.places, "stage_seconds": self.cut.seconds, "stage_bytes": self.cut.bytes}
        figures = {"workers": self.replicas, "weights_sha256": [self.digest], "parameters": parameters, **gaps}
        figures |= {"stopped": reason, "batch_size": self.job.batch_size, "pipeline": pipeline}
        write_json(self.job.folder / "result.json", {**figures, **self.history[-1]})


def check_settings(job: Job) -> None:
    """Raises ModelError for what a pipeline cannot do yet."""
    train = job.train
    for name, given in (
        ("ema", train.ema),
        ("swa", train.swa),
        ("precision", train.precision == "mixed_float16"),
        ("xla", train.xla),
    ):
        if given:
            raise ModelError(f"train.{name}: does not go with train.pipeline: leave it out")
    if job.augment:
        raise ModelError("data.augment: does not go with train.pipeline: leave it out")
    if train.accumulate > 1:
        raise ModelError("train.accumulate: does not go with train.pipeline: raise train.pipeline.micro_batches instead")
    if train.fewest_workers != train.most_workers:
        raise ModelError("train.workers: a pipeline is not elastic: give one number, of replicas of the whole")
