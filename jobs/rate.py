"""The learning rate of every step: a Keras schedule by its name, a warm-up before it, a factor over it.

The rate is a function of the optimizer's own step counter and of one variable, `factor`, both of which are in every
checkpoint; so it survives an interruption and a change of the number of workers, and two ranks cannot disagree on it.
`ReduceLROnPlateau` and the rollback after an anomaly move the factor.
"""

import inspect
import math
from typing import Any

from ..errors import ModelError
from ..project import Train

PLATEAU = "ReduceLROnPlateau"


def rate(train: Train, steps: int) -> tuple[Any, Any]:
    """(the schedule that the optimizer takes, its factor, a variable that begins at 1). steps: of the whole training.

    Raises ModelError for a name or a parameter that Keras does not know. To be called in the strategy's scope.
    """
    import keras
    import tensorflow as tf

    factor: Any = keras.Variable(1.0, trainable=False, name="rate_factor", aggregation="only_first_replica")
    warmup = train.schedule.warmup
    if warmup >= steps:
        raise ModelError(f"train.schedule: a warm-up of {warmup} steps, but the training has {steps}: make it shorter")
    base = _base(train, steps - warmup)

    class Rate(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step: Any) -> Any:
            step = tf.cast(step, tf.float32)
            current: Any = base(tf.maximum(step - warmup, 0.0)) if callable(base) else base
            rising = tf.minimum(1.0, (step + 1.0) / warmup) if warmup else 1.0
            return current * rising * tf.convert_to_tensor(factor.value)

        def get_config(self) -> dict:
            return {}

    return Rate(), factor


def _base(train: Train, steps: int) -> Any:
    import keras

    name, first = train.schedule.name, train.optimizer.learning_rate
    given = train.schedule.model_dump(exclude={"name", "warmup"})
    if name == PLATEAU:
        plateau(train)
    if name in ("Constant", PLATEAU):
        return first
    known = _one_cycle if name == "OneCycle" else getattr(keras.optimizers.schedules, name, None)
    if known is None or name == "LearningRateSchedule" or not callable(known):
        names = [n for n in dir(keras.optimizers.schedules) if n[0].isupper() and n != "LearningRateSchedule"]
        raise ModelError(f"train.schedule: no schedule `{name}`: there are {', '.join(['OneCycle', PLATEAU, *names])}")
    takes = inspect.signature(known).parameters
    for parameter, value in (("initial_learning_rate", first), ("decay_steps", steps), ("first_decay_steps", steps)):
        if parameter in takes and parameter not in given:
            given[parameter] = value
    try:
        return known(**given)
    except (TypeError, ValueError) as error:
        raise ModelError(f"train.schedule: {name} with {given}: {error}; it takes {', '.join(takes)}") from None


def _one_cycle(initial_learning_rate: float, decay_steps: int, rise: float = 0.3, start: float = 25.0, end: float = 1e4) -> Any:
    """From 1/start of the rate up to it over a share `rise` of the steps, then down to 1/end of it, on cosines
    (L. N. Smith and N. Topin, Super-Convergence, 2018)."""
    import tensorflow as tf

    peak, up = initial_learning_rate, max(1.0, rise * decay_steps)

    def at(step: Any) -> Any:
        def between(low: float, high: float, share: Any) -> Any:
            return low + (high - low) * (1 - tf.cos(math.pi * tf.clip_by_value(share, 0.0, 1.0))) / 2

        return tf.where(
            step < up, between(peak / start, peak, step / up), between(peak, peak / end, (step - up) / (decay_steps - up))
        )

    return at


def plateau(train: Train) -> dict[str, float] | None:
    """The parameters of `ReduceLROnPlateau` (Keras' callback), when it is the schedule. Raises ModelError."""
    if train.schedule.name != PLATEAU:
        return None
    known = {"factor": 0.1, "patience": 5, "min_delta": 1e-4, "min_lr": 0.0}
    given = train.schedule.model_dump(exclude={"name", "warmup"})
    if unknown := given.keys() - known:
        raise ModelError(f"train.schedule: {PLATEAU} takes {', '.join(known)}, not {', '.join(sorted(unknown))}")
    return known | given
