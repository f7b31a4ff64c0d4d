"""The course of a training: after each epoch, whether it was the best, whether the learning rate falls, whether it ends."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ModelError
from ..project import Train
from .rate import plateau

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": float.__ge__,
    "<=": float.__le__,
    ">": float.__gt__,
    "<": float.__lt__,
}


@dataclass(frozen=True)
class Verdict:
    reason: str
    """Why the training ends; empty when it goes on."""
    best: bool
    factor: Callable[[float], float] | None
    """The learning rate's factor after this epoch, from the one before, when it falls."""


def falls(metric: str) -> bool:
    """Whether less of a metric is better."""
    return bool(re.search("loss|error", metric)) or metric.removeprefix("val_") in ("mae", "mse")


def judge(train: Train, history: list[dict], lowered: int) -> Verdict:
    """Hold the last epoch of `history` against the ones before. lowered: the epoch after which the rate fell last.

    Raises ModelError for a metric that is not measured.
    """
    last = history[-1]
    monitor = train.monitor or ("val_loss" if "val_loss" in last else "loss")
    _require(monitor, "train.monitor", last)
    values = [-line[monitor] if falls(monitor) else line[monitor] for line in history]
    factor: Callable[[float], float] | None = None
    settings = plateau(train)
    waited = min(_without_better(values, settings["min_delta"]), last["epoch"] - lowered) if settings else 0
    if settings and waited >= settings["patience"]:
        lowest = settings["min_lr"] / train.optimizer.learning_rate
        factor = functools.partial(_lower, by=settings["factor"], lowest=lowest)

    reason = ""
    if train.stop.when:
        name, sign, bound = re.fullmatch(r"(\w+) *(>=|<=|>|<) *(.+)", train.stop.when).groups()  # pyright: ignore[reportOptionalMemberAccess]
        _require(name, "train.stop.when", last)
        if _COMPARE[sign](float(last[name]), float(bound)):
            reason = f"{name} is {last[name]:.4g} ({train.stop.when})"
    if train.stop.patience and _without_better(values, train.stop.min_delta) >= train.stop.patience:
        reason = reason or f"no better {monitor} for {train.stop.patience} epochs"
    return Verdict(reason, max(values) == values[-1], factor)


def _lower(before: float, by: float, lowest: float) -> float:
    return max(lowest, before * by)


def last_step(train: Train, steps_of_epoch: int) -> int:
    """The step that a training ends with, unless something ends it before."""
    everything = train.epochs * steps_of_epoch
    return min(everything, train.stop.steps or everything)


def reached(train: Train, step: int, end: int) -> str:
    """Why a training that has come to `step` of `end` is over; empty when it is not."""
    if step < end:
        return ""
    return f"{train.stop.steps} steps" if train.stop.steps == end else f"{train.epochs} epochs"


def _require(name: str, key: str, figures: dict) -> None:
    if name not in figures:
        measured = [n for n in figures if n not in ("epoch", "step", "seconds", "rows_per_second", "workers")]
        raise ModelError(f"{key}: `{name}` is not measured: there are {', '.join(measured)}")


def _without_better(values: list[float], delta: float) -> int:
    """Epochs at the end without a value that beats all before it by `delta`."""
    best, since = -math.inf, 0
    for value in values:
        best, since = (value, 0) if value > best + delta else (best, since + 1)
    return since
