"""One stage of a pipeline: a sub-network, the optimizer of its weights, and the activations between forward and backward.

It runs in an actor of its own, on a device of its own; `pipeline.py` says in which order. Activations are kept (the forward
pass runs under a tape, whose backward pass is compiled too) or, where memory is short, only the stage's inputs are, and the
backward pass computes the rest again.
"""

import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil

from ..datasets.ingest import Part, blocks
from ..datasets.schema import Schema
from ..datasets.shards import Manifest
from .anomaly import Anomaly, Detector
from .cut import Cut, choose, nodes, split
from .model import build, compile_parts
from .rate import rate
from .steps import OWN, Signals, claim, fed, on_device
from .watch import Watch

Arrays = list[np.ndarray]
SHARE = 0.5
"""Of the machine's free memory: what kept activations may take."""


def _timed(method: Any) -> Any:
    """Adds the seconds that a method takes to the stage's `busy`."""

    @functools.wraps(method)
    def run(self: Any, *given: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(self, *given)
        finally:
            self.busy += time.perf_counter() - started

    return run


class Stage:
    """place: (stage, of how many). replica: (which, of how many). cut: None lets it choose one. end: the last step."""

    def __init__(self, job: Any, place: tuple[int, int], replica: tuple[int, int], cut: Cut | None, end: int, here: int):
        import keras
        import tensorflow as tf

        claim(here, 1)  # a second one would use another stage's core
        self.job, self.train = job, job.train
        self.index, self.stages = place
        self.replica, self.replicas = replica
        self.micro = self.train.pipeline.micro_batches
        self.schema, self.manifest = Schema.read(job.prepared), Manifest.read(job.prepared)
        keras.utils.set_random_seed(self.train.seed)
        keras.mixed_precision.set_global_policy(self.train.precision)
        with tf.device("CPU:0"):  # the whole model need not fit the device; a stage's weights move there when they are used
            whole = build(job.model, self.schema, job.project)
        self.cut = cut or choose(whole, self.stages, self._sample(), self.train.pipeline.cuts)
        self.model = split(whole, self.cut.places)[self.index]
        self.one_value = whole.output_shape[-1] == 1
        every = {id(v): i for i, v in enumerate(whole.variables)}
        trainable = {id(v): i for i, v in enumerate(whole.trainable_variables)}
        self.variables = [v for v in whole.variables if id(v) in {id(w) for w in self.model.variables}]
        self.places = [every[id(v)] for v in self.variables]
        """Of this stage's variables among the whole model's, and of the trainable ones among its trainable ones."""
        self.weights = [v for v in whole.trainable_variables if id(v) in {id(w) for w in self.model.trainable_variables}]
        self.weight_places = [trainable[id(v)] for v in self.weights]
        self.counts = (len(every), len(trainable))
        schedule, self.factor = rate(self.train, end)
        settings = self.train.model_copy(update={"optimizer": self.train.optimizer.model_copy(update={"global_clipnorm": None})})
        parts = compile_parts(settings, self.schema, self.manifest, schedule)
        self.clip = self.train.optimizer.model_dump().get("global_clipnorm")
        self.optimizer, self.loss, self.meters = parts.optimizer, parts.loss, parts.meters()
        self.optimizer.build(self.weights)
        self.gradients = [tf.Variable(tf.zeros(v.shape), trainable=False) for v in self.weights]
        self.held: dict[int, Any] = {}
        self.busy = 0.0
        self.feeds: dict[str, Iterator] = {}
        self._compile()

    def _sample(self) -> Any:
        rows = max(1, self.job.batch_size // self.replicas // self.micro)
        return fed({name: np.zeros((rows, *shape), np.float32) for name, shape in self.schema.inputs.items()})

    def ready(self) -> Cut:
        return self.cut

    def _compile(self) -> None:
        import tensorflow as tf

        model, weights = self.model, self.weights

        def outputs(inputs: Any, training: bool) -> Any:
            return tf.nest.flatten(model(inputs, training=training))

        def added() -> Any:
            return tf.add_n(model.losses) / (self.replicas * self.micro) if model.losses else tf.zeros(())

        def differentiable(tensors: Any) -> Any:
            return [t for t in tensors if t.dtype.is_floating]

        def accumulate(gradients: Any) -> None:
            for total, gradient in zip(self.gradients, gradients, strict=True):
                if gradient is not None:
                    total.assign_add(tf.convert_to_tensor(gradient))

        @tf.function(autograph=False)
        def forward(*inputs: Any) -> Any:
            return outputs(list(inputs), True), added()

        @tf.function(autograph=False)
        def recompute(inputs: Any, given: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                made, extra = outputs(list(inputs), True), added()
            targets = [*differentiable(made), extra]
            sources, seeds = [*weights_values(), *differentiable(inputs)], [*given, tf.ones(())]
            found: Any = tape.gradient(targets, sources, output_gradients=seeds)
            accumulate(found[: len(weights)])
            return found[len(weights) :]

        def weights_values() -> Any:
            return [v.value for v in weights]

        def result(inputs: Any, target: Any, weight: Any, training: bool) -> Any:
            made = tf.cast(outputs(list(inputs), training)[0], tf.float32)
            rows = weight * self.loss(target[:, None] if self.one_value else target, made)
            self.meters[0].update_state(rows)
            for meter in self.meters[1:]:
                meter.update_state(target, made)
            return rows

        @tf.function(autograph=False)
        def last(inputs: Any, target: Any, weight: Any, everyone: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                rows = result(inputs, target, weight, True)
                total = tf.reduce_sum(rows) / everyone + added()
            found = tape.gradient(total, [*weights_values(), *differentiable(inputs)])
            accumulate(found[: len(weights)])
            return found[len(weights) :], tf.reduce_sum(rows) / everyone

        @tf.function(autograph=False)
        def evaluate(inputs: Any) -> Any:
            return outputs(list(inputs), False)

        @tf.function(autograph=False)
        def judge(inputs: Any, target: Any, weight: Any) -> None:
            result(inputs, target, weight, False)

        @tf.function(autograph=False)
        def apply(gradients: Any, scale: Any) -> None:
            self.optimizer.apply([g * scale for g in gradients], weights)
            for total in self.gradients:
                total.assign(tf.zeros_like(total))

        self._forward, self._recompute, self._last, self._accumulate = forward, recompute, last, accumulate
        self._evaluate, self._judge, self._apply, self._floats, self._values = (
            evaluate,
            judge,
            apply,
            differentiable,
            weights_values,
        )

    def load(self, split: str, first: int, end: int) -> None:
        """Begin to read a split from step `first` on (the first stage's task)."""
        batch = self.job.batch_size * (1 if split == "train" else 4)
        seed = self.train.seed if split == "train" else None
        part = Part(self.job.prepared, self.manifest, split, self.job.keys, self.replica, self.replicas, batch, seed)  # pyright: ignore

        def pieces() -> Iterator[tuple[Any, np.ndarray, np.ndarray, float]]:
            for block in blocks(part, first, end):
                for i, everyone in enumerate(block.everyone):
                    rows = slice(block.edges[i], block.edges[i + 1])
                    yield {n: v[rows] for n, v in block.inputs.items()}, block.target[rows], block.weight[rows], float(everyone)

        self.feeds[split] = pieces()

    def begin(self, split: str) -> Any:
        """The targets and weights of the next step's micro-batches, and the rows of the step; the inputs stay here."""
        inputs, target, weight, self.everyone = next(self.feeds[split])
        edges = [len(target) * i // self.micro for i in range(self.micro + 1)]
        self.inputs = [{n: v[a:b] for n, v in inputs.items()} for a, b in itertools.pairwise(edges)]
        return (*((target[a:b], weight[a:b]) for a, b in itertools.pairwise(edges)), self.everyone)

    def _given(self, micro: int, inputs: tuple[Arrays, ...]) -> Any:
        import tensorflow as tf

        if self.index == 0:
            return [on_device(self.inputs[micro][n]) for n in self.schema.inputs]
        return [tf.convert_to_tensor(v) for v in inputs[0]]

    @_timed
    def forward(self, micro: int, *inputs: Arrays) -> Arrays:
        import tensorflow as tf

        given = self._given(micro, inputs)
        if self.keeps:
            with tf.GradientTape() as tape:
                tape.watch(self._floats(given))
                made, extra = self._forward(*given)
            self.held[micro] = (tape, given, made, extra)
        else:
            made, _ = self._forward(*given)
            self.held[micro] = given
        return [v.numpy() for v in made]

    @functools.cached_property
    def keeps(self) -> bool:
        """Whether activations are kept: asked for, or there is room for what this stage will hold of a step."""
        wish = self.train.pipeline.recompute
        room = SHARE * psutil.virtual_memory().available / (self.stages * self.replicas)
        return wish == "never" or (wish == "auto" and self._activation_bytes() < room)

    def _activation_bytes(self) -> int:
        """Of all micro-batches that this stage may hold at once, every operation's output."""
        rows = -(-self.job.batch_size // self.replicas // self.micro)
        values = sum(int(np.prod(t.shape[1:])) for node in nodes(self.model) for t in node.outputs)
        return 4 * rows * values * min(self.micro, self.stages - self.index)

    @_timed
    def backward(self, micro: int, given: Arrays) -> Arrays:
        import tensorflow as tf

        gradients = [tf.convert_to_tensor(g) for g in given]
        if self.keeps:
            tape, inputs, made, extra = self.held.pop(micro)
            targets, sources = [*self._floats(made), extra], [*self._values(), *self._floats(inputs)]
            found = tape.gradient(targets, sources, output_gradients=[*gradients, tf.ones(())])
            self._accumulate(found[: len(self.weights)])
            found = found[len(self.weights) :]
        else:
            found = self._recompute(self.held.pop(micro), gradients)
        return [] if self.index == 0 else [g.numpy() for g in found]

    @_timed
    def last(self, micro: int, target: tuple[np.ndarray, np.ndarray], everyone: float, inputs: Arrays) -> tuple[Arrays, float]:
        """The last stage's forward and backward at once: (gradients of its inputs, its part of the step's loss)."""
        import tensorflow as tf

        given = self._given(micro, (inputs,))
        labels, weights = map(tf.convert_to_tensor, target)
        found, loss = self._last(given, labels, weights, tf.constant(everyone, tf.float32))
        return [g.numpy() for g in found], float(loss)

    def evaluate(self, micro: int, *inputs: Arrays) -> Arrays:
        return [v.numpy() for v in self._evaluate(self._given(micro, inputs))]

    def judge(self, micro: int, target: tuple[np.ndarray, np.ndarray], inputs: Arrays) -> None:
        import tensorflow as tf

        self._judge(self._given(micro, (inputs,)), *map(tf.convert_to_tensor, target))

    def gradient(self) -> Arrays:
        """The step's summed gradient of this stage and replica."""
        return [g.numpy() for g in self.gradients]

    def norm(self, *replicas: Arrays) -> float:
        """Squared norm of this stage's gradient, summed over the replicas (or its own, when there is one)."""
        import tensorflow as tf

        self.total = [tf.convert_to_tensor(sum(gs)) for gs in zip(*replicas, strict=True)] if replicas else self.gradients
        return float(sum(tf.reduce_sum(tf.square(g)) for g in self.total))

    def apply(self, *squares: float) -> tuple[float, float, float, float]:
        """Update the weights. squares: of all stages. Returns (the whole gradient's norm, the learning rate, the seconds
        that this stage computed in the step, megabytes)."""
        import tensorflow as tf

        norm = float(np.sqrt(sum(squares)))
        current = float(self.optimizer.learning_rate)
        if np.isfinite(norm):
            scale = min(1.0, self.clip / max(norm, 1e-12)) if self.clip else 1.0
            self._apply(self.total, tf.constant(scale, tf.float32))
        else:
            self._apply([tf.zeros_like(g) for g in self.total], tf.constant(0.0))
        busy, self.busy = self.busy, 0.0
        return norm, current, busy, psutil.Process().memory_info().rss / 2**20

    def sums(self) -> Arrays:
        return [np.array(v) for meter in self.meters for v in meter.variables]

    def figures(self, *replicas: Arrays) -> dict[str, float]:
        """The metrics over all replicas, which begin anew."""
        for variable, values in zip((v for m in self.meters for v in m.variables), zip(*replicas, strict=True), strict=True):
            variable.assign(sum(values))
        found = {meter.name: float(meter.result()) for meter in self.meters}
        self.reset()
        return found

    def reset(self) -> None:
        for meter in self.meters:
            meter.reset_state()

    def _slots(self) -> tuple[int, int]:
        """(the optimizer's own variables, its variables for each weight)."""
        count = len(self.optimizer.variables)
        each = (count - 1) // len(self.weights) if self.weights else 0
        return count - each * len(self.weights), each

    def state(self) -> tuple[dict[int, np.ndarray], Arrays, dict[int, Arrays]]:
        """(this stage's variables by their place in the whole model, the optimizer's own, its slots by weight)."""
        own = self.optimizer.variables
        head, each = self._slots()
        slots = {place: [np.array(v) for v in own[head + i * each :][:each]] for i, place in enumerate(self.weight_places)}
        variables = {place: np.array(v) for place, v in zip(self.places, self.variables, strict=True)}
        return variables, [np.array(v) for v in own[:head]] + [np.array(self.factor)], slots

    def size(self) -> int:
        """How many arrays the whole model's state has; the metrics' sums stand behind them in a checkpoint."""
        head, each = self._slots()
        return self.counts[0] + head + each * self.counts[1] + 1

    def restore(self, values: Arrays, within_an_epoch: bool) -> None:
        """Take this stage's part of a whole model's checkpoint, and the metrics' sums where an epoch is half done."""
        count, (head, each), size = self.counts[0], self._slots(), self.size()
        for variable, place in zip(self.variables, self.places, strict=True):
            variable.assign(values[place])
        tail = values[count : size - 1]
        mine = tail[:head] + [tail[head + place * each + i] for place in self.weight_places for i in range(each)]
        for variable, value in zip(self.optimizer.variables, mine, strict=True):
            variable.assign(value)
        self.factor.assign(values[size - 1])
        if within_an_epoch and self.index == self.stages - 1 and self.replica == 0:
            for variable, value in zip((v for m in self.meters for v in m.variables), values[size:], strict=True):
                variable.assign(value)

    def open_watch(self, step: int, end: int, said: list[str]) -> None:
        self.watch, self.detector = Watch(self.job.folder, self.job.name, step, end), Detector(self.stages)
        workers = f"{self.stages} stages" + (f" times {self.replicas}" if self.replicas > 1 else "")
        self.watch.event(step, "workers", f"{workers} {'go on' if step else 'begin'}")
        for text in said:
            self.watch.event(step, "checkpoint", text)

    def see(self, step: int, epoch: int, signals: Signals) -> list[Anomaly]:
        self.watch.see(step, epoch, signals)
        found = self.detector.see(step - 1, signals.steps[:, :OWN], signals.steps[:, OWN:])
        for each in found:
            self.watch.event(each.step, "anomaly", each.text)
        return found

    def flush(self) -> None:
        self.watch.flush()

    def tell(self, figures: dict) -> None:
        self.watch.epoch(figures, [])

    def close(self) -> None:
        self.watch.close()

    def export(self, values: Arrays) -> tuple[dict[str, float], int]:
        """Write the whole model: (what `export.export` returns, parameters)."""
        import keras

        from .export import export

        keras.mixed_precision.set_global_policy("float32")
        plain = build(self.job.model, self.schema, self.job.project)
        for variable, value in zip(plain.variables, values, strict=False):
            variable.assign(value)
        job = self.job
        return export(plain, job.prepared, job.keys, job.folder, job.seal), plain.count_params()
