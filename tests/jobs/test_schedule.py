"""Schedulers, as functions of curves."""

import numpy as np
import pytest
from heliograph.jobs.schedule import Course, Everything, Halving, explored, scheduler
from heliograph.jobs.search import Dimension, Space, blended, front

SPACE = Space({
    "train.optimizer.learning_rate": Dimension(1e-4, 1e-1, log=True),
    "train.optimizer.name": Dimension(choices=("adam", "sgd")),
    "data.augment.noise": Dimension(0.0, 0.5),
    "model.hp.units": Dimension(8, 64, integer=True),
})  # fmt: skip
CONFIG = {
    "train.optimizer.learning_rate": 0.01, "train.optimizer.name": "adam", "data.augment.noise": 0.2, "model.hp.units": 20,
}  # fmt: skip


def played(kind: str, quality: list[float], levels: int, grace: int, at_once: int = 2, shares: int = 1) -> list[Course]:
    """A search whose trials come to `quality + 1 / level`, with as many under way at a time; the one that began first goes on."""
    rule, trials, running = scheduler(kind, levels, grace, SPACE, 0, shares), [], []
    while True:
        while len(running) < at_once:
            found = rule.resume(trials, last=False)
            if found is None and len(trials) < len(quality):
                trials.append(Course(len(trials) + 1, CONFIG))
                running.append(trials[-1])
                continue
            found = found or rule.resume(trials, last=not running)
            if found is None:
                break
            trial = trials[found.number - 1]
            trial.waits = False
            running.append(trial)
        if not running:
            return trials
        trial = running[0]
        trial.curve.append(quality[trial.number - 1] + 1 / (len(trial.curve) + 1))
        ends = len(trial.curve) == rule.levels
        if not ends and len(trial.curve) in rule.rungs(trial.number):
            said = rule.judge(trial, trials)
            ends, trial.waits = bool(said), said == "paused"
        if ends:
            running.pop(0)


@pytest.mark.parametrize("seed", range(5))
def test_halving_trains_a_third_as_far_and_finds_the_best(seed):
    quality = np.random.default_rng(seed).permutation(27).astype(float).tolist()
    trials = played("asha", quality, 27, 1)
    lengths = [len(t.curve) for t in trials]
    assert set(lengths) == {1, 3, 9, 27}
    assert min(t.number for t in trials if len(t.curve) == 27 and quality[t.number - 1] == 0)
    assert sum(lengths) <= 27 * 27 / 2.8
    for level, most in ((3, 27), (9, 9), (27, 3)):  # no more than a third, but for those that were of it when they were judged
        assert most / 3 <= sum(n >= level for n in lengths) <= most / 3 + 5


def test_brackets_judge_later_and_later():
    rule = scheduler("hyperband", 27, 1, SPACE, 0)
    assert isinstance(rule, Halving)
    found = [tuple(rule.rungs(number)) for number in range(1, 50)]
    assert {f: found.count(f) for f in set(found)} == {(1, 3, 9): 27, (3, 9): 12, (9,): 6, (): 4}


def test_the_median_stops_what_is_behind_and_no_other():
    quality = [0.0, 1.0, 2.0, 3.0, 9.0, 0.5, 8.0]
    trials = played("median", quality, 6, 2)
    assert [len(t.curve) for t in trials] == [6, 6, 6, 2, 2, 6, 2]


def test_shares_of_the_data_are_rungs_too():
    assert [len(t.curve) for t in played("asha", [3.0, 2.0, 1.0, 0.0, 4.0, 5.0], 50, 9, at_once=1, shares=3)].count(3) == 1


def test_a_population_takes_over_from_the_best_quarter():
    rule = scheduler("pbt", 12, 3, SPACE, 0)
    members = [Course(n, {**CONFIG, "model.hp.units": 10 + n}, [float(n)] * 3, waits=True) for n in range(1, 9)]
    taken = {}
    for member in members:
        found = rule.resume([*members[: member.number - 1], member, *members[member.number :]], last=False)
        assert found.number == member.number
        taken[found.number] = found.from_
        if found.from_:
            assert found.config["model.hp.units"] == 10 + found.from_  # what the weights belong to
        member.waits = False
    assert {n for n, other in taken.items() if other} == {7, 8}
    assert {other for other in taken.values() if other} <= {1, 2}


def test_what_is_explored_stays_in_the_space():
    draw = np.random.default_rng(0)
    narrow = Space(SPACE.dimensions, ("data.augment.noise <= 0.3",))
    rates = set()
    for _ in range(200):
        found = explored(narrow, CONFIG, draw)
        assert narrow.holds(found)
        assert (found["model.hp.units"], found["train.optimizer.name"]) == (20, "adam")
        rates.add(round(found["train.optimizer.learning_rate"], 6))
    assert {0.008, 0.012} <= rates
    assert len(rates) > 20


def test_everything_trains_to_its_end():
    assert all(len(t.curve) == 5 for t in played("none", [1.0, 2.0, 3.0], 5, 1))
    assert type(scheduler("none", 5, 1, SPACE, 0)) is Everything


def test_the_front_is_what_nothing_beats():
    values = np.array([[1.0, 5.0], [2.0, 2.0], [5.0, 1.0], [3.0, 3.0], [2.0, 2.0], [1.0, 6.0]])
    assert front(values) == [0, 1, 2, 4]
    draw = np.random.default_rng(0).random((50, 3))
    for i in range(50):
        beaten = any((draw[j] <= draw[i]).all() and (draw[j] < draw[i]).any() for j in range(50))
        assert (i in front(draw)) != beaten
    best = {int(np.argmin(blended(values, seed))) for seed in range(300)}
    assert best == {0, 1, 2}  # each weighing has its best on the front, and together they reach all of it
    assert np.isinf(blended(np.array([[1.0, np.inf], [0.0, 1.0]]), 0)).tolist() == [True, False]
