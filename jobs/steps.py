"""The compiled loops of a rank: several training steps a call, one exchange between the ranks a step.

Keras' `fit` reduces every scalar between workers at every step and trips over per-replica batches (keras-team/keras#20585).
Here a step packs its gradients and its signals (loss, each rank's time, what each rank's host has to say) into one
all-reduce, and the host sees the signals of a whole call at once. A call slices its steps out of one block of rows, so
Python runs once for up to 32 steps.

A step's gradient is the sum over its rows divided by the rows of *all* ranks, so two workers make the step that one makes;
and it is summed before the optimizer sees it, so `global_clipnorm` and the like are of the global gradient. A step whose
gradient is not finite changes nothing: it is counted, its loss is reported, and the weights stay.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..datasets import augment as varying
from ..datasets.ingest import SECRET, Block
from ..datasets.schema import PIXEL
from ..project import Augment

ORDER, STEP, WAIT, MEMORY, SAVED, DIGEST = 0, 1, 2, 3, 4, slice(5, 8)
"""What a rank's host says in each call: orders (bits), seconds of a step, share of the time that it waited for rows,
megabytes, the last checkpoint it has digested, and that digest's first 72 bits. float32 holds integers below 2^24."""
HOST = 8
LOSS, NORM, RATE, FINITE, ROWS = range(5)
"""A step's own signals; the ranks' computing seconds follow."""
OWN = 5


def fed(inputs: dict[str, Any]) -> Any:
    """Inputs as a Keras model takes them: one tensor alone, several by name."""
    return inputs if len(inputs) > 1 else next(iter(inputs.values()))


def on_device(values: np.ndarray) -> Any:
    """An input as the model gets it (`schema.as_fed`), moved as it is and made float32 where the model is."""
    import tensorflow as tf

    moved = tf.convert_to_tensor(values)
    if moved.dtype == tf.float32:
        return moved
    return tf.cast(moved, tf.float32) * (PIXEL if moved.dtype == tf.uint8 else 1.0)


def claim(processes: int, operations: int) -> list[Any]:
    """Take this process's share of the machine, before TensorFlow starts; the GPUs that it has.

    processes: of ours on this machine. operations: how many it runs at the same time.
    """
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    tf.config.threading.set_inter_op_parallelism_threads(operations)
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return gpus


@dataclass
class Signals:
    """What all ranks know after a call, the same on each."""

    steps: np.ndarray
    """float32 `[steps, OWN + ranks]`: LOSS (mean over the rows), NORM of the gradient, RATE, FINITE (1 or 0), ROWS, then
    the seconds that each rank computed."""
    hosts: np.ndarray
    """float32 `[ranks, HOST]`: what each rank's host said when the call began."""

    def ordered(self, bit: int) -> bool:
        return bool((self.hosts[:, ORDER].astype(int) & bit).any())


@dataclass(frozen=True)
class Objective:
    """What a step makes smaller."""

    loss: Callable[[Any, Any], Any]
    """(target, outputs) -> a loss a row."""
    guide: Callable[[Any], tuple[Any, Any]] | None = None
    """What calls the model on training rows in the place of the model itself, and adds a loss a row."""
    labels: float = 1.0
    """The share of `loss` where there is a guide."""
    labelled: float = 1.0
    """The share of the training rows that have a target."""
    harden: Callable[..., dict[str, Any]] | None = None
    """Moves the inputs of training rows before they are trained on: (model, inputs, target, step)."""
    private: tuple[float, float] | None = None
    """(clip, noise) of a private training: each row's gradient is no longer than the first, and the sum of a step gets noise of
    the second times the first. Its blocks are `ingest.drawn`."""

    @property
    def variables(self) -> list[Any]:
        """That are learnt with the model: weights of several targets."""
        return getattr(self.loss, "variables", [])


def filled(target: Any) -> tuple[Any, Any]:
    """(the targets, zero where there is none; which rows have one). A class is -1, a number is NaN where there is none."""
    import tensorflow as tf

    target = tf.convert_to_tensor(target)
    has = target >= 0 if target.dtype.is_integer else tf.math.is_finite(target)
    return tf.where(has, target, tf.zeros_like(target)), has


class Steps:
    """`train` and `evaluate` run blocks, `collect` sums what the ranks have; each is called by all ranks together.

    specs: (shape of a row of each input, `TensorSpec` of the rows' target).
    augment: how a step's rows are varied, and which inputs are ids of words.
    split: how many pieces a rank's rows of a step are computed in.
    """

    def __init__(  # noqa: PLR0915  one closure, which is what TensorFlow compiles
        self,
        model: Any,
        objective: Objective,
        optimizer: Any,
        meters: list[Any],
        strategy: Any,
        specs: tuple[dict[str, tuple[int, ...]], Any],
        rank: int,
        ranks: int,
        split: int = 1,
        scale: Any = None,
        xla: bool = False,
        augment: tuple[Augment | None, tuple[str, ...]] = (None, ()),
    ):
        import tensorflow as tf

        self.meters, self.ranks, self.strategy = meters, ranks, strategy
        # What layers keep beside their weights, such as batch normalisation's moving means: each rank's are of its own rows.
        self.statistics = [v for v in model.non_trainable_variables if "float" in v.dtype]
        self.meter_variables = [v for meter in meters for v in meter.variables]
        variables = [*model.trainable_variables, *objective.variables]
        replicas = strategy.num_replicas_in_sync
        local = replicas // ranks
        one_value = model.output_shape[-1] == 1
        optimizer._all_reduce_sum_gradients = lambda pairs: pairs  # they are summed when it gets them
        context = tf.distribute.get_replica_context

        shapes, target_spec = specs
        # Named once: else each new number of rows would be traced, which takes seconds.
        whole, wholes, number = tf.TensorSpec((), tf.int32), tf.TensorSpec((None,), tf.int32), tf.TensorSpec((None,))
        rows_spec = ({n: tf.TensorSpec((None, *s)) for n, s in shapes.items()}, target_spec, number)
        draws_spec = {SECRET: tf.TensorSpec((None, 2), tf.int32)} if objective.private else varying.specs(augment[0], shapes)

        def replica() -> int:
            """This replica's place in its own process."""
            return int(tf.get_static_value(context().replica_id_in_sync_group)) % local if local > 1 else 0

        def stamp(after: Any) -> Any:
            """The time when `after` was computed. TensorFlow moves a bare timestamp ahead of its control dependencies."""
            known = tf.reshape(after, [-1])[0] < np.inf
            return tf.cond(known, tf.timestamp, lambda: tf.timestamp() + 0.0)

        def cut(block: Any, low: Any, high: Any, piece: Any, pieces: Any) -> Any:
            a, b = low + (high - low) * piece // pieces, low + (high - low) * (piece + 1) // pieces
            return tf.nest.map_structure(lambda values: values[a:b], block)

        def forward(rows: Any, training: bool) -> tuple[Any, Any]:
            inputs, target, weight, *other = rows
            guide, added, scale_of_labels = objective.guide, 0.0, 1.0
            if guide is None or not training:
                outputs = tf.cast(model(fed(inputs), training=training), tf.float32)
            else:
                outputs, added = guide(fed(inputs))
                scale_of_labels = objective.labels
            if training and objective.labelled < 1:  # a loss of what has none is 0, and the others stand for it
                target, has = filled(target)
                weight = tf.where(has, weight, 0.0)
                scale_of_labels /= objective.labelled

            def losses(target: Any) -> Any:
                return objective.loss(target[:, None] if one_value else target, outputs)

            of_labels = losses(target)
            if other:
                share, target_of_other = other
                of_labels = share * of_labels + (1 - share) * losses(target_of_other)
            return scale_of_labels * weight * of_labels + added, outputs

        def varied(rows: Any, draws: Any) -> Any:
            """A whole step's rows, as they are trained on."""
            inputs, target_of_other = varying.vary(rows[0], rows[1], draws, augment[1])
            return (inputs, *rows[1:], *((draws["share"], target_of_other) if "share" in draws else ()))

        @tf.function(jit_compile=xla, autograph=False)
        def differentiate(rows: Any, everyone: Any) -> tuple[Any, Any, Any]:
            with tf.GradientTape() as tape:
                losses, outputs = forward(rows, True)
                total = tf.reduce_sum(losses) / everyone
                if model.losses:
                    total += tf.cast(tf.add_n(model.losses), tf.float32) / (replicas * split)
                if scale is not None:
                    total *= scale.value
            unused = tf.UnconnectedGradients.ZERO
            gradients = tape.gradient(total, variables, unconnected_gradients=unused)
            return [tf.convert_to_tensor(g) for g in gradients], losses, outputs

        @tf.function(jit_compile=True, autograph=False)  # XLA: a tenth of the time
        def of_each(rows: Any) -> tuple[Any, Any, Any]:
            """Like `differentiate`, but the sum of the rows' gradients, each clipped (Abadi et al., 2016)."""
            assert objective.private
            clip = objective.private[0]

            def of_one(row: Any) -> Any:
                with tf.GradientTape() as tape:
                    losses, outputs = forward(tf.nest.map_structure(lambda v: v[None], row), True)
                    loss = losses[0]
                unused = tf.UnconnectedGradients.ZERO
                found: Any = tape.gradient(loss, variables, unconnected_gradients=unused)
                gradients = [tf.convert_to_tensor(g) for g in found]
                short = tf.minimum(1.0, clip / tf.maximum(tf.linalg.global_norm(gradients), 1e-12))
                return [g * short for g in gradients], loss, outputs[0]

            gradients, losses, outputs = tf.vectorized_map(of_one, rows)
            return [tf.reduce_sum(g, axis=0) for g in gradients], losses, outputs

        def noise(secret: Any) -> list[Any]:
            """This replica's part of a step's noise. secret: int32 `[2]`."""
            assert objective.private
            clip, multiplier = objective.private
            deviation = clip * multiplier / replicas**0.5
            seeds = [secret + tf.constant([i, replica()]) for i in range(len(variables))]
            return [deviation * tf.random.stateless_normal(v.shape, s) for v, s in zip(variables, seeds, strict=True)]

        def meter(target: Any, losses: Any, outputs: Any, weight: Any = None) -> None:
            counted = {}
            if objective.private and weight is not None:
                counted["sample_weight"] = tf.cast(weight > 0, tf.float32)
            meters[0].update_state(losses, **counted)
            if objective.labelled < 1:
                target, has = filled(target)
                counted["sample_weight"] = tf.cast(has, tf.float32)
            for other in meters[1:]:
                other.update_state(target, outputs, **counted)

        def metered(rows: Any, everyone: Any) -> tuple[Any, Any]:
            if objective.harden:
                rows = (objective.harden(model, rows[0], rows[1], optimizer.iterations.value), *rows[1:])
            if objective.private:
                summed, losses, outputs = of_each(rows)
                gradients = [g / everyone for g in summed]
            else:
                gradients, losses, outputs = differentiate(rows, everyone)
            meter(rows[1], losses, outputs, rows[2])
            return gradients, tf.reduce_sum(losses)

        def train_step(block: Any, draws: Any, low: Any, high: Any, everyone: Any, clock: Any, host: Any) -> tuple[Any, Any, Any]:
            if draws and not objective.private:
                rows = varied(*cut((block, draws), low, high, 0, 1))
                mine = cut(rows, 0, high - low, replica(), local)
            else:
                mine = cut(block, low, high, replica(), local)
            if split == 1:
                gradients, loss = metered(mine, everyone)
            else:
                gradients, loss = [tf.zeros(v.shape) for v in variables], tf.zeros(())
                rows = tf.shape(mine[1])[0]
                for piece in tf.range(split):
                    more, part = metered(cut(mine, 0, rows, piece, split), everyone)
                    gradients, loss = [a + b for a, b in zip(gradients, more, strict=True)], loss + part
            if objective.private:
                added = noise(draws[SECRET][low])
                gradients = [g + n / everyone for g, n in zip(gradients, added, strict=True)]
            computed = tf.cast(stamp(gradients[0]) - clock, tf.float32)
            first = 1.0 if replica() == 0 else 0.0
            here = first * tf.one_hot(rank, ranks)
            said = tf.concat([[loss], here * computed, tf.reshape(here[:, None] * host, [-1])], 0)
            if replicas > 1:
                *gradients, said = context().all_reduce(tf.distribute.ReduceOp.SUM, [*gradients, said])
            if scale is not None:
                gradients = [g / scale.value for g in gradients]
            norm = tf.linalg.global_norm(gradients)
            finite = tf.math.is_finite(norm)
            current = optimizer.learning_rate
            if tf.__internal__.distribute.strategy_supports_no_merge_call():
                tf.cond(finite, lambda: optimizer.apply(gradients, variables) or True, lambda: False)
            else:  # MirroredStrategy cannot branch around an update; a gradient of zero is the nearest to none
                optimizer.apply([tf.where(finite, g, tf.zeros_like(g)) for g in gradients], variables)
            if scale is not None:
                _rescale(scale, finite)
            own = tf.stack([said[0] / everyone, norm, tf.cast(current, tf.float32), tf.cast(finite, tf.float32), everyone])
            return tf.concat([own, said[1 : 1 + ranks]], 0), said[1 + ranks :], stamp(norm)

        def evaluate_step(block: Any, low: Any, high: Any) -> None:
            rows = cut(block, low, high, replica(), local)
            meter(rows[1], *forward(rows, False))

        def mine(values: Any) -> Any:
            return strategy.experimental_local_results(values)[0]

        said_by_host, time_of_day = tf.TensorSpec((HOST,)), tf.TensorSpec((), tf.float64)

        @tf.function(input_signature=[rows_spec, draws_spec, wholes, number, whole, whole, said_by_host, time_of_day])
        def train_steps(
            block: Any, draws: Any, edges: Any, everyone: Any, first: Any, count: Any, host: Any, clock: Any
        ) -> tuple[Any, Any]:
            signals = tf.TensorArray(tf.float32, count, element_shape=(OWN + ranks,))
            said = tf.zeros((ranks * HOST,))
            for i in tf.range(count):
                at = first + i
                row, said, clock = (
                    mine(values)
                    for values in strategy.run(train_step, (block, draws, edges[at], edges[at + 1], everyone[at], clock, host))
                )
                signals = signals.write(i, row)
            return signals.stack(), said

        @tf.function(input_signature=[rows_spec, wholes])
        def evaluate_steps(block: Any, edges: Any) -> None:
            for i in tf.range(tf.shape(edges)[0] - 1):
                strategy.run(evaluate_step, (block, edges[i], edges[i + 1]))

        @tf.function
        def sums() -> Any:
            def over_ranks() -> Any:
                values = [tf.identity(v.value) for v in [*self.statistics, *self.meter_variables]]
                values = [v / replicas if i < len(self.statistics) else v for i, v in enumerate(values)]
                return context().all_reduce(tf.distribute.ReduceOp.SUM, values) if replicas > 1 else values

            return [mine(v) for v in strategy.run(over_ranks)]

        self._train: Any = train_steps
        self._evaluate, self._sums = evaluate_steps, sums

    def train(self, block: "Fed", first: int, count: int, host: np.ndarray) -> Signals:
        """Train on `count` steps of a block from its step `first` on. host: `[HOST]`, what this rank has to say."""
        import tensorflow as tf

        part, clock = (tf.constant(first), tf.constant(count)), tf.constant(time.time(), tf.float64)
        steps, said = self._train(block.rows, block.draws, block.edges, block.everyone, *part, tf.constant(host), clock)
        return Signals(steps.numpy(), said.numpy().reshape(self.ranks, HOST))

    def graph(self) -> Any:
        """What TensorFlow made of a training call, for TensorBoard."""
        return self._train.get_concrete_function().graph

    def evaluate(self, block: "Fed") -> None:
        self._evaluate(block.rows, block.edges)

    def collect(self) -> list[np.ndarray]:
        """Bring the layers' statistics to their mean over the ranks; the meters' sums over the ranks."""
        values = [np.asarray(v) for v in self._sums()]
        for variable, value in zip(self.statistics, values, strict=False):
            variable.assign(value)
        return values[len(self.statistics) :]

    def take_up(self, sums: list[np.ndarray]) -> None:
        """Begin with these sums, which were those of all ranks; called by one of them."""
        for variable, value in zip(self.meter_variables, sums, strict=True):
            for own in self.strategy.experimental_local_results(variable.value)[:1]:
                own.assign(value)

    def reset(self) -> None:
        for meter in self.meters:
            meter.reset_state()


def _rescale(scale: Any, finite: Any) -> None:
    """Dynamic loss scaling: half after a gradient that was not finite, double after 2,000 that were (Micikevicius et al.,
    Mixed Precision Training, 2018). Decided on the summed gradient, so that all ranks agree."""
    import tensorflow as tf

    good = tf.where(finite, scale.good + 1, 0)
    doubled = good >= 2000
    value = tf.where(finite, tf.where(doubled, scale.value * 2, scale.value), tf.maximum(scale.value / 2, 1.0))
    scale.variable.assign(value)
    scale.counter.assign(tf.where(doubled, 0, good))


class LossScale:
    """The factor that keeps float16 gradients away from zero."""

    def __init__(self):
        import keras

        self.variable = keras.Variable(2.0**15, trainable=False, name="loss_scale", aggregation="only_first_replica")
        self.counter = keras.Variable(0, dtype="int32", trainable=False, name="good_steps", aggregation="only_first_replica")

    @property
    def value(self) -> Any:
        return self.variable.value

    @property
    def good(self) -> Any:
        return self.counter.value


@dataclass
class Fed:
    """A block on the device."""

    rows: tuple[dict[str, Any], Any, Any]
    """Inputs, target, weight."""
    edges: Any
    everyone: Any
    draws: dict[str, Any]
    steps: int


class Feed:
    """Blocks, two ahead, moved to the device in a thread of their own. `waited`: seconds that `next` had to wait."""

    def __init__(self, blocks: Iterator[Block], device: str):
        self._queue: queue.Queue = queue.Queue(2)
        self._closed = threading.Event()
        self.waited = 0.0
        self._thread = threading.Thread(target=self._fill, args=(blocks, device), daemon=True)
        self._thread.start()

    def _fill(self, blocks: Iterator[Block], device: str) -> None:
        import tensorflow as tf

        try:
            for block in blocks:
                with tf.device(device):
                    inputs = {name: on_device(values) for name, values in block.inputs.items()}
                    rows = (inputs, tf.convert_to_tensor(block.target), tf.convert_to_tensor(block.weight))
                    draws = {name: tf.convert_to_tensor(values) for name, values in block.draws.items()}
                edges = tf.convert_to_tensor(block.edges)
                if not self._put(Fed(rows, edges, tf.convert_to_tensor(block.everyone), draws, len(block.everyone))):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                pass
        return False

    def __next__(self) -> Fed:
        started = time.monotonic()
        item = self._queue.get()
        self.waited += time.monotonic() - started
        if isinstance(item, BaseException):
            raise item
        if item is None:
            raise StopIteration
        return item

    def close(self) -> None:
        """Let the thread end, with whatever it reads from."""
        self._closed.set()
        self._thread.join(5)
