"""Schedulers: which trials go on after what they have come to, as functions of all trials' curves.

A trial's curve is its value (less is better) at each *level*: an epoch, or a share of the data. Some levels are rungs, where it
is judged: it goes on, it waits until it is good enough among those that came there, or it is stopped.

    asha       asynchronous successive halving (Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020): of all
               that came to a rung, the best third goes on
    hyperband  the same in brackets, which begin to judge later and later (Li et al., 2018)
    median     stopped when its best is worse than the median of the others' means so far (Golovin et al., Vizier, 2017)
    pbt        population based training (Jaderberg et al., 2017): members of the worst quarter take over weights and settings
               of one of the best quarter, and change them a little

Nothing is kept between two questions, so a search that was killed goes on as if nothing had been.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .search import Config, Space

FACTOR = 3
"""One of so many goes on."""
QUANTILE = 4
"""The best and the worst of a population: one of so many."""
FEWEST = 3
"""Trials without which no median means anything."""
MUTABLE = ("train.optimizer.", "train.label_smoothing", "data.augment.")
"""What can change while a model trains; everything else belongs to the weights, and is taken over with them."""
RESAMPLED = 0.25
CHANGES = (0.8, 1.2)


@dataclass
class Course:
    """What a scheduler knows of a trial. waits: it was paused at the last level of its curve."""

    number: int
    config: Config
    curve: list[float] = field(default_factory=list)
    waits: bool = False


@dataclass(frozen=True)
class Next:
    """A trial that goes on; from_: the one whose weights it takes over."""

    number: int
    config: Config
    from_: int | None = None


class Everything:
    """Every trial trains to its end. levels: of a whole trial."""

    def __init__(self, levels: int):
        self.levels = levels

    def rungs(self, number: int) -> list[int]:
        """The levels after which a trial is judged."""
        return []

    def judge(self, trial: Course, trials: Sequence[Course]) -> str:
        """At a rung: `paused`, `stopped`, or nothing when it goes on. trials: all, this one too."""
        return ""

    def resume(self, trials: Sequence[Course], last: bool) -> Next | None:
        """A paused trial that shall go on. last: nothing runs, and no new trial will begin."""
        return None


class Halving(Everything):
    """rungs: for each bracket the levels at which its trials are judged. sizes: of the brackets; trials are dealt out in turn."""

    def __init__(self, levels: int, rungs: list[list[int]], sizes: list[int]):
        super().__init__(levels)
        self._rungs = rungs
        self._dealt = [bracket for bracket, size in enumerate(sizes) for _ in range(size)]

    def bracket(self, number: int) -> int:
        return self._dealt[(number - 1) % len(self._dealt)]

    def rungs(self, number: int) -> list[int]:
        return self._rungs[self.bracket(number)]

    def _best(self, level: int, bracket: int, trials: Sequence[Course]) -> list[Course]:
        """The best third of those that came to a rung."""
        came = [t for t in trials if len(t.curve) >= level and self.bracket(t.number) == bracket]
        return sorted(came, key=lambda t: worst_last(t.curve[level - 1]))[: len(came) // FACTOR]

    def judge(self, trial: Course, trials: Sequence[Course]) -> str:
        best = self._best(len(trial.curve), self.bracket(trial.number), trials)
        return "" if any(t.number == trial.number for t in best) else "paused"

    def resume(self, trials: Sequence[Course], last: bool) -> Next | None:
        waiting = [t for t in trials if t.waits]
        for level in sorted({len(t.curve) for t in waiting}, reverse=True):
            for bracket in range(len(self._rungs)):
                for t in self._best(level, bracket, trials):
                    if t.waits and len(t.curve) == level:
                        return Next(t.number, t.config)
        if last and waiting and not any(len(t.curve) >= self.levels for t in trials):
            # Too few for another third: the best one of the highest rung goes on, so that one at least is trained to the end.
            top = max(len(t.curve) for t in waiting)
            found = min((t for t in waiting if len(t.curve) == top), key=lambda t: worst_last(t.curve[-1]))
            return Next(found.number, found.config)
        return None


class Median(Everything):
    def __init__(self, levels: int, grace: int):
        super().__init__(levels)
        self.grace = grace

    def rungs(self, number: int) -> list[int]:
        return list(range(self.grace, self.levels))

    def judge(self, trial: Course, trials: Sequence[Course]) -> str:
        level = len(trial.curve)
        means = [float(np.mean(t.curve[:level])) for t in trials if len(t.curve) >= level and t.number != trial.number]
        if len(means) < FEWEST:
            return ""
        best = min(trial.curve, key=worst_last)
        return "" if best <= np.median(means) else "stopped"


class Population(Everything):
    def __init__(self, levels: int, interval: int, space: Space, seed: int):
        super().__init__(levels)
        self.interval, self.space, self.seed = interval, space, seed

    def rungs(self, number: int) -> list[int]:
        return list(range(self.interval, self.levels, self.interval))

    def judge(self, trial: Course, trials: Sequence[Course]) -> str:
        return "paused"  # so that the others come as far

    def resume(self, trials: Sequence[Course], last: bool) -> Next | None:
        waiting = [t for t in trials if t.waits]
        if not waiting:
            return None
        member = min(waiting, key=lambda t: (len(t.curve), t.number))
        level = len(member.curve)
        came = sorted((t for t in trials if len(t.curve) >= level), key=lambda t: worst_last(t.curve[level - 1]))
        few = len(came) // QUANTILE
        if not few or member not in came[-few:]:
            return Next(member.number, member.config)
        draw = np.random.default_rng([self.seed, member.number, level])
        better = came[int(draw.integers(few))]
        return Next(member.number, explored(self.space, better.config, draw), better.number)


def mutable(key: str) -> bool:
    """Whether a key can change while a model trains."""
    return key.startswith(MUTABLE) and key != "train.optimizer.name"


def explored(space: Space, config: Config, draw: np.random.Generator) -> Config:
    """A configuration beside another, in what can change while a model trains: a fifth more or less, the next choice, or,
    one time in four, any value."""
    for _ in range(100):
        found = dict(config)
        for key in config:
            if not mutable(key):
                continue
            dimension = space.dimensions[key]
            if draw.random() < RESAMPLED:
                found[key] = dimension.value(float(draw.random()))
            elif dimension.choices:
                at = dimension.choices.index(config[key]) + int(draw.choice((-1, 1)))
                found[key] = dimension.choices[min(max(at, 0), len(dimension.choices) - 1)]
            else:
                near = min(max(config[key] * float(draw.choice(CHANGES)), dimension.low), dimension.high)
                found[key] = dimension.value(dimension.place(near))
        if space.keeps(found):
            return found
    return dict(config)


def scheduler(kind: str, levels: int, grace: int, space: Space, seed: int, shares: int = 1) -> Everything:
    """levels: epochs of a trial. grace: the first one at which it is judged. shares: of the data, where those are the levels."""
    if shares > 1:
        levels, grace = shares, 1
    if kind == "median":
        return Median(levels, grace)
    if kind == "pbt":
        return Population(levels, grace, space, seed)
    if kind not in ("asha", "hyperband"):
        return Everything(levels)
    rungs = list(range(1, shares)) if shares > 1 else []
    while shares == 1 and (level := grace * FACTOR ** len(rungs)) < levels:
        rungs.append(level)
    if kind == "asha":
        return Halving(levels, [rungs], [1])
    most = len(rungs)
    sizes = [math.ceil((most + 1) / (most - skipped + 1) * FACTOR ** (most - skipped)) for skipped in range(most + 1)]
    return Halving(levels, [rungs[skipped:] for skipped in range(most + 1)], sizes)


def worst_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf
