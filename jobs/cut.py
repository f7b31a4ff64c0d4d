"""Cut a Keras model into sub-networks that follow each other, by what each of its operations costs.

A cut lies between two operations of the model's graph, in topological order. Whatever tensors cross it (skip connections
too) are what one sub-network hands to the next. The whole model's layers and variables are shared, not copied, so weights
and checkpoints are the ordinary model's.
"""

import itertools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ModelError


@dataclass(frozen=True)
class Cut:
    """Where a model is cut: the number of operations before each cut, and what each stage costs."""

    places: tuple[int, ...]
    seconds: tuple[float, ...]
    """Measured, of one micro-batch forward."""
    bytes: tuple[int, ...]
    """Of a stage's weights, gradients and Adam's moments."""


def _graph(model: Any) -> Any:
    """The functional model, which a Sequential one holds."""
    return getattr(model, "_functional", model)


def nodes(model: Any) -> list[Any]:
    """The model's operations in topological order, inputs left out. Raises ModelError for a model without a graph."""
    by_depth = getattr(_graph(model), "_nodes_by_depth", None)
    if by_depth is None:
        raise ModelError("train.pipeline: the model is a subclass of keras.Model: only functional and sequential ones can be cut")
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]


def split(model: Any, places: tuple[int, ...]) -> list[Any]:
    """The sub-networks between `places`, as Keras models that share the layers; inputs and outputs are lists of tensors."""
    import keras

    order, edges = nodes(model), (0, *places, len(nodes(model)))
    stages = []
    for first, last in itertools.pairwise(edges):
        # Each operation is called on inputs of the stage's own: Keras does not find a tensor again that passes straight through.
        given = _crossing(model, order, first)
        inputs = [keras.Input(batch_shape=t.shape, dtype=t.dtype) for t in given]
        values = dict(zip(map(id, given), inputs, strict=True))
        for node in order[first:last]:
            arguments, keywords = node.arguments.fill_in(values)
            made = keras.tree.flatten(node.operation(*arguments, **keywords))
            values |= dict(zip(map(id, node.outputs), made, strict=True))
        stages.append(keras.Model(inputs, [values[id(t)] for t in _crossing(model, order, last)]))
    return stages


def choose(model: Any, stages: int, rows: dict[str, np.ndarray] | np.ndarray, names: list[str] | None = None) -> Cut:
    """The cut into `stages` whose slowest stage is fastest, by running each operation on `rows`.

    names: layers that the stages but the last end with, instead. Raises ModelError when the model cannot be cut so.
    """
    order = nodes(model)
    seconds = _measure(model, order, rows)
    weights = [_bytes(node.operation) for node in order]
    allowed = [place for place in range(1, len(order)) if _allowed(order, place)]
    if names is not None:
        ends = {node.operation.name: i + 1 for i, node in enumerate(order)}
        for name in names:
            if name not in ends:
                raise ModelError(f"train.pipeline.cuts: the model has no layer `{name}`: it has {', '.join(list(ends)[:20])}")
        places = tuple(sorted(ends[name] for name in names))
        if len(set(places)) != stages - 1 or not set(places) <= set(allowed):
            raise ModelError(
                f"train.pipeline.cuts: {', '.join(names)}: {stages} stages need {stages - 1} different cuts, "
                "not behind the last layer, and none inside what a layer that is used twice spans"
            )
    else:
        if len(allowed) < stages - 1:
            raise ModelError(
                f"train.pipeline: the model cannot be cut into {stages} stages: it has {len(order)} operations in a row and "
                f"{len(allowed)} places to cut (a layer that is used twice cannot be parted): lower train.pipeline.stages"
            )
        places = _balance(seconds, allowed, stages)
    edges = (0, *places, len(order))
    return Cut(
        places,
        tuple(sum(seconds[a:b]) for a, b in itertools.pairwise(edges)),
        tuple(4 * sum(weights[a:b]) for a, b in itertools.pairwise(edges)),
    )


def _balance(seconds: list[float], allowed: list[int], stages: int) -> tuple[int, ...]:
    """Places of `allowed` that make the longest stage shortest (dynamic programming over stages and places)."""
    total = np.concatenate([[0.0], np.cumsum(seconds)])
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(stages - 1):
        best = {
            b: min((max(worst, total[b] - total[a]), (*cuts, b)) for a, (worst, cuts) in best.items() if a < b)
            for b in allowed
            if any(a < b for a in best)
        }
    return min((max(worst, total[-1] - total[a]), cuts) for a, (worst, cuts) in best.items())[1]


def _crossing(model: Any, order: list[Any], place: int) -> list[Any]:
    """The tensors that are made before `place` and needed behind it; at either end the inputs or outputs of the model."""
    functional = _graph(model)
    if place in (0, len(order)):
        return list(functional.outputs if place else functional.inputs)
    made = [*functional.inputs, *(t for node in order[:place] for t in node.outputs)]
    needed = {id(t) for node in order[place:] for t in node.arguments.keras_tensors} | {id(t) for t in functional.outputs}
    return [t for t in made if id(t) in needed]


def _allowed(order: list[Any], place: int) -> bool:
    """No layer with weights may stand on both sides."""
    before = {id(node.operation) for node in order[:place] if _bytes(node.operation)}
    return not any(id(node.operation) in before for node in order[place:])


def _bytes(operation: Any) -> int:
    return sum(int(np.prod(v.shape)) * 4 for v in getattr(operation, "weights", ()))


def _measure(model: Any, order: list[Any], rows: Any) -> list[float]:
    """Seconds of each operation, forward, the best of three; each compiled, as it will run."""
    import tensorflow as tf

    functional = _graph(model)
    given = [rows[t.name] for t in functional.inputs] if isinstance(rows, dict) else [rows]
    values = {id(t): tf.convert_to_tensor(v) for t, v in zip(functional.inputs, given, strict=True)}
    seconds = []
    for node in order:
        arguments, keywords = node.arguments.fill_in(values)
        # Layers of a graph have fixed arguments; only the tensors vary.
        run: Any = tf.function(lambda a=arguments, k=keywords, op=node.operation: op(*a, **k), autograph=False)
        outputs, times = run(), []
        for _ in range(3):
            started = time.perf_counter()
            outputs = run()
            times.append(time.perf_counter() - started)
        seconds.append(min(times))
        values |= {id(t): v for t, v in zip(node.outputs, tf.nest.flatten(outputs), strict=True)}
    return seconds
