"""What is tried next: spaces, constraints, and searches that are functions of the past."""

import math

import numpy as np
import pytest
from heliograph.jobs.search import SEARCHES, Config, Dimension, Space, constraint, expected_improvement, gaussian, starts
from hypothesis import given, settings
from hypothesis import strategies as st

MIXED = Space(
    {
        "rate": Dimension(1e-4, 1e-1, log=True),
        "units": Dimension(8, 256, log=True, integer=True),
        "more": Dimension(8, 64, integer=True, step=8),
        "dropout": Dimension(0.0, 0.5, step=0.05),
        "kind": Dimension(choices=("adam", "sgd", "rmsprop")),
        "momentum": Dimension(0.0, 0.99, when=(("kind", ("sgd",)),)),
    },
    ("units >= more",),
)


def value(config: Config) -> float:
    away = (math.log10(config["rate"]) + 2) ** 2 + (config["units"] / 100 - 1) ** 2 + config["dropout"]
    return away + (0 if config["kind"] == "sgd" else 0.5) + abs(config.get("momentum", 0.5) - 0.9)


def searched(space: Space, search: str, trials: int, of=value, seed: int = 0) -> list[tuple[Config, float]]:
    past: list[tuple[Config, float]] = []
    while len(past) < trials and (config := SEARCHES[search](space, past, [], seed)) is not None:
        past.append((config, of(config)))
    return past


@pytest.mark.parametrize("high", [0.3, 0.1, 0.7, 1e-2, 7.0])
def test_the_ends_of_a_range_are_in_it(high):
    for dimension in (Dimension(1e-4, high, log=True), Dimension(1e-4, high)):
        assert [dimension.holds(dimension.value(place)) for place in (0.0, 1.0)] == [True, True]


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_every_place_is_a_configuration_of_the_space_and_comes_back(places):
    config = MIXED.config(np.array(places))
    assert ("momentum" in config) == (config["kind"] == "sgd")
    assert 8 <= config["units"] <= 256
    assert isinstance(config["units"], int)
    assert config["more"] % 8 == 0
    for name, found in config.items():
        dimension = MIXED.dimensions[name]
        again = dimension.value(dimension.place(found))
        assert again == (pytest.approx(found) if isinstance(found, float) else found)
    assert MIXED.holds(config) == (config["units"] >= config["more"])
    for changed in ({"units": 8.5}, {"more": 9}, {"dropout": 0.51}, {"kind": "lion"}, {"rate": 1.0}, {"x": 1}):
        assert not MIXED.holds(config | changed)
    x = MIXED.features([config])
    assert x.shape == (1, 8)
    assert ((x >= 0) & (x <= 1)).all()


@pytest.mark.parametrize("search", ["random", "tpe", "bayesian"])
def test_trials_are_new_keep_the_constraints_and_follow_from_the_past(search):
    past = searched(MIXED, search, 18)
    assert len({repr(config) for config, _ in past}) == 18
    assert all(MIXED.holds(config) for config, _ in past)
    assert {config["kind"] for config, _ in past} == {"adam", "sgd", "rmsprop"}
    assert SEARCHES[search](MIXED, past[:12], [], 0) == past[12][0]
    assert SEARCHES[search](MIXED, past[:12], [past[12][0]], 0) != past[12][0]


@pytest.mark.parametrize("search", ["grid", "random", "tpe", "bayesian"])
def test_a_small_space_is_searched_whole_and_then_nothing_is_left(search):
    space = Space({"a": Dimension(1, 3, integer=True), "b": Dimension(choices=(True, False))}, ("a != 2",))
    past = searched(space, search, 50, lambda config: config["a"])
    assert sorted((c["a"], c["b"]) for c, _ in past) == [(1, False), (1, True), (3, False), (3, True)]


def test_a_grid_has_every_combination_once_and_conditions_cut_it():
    space = Space({"kind": Dimension(choices=("adam", "sgd")), "momentum": Dimension(0, 1, step=0.5, when=(("kind", ("sgd",)),))})
    assert space.grid() == [
        {"kind": "adam"}, {"kind": "sgd", "momentum": 0.0}, {"kind": "sgd", "momentum": 0.5}, {"kind": "sgd", "momentum": 1.0},
    ]  # fmt: skip
    assert len(Space({"a": Dimension(), "b": Dimension(1, 100, log=True)}).grid()) == 25


def test_bayesian_search_finds_what_random_draws_do_not():
    best = {
        s: np.median([min(v for _, v in searched(MIXED, s, 30, seed=seed)) for seed in range(5)]) for s in ("bayesian", "random")
    }
    assert best["bayesian"] < 0.6 * best["random"]


def test_failures_count_as_bad_and_are_not_sought_again():
    def fails(config: Config) -> float:
        return math.inf if config["x"] > 0.5 else (config["x"] - 0.3) ** 2

    past = searched(Space({"x": Dimension()}), "bayesian", 14, fails)
    assert sum(math.isinf(v) for _, v in past[4:]) <= 3
    assert min(v for _, v in past) < 1e-3
    assert searched(Space({"x": Dimension()}), "bayesian", 5, lambda _: math.inf)[4][0] is not None


def test_the_improvement_that_is_expected_shrinks():
    space = Space({"x": Dimension()})
    past = searched(space, "bayesian", 12, lambda c: (c["x"] - 0.3) ** 2)
    assert expected_improvement(space, past[:1]) == math.inf
    assert expected_improvement(space, past) < 0.01 < expected_improvement(space, past[: starts(space) + 1])


@settings(max_examples=60)
@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=30))
def test_values_become_finite_and_standard_and_keep_their_order(values):
    made = gaussian(np.array(values))
    assert np.isfinite(made).all()
    assert (np.diff(made[np.argsort(values, kind="stable")]) >= -1e-9).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a >", "is no constraint"),
        ("c > 1", "`c` is not in the space: a, b.c"),
        ("__import__('os').system('x')", "cannot be in a constraint"),
        ("a ** 2 < 1", "cannot be in a constraint"),
    ],
)
def test_what_is_no_constraint_is_refused(text, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        constraint(text, {"a", "b.c"})


def test_constraints_compute():
    holds = constraint("a * b.c <= 12 and (a > 1 or b.c == 'x')", {"a", "b.c"})
    assert [holds({"a": 3, "b.c": 4}), holds({"a": 3, "b.c": 5}), holds({"a": 1, "b.c": 4})] == [True, False, False]
    assert holds({"a": 3})  # what is not there cannot break it
