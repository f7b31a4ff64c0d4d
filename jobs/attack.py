"""Attacks: the smallest changes of inputs that make a model answer wrongly, to measure with and to train against.

A number may move by `epsilon` times its range in the training rows and stays inside that range; a column's numbers share one
range where the column is a tensor, such as an image. What is no quantity stays: ids of words, ones and zeros, what comes from
text and times, and the columns that a project names as fixed. All of it happens in the model's own inputs, after preprocessing.

What is made larger is the margin in log-probabilities, log(the most probable wrong class) - log(the truth). Cross-entropy of
probabilities, as Keras bounds it, has no gradient where a model is sure, which looks like robustness and is none (Carlini and
Wagner, Towards evaluating the robustness of neural networks, 2017; Athalye et al., Obfuscated gradients, 2018).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..datasets.preprocess import Preprocessing
from ..datasets.schema import Schema, as_fed
from ..errors import BundleError, DataError
from ..project import FILE
from ..settings import hint
from ..trust import Attack
from .engine import FILES, keras_model
from .evaluate import Sources, test_rows
from .export import sample
from .steps import claim, fed

TINY = 1e-30
MOST_ROWS = 20_000
"""Of the training split, that ranges are taken of."""
QUERIES = 10
"""Answers that the search without gradients asks for in the place of one step."""
AT_ONCE = 512


@dataclass(frozen=True)
class Box:
    """Of each input, arrays that broadcast to a row of it: between which numbers it lies, and its range (0: it stays)."""

    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    span: dict[str, np.ndarray]

    @classmethod
    def of(cls, prepared: Path, keys: KeyStore | None, fixed: list[str], where: str) -> "Box":
        """Raises DataError for a column that is not there, and where nothing is left that could be changed."""
        schema, made = Schema.read(prepared), Preprocessing.read(prepared)
        known = {f.name: f.kind for f in schema.features}
        if wrong := next((name for name in fixed if name not in known), None):
            raise DataError(f"{FILE}: {where}.fixed: no feature is called `{wrong}`: {hint(wrong, list(known))}")
        low, high, span = {}, {}, {}
        for name, values in sample(prepared, keys, "train", MOST_ROWS)[0].items():
            low[name], high[name] = values.min(axis=0), values.max(axis=0)
            parts = made.inputs[name]
            if len(parts) == 1 and known.get(parts[0]) in ("tensor", "image"):
                low[name], high[name] = (np.full(values.shape[1:], v) for v in (values.min(), values.max()))
                moves = np.full(values.shape[1:], parts[0] not in fixed)
            else:
                moves = _moves(values, parts, known, set(fixed))
            span[name] = np.where(moves & (name not in schema.ids), high[name] - low[name], 0).astype(np.float32)
        if not any(s.any() for s in span.values()):
            raise DataError(
                f"{FILE}: {where}: nothing of a row can be changed by a little: its inputs are words, ones and zeros, or fixed"
            )
        return cls(low, high, span)


def _moves(values: np.ndarray, parts: tuple[str, ...], known: dict[str, str], fixed: set[str]) -> np.ndarray:
    """Which numbers of an input made of several columns are quantities: more than two values, of a column of numbers."""
    several = np.array([len(np.unique(column[:2000])) > 2 for column in values.reshape(len(values), -1).T])
    if len(parts) == len(several):  # a number a column
        several &= np.array([known.get(p, "number") == "number" and p not in fixed for p in parts])
    elif fixed & set(parts):
        raise DataError(f"{FILE}: `fixed`: a column that becomes several numbers cannot be told from the others: leave it out")
    return several.reshape(values.shape[1:])


def margin(outputs: Any, target: Any) -> Any:
    """`[rows]`: log of the most probable wrong class less log of the truth's; above 0 the answer is wrong. Of numbers
    (float target): the squared error."""
    import tensorflow as tf

    outputs = tf.cast(outputs, tf.float32)
    if not target.dtype.is_integer:
        return tf.square(outputs[:, 0] - target)
    truth = tf.one_hot(target, outputs.shape[-1])
    logs = tf.math.log(tf.maximum(outputs, TINY))
    return tf.reduce_max(logs - 1e9 * truth, axis=-1) - tf.reduce_sum(logs * truth, axis=-1)


def ascend(
    call: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], target: Any, box: Box, epsilon: float, steps: int, seed: Any,
    random: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Projected gradient ascent on the margin (Madry et al., 2018): inputs, as tensors by name, moved by `epsilon` spans at most.

    call: inputs to outputs. seed: int32 `[2]`, of the random beginning. One step without a random beginning is FGSM."""
    import tensorflow as tf

    names = list(inputs)
    reach = {n: tf.constant(epsilon * box.span[n]) for n in names}
    step = (2.5 / steps if steps > 1 else 1.0) if random else 1.0

    def inside(moved: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for n in names:
            near = tf.clip_by_value(moved[n], inputs[n] - reach[n], inputs[n] + reach[n])
            bounded = tf.clip_by_value(near, tf.minimum(inputs[n], box.low[n]), tf.maximum(inputs[n], box.high[n]))
            out[n] = tf.where(box.span[n] > 0, bounded, inputs[n])
        return out

    def once(_: Any, moved: dict[str, Any]) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(moved)
            total = tf.reduce_sum(margin(call(moved), target))
        gradients: Any = tape.gradient(total, moved, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return _ + 1, inside({n: moved[n] + step * reach[n] * tf.sign(tf.convert_to_tensor(gradients[n])) for n in names})

    moved = inputs
    if random:
        moved = inside({
            n: inputs[n] + reach[n] * tf.random.stateless_uniform(tf.shape(inputs[n]), seed + tf.constant([0, i]), -1.0, 1.0)
            for i, n in enumerate(names)
        })  # fmt: skip
    return tf.while_loop(lambda i, _: i < steps, once, (tf.constant(0), moved))[1]


def hardening(settings: Any, box: Box, seed: int) -> Callable[..., dict[str, Any]]:
    """What a training step does to its rows first: (model, inputs, target, step) to inputs, of which a share was moved."""
    import tensorflow as tf

    def harden(model: Any, inputs: dict[str, Any], target: Any, step: Any) -> dict[str, Any]:
        count = tf.cast(tf.math.ceil(settings.share * tf.cast(tf.shape(target)[0], tf.float32)), tf.int32)
        some = {n: v[:count] for n, v in inputs.items()}
        at = tf.stack([tf.constant(seed % 2**31), tf.cast(step, tf.int32)])
        moved = ascend(lambda x: model(fed(x), training=False), some, target[:count], box, settings.epsilon, settings.steps, at)
        return {n: tf.concat([tf.stop_gradient(moved[n]), v[count:]], 0) for n, v in inputs.items()}

    return harden


def by_gradient(model: Any, inputs: dict[str, np.ndarray], target: np.ndarray, box: Box, settings: Attack) -> np.ndarray:
    """Which rows are still answered rightly after every restart: bool `[rows]`."""
    import tensorflow as tf

    fast = settings.method == "fgsm"

    @tf.function(autograph=False)
    def attacked(rows: Any, truth: Any, seed: Any) -> Any:
        moved = ascend(
            lambda x: model(fed(x), training=False), rows, truth, box, settings.epsilon, 1 if fast else settings.steps, seed,
            not fast,
        )  # fmt: skip
        return tf.argmax(model(fed(moved), training=False), axis=-1)

    right = np.ones(len(target), bool)
    for restart in range(1 if fast else settings.restarts):
        for at in range(0, len(target), AT_ONCE):
            rows = slice(at, at + AT_ONCE)
            some = {n: tf.constant(v[rows]) for n, v in inputs.items()}
            guess = attacked(some, tf.constant(target[rows]), tf.constant([restart, at])).numpy()
            right[rows] &= guess == target[rows]
    return right


def by_search(
    forward: Callable[[dict[str, np.ndarray]], np.ndarray], inputs: dict[str, np.ndarray], target: np.ndarray, box: Box,
    settings: Attack,
) -> np.ndarray:  # fmt: skip
    """The same without gradients: each step sets a part of the numbers (of an image a square, of a table some columns) to the end
    of their reach, and keeps it where the margin grows (after Andriushchenko et al., Square attack, 2020)."""
    rng = np.random.default_rng(0)
    queries = QUERIES * settings.steps * settings.restarts
    at = np.arange(len(target))

    def margins(moved: dict[str, np.ndarray]) -> np.ndarray:
        logs = np.log(np.maximum(forward(moved), TINY))
        truth = logs[at, target].copy()
        logs[at, target] = -np.inf
        return logs.max(axis=1) - truth

    best, moved = margins(inputs), inputs
    for query in range(queries):
        if (best > 0).all():
            break
        share = max(0.02, 0.5 * (1 - query / queries) ** 2)
        tried = {}
        for name, own in inputs.items():
            span, shape = box.span[name], own.shape[1:]
            mask = np.zeros((len(target), *shape), bool)
            if len(shape) >= 2:
                sides = [max(1, round(n * share**0.5)) for n in shape[:2]]
                for row in at:
                    a, b = (rng.integers(0, n - s + 1) for n, s in zip(shape[:2], sides, strict=True))
                    mask[row, a : a + sides[0], b : b + sides[1]] = True
                sign = rng.choice([-1.0, 1.0], (len(target), *(1,) * len(shape)))
            else:
                mask = rng.random(mask.shape) < share
                sign = rng.choice([-1.0, 1.0], mask.shape)
            end = np.clip(own + sign * settings.epsilon * span, np.minimum(own, box.low[name]), np.maximum(own, box.high[name]))
            tried[name] = np.where(mask & (span > 0), end, moved[name]).astype(np.float32)
        found = margins(tried)
        better = found > best
        best = np.where(better, found, best)
        moved = {n: np.where(better.reshape(-1, *(1,) * (v.ndim - 1)), tried[n], v) for n, v in moved.items()}
    return best <= 0


def measure(sources: Sources, settings: Attack) -> dict[str, Any]:
    """`robust_accuracy` of the first test rows, and their accuracy without an attack. Raises DataError, and BundleError for a
    model that gives no gradients."""
    box = Box.of(sources.prepared, sources.keys, settings.fixed, "evaluate.attack")
    engine, threads = sources.engine(), len(os.sched_getaffinity(0))
    columns, target = test_rows(sources, settings.rows)
    rows = {n: as_fed(v) for n, v in engine.preprocessing.apply(columns).items()}
    clean = engine.forward(rows).argmax(axis=1) == target
    if settings.method == "random":
        right = by_search(engine.forward, rows, target, box, settings)
    else:
        if not (sources.trained / FILES["keras"]).is_file():
            raise BundleError(f"{FILE}: evaluate.attack.method: `{settings.method}` needs gradients, and so a Keras model, but "
                              f"there is no {FILES['keras']}: write `method: random`")  # fmt: skip
        claim(1, threads)
        model = keras_model(sources.trained, sources.sealing)
        right = by_gradient(model, rows, target, box, settings)
    return {
        "robust_accuracy": float((right & clean).mean()), "accuracy": float(clean.mean()), "rows": len(target),
        "method": settings.method, "epsilon": settings.epsilon, "steps": settings.steps, "restarts": settings.restarts,
    }  # fmt: skip
