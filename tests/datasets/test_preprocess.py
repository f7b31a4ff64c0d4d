"""Fitting in blocks equals fitting at once, and the state survives JSON."""

import itertools

import numpy as np
import pytest
from heliograph.datasets.preprocess import Preprocessing, fit, moments
from heliograph.datasets.schema import Feature, Schema
from heliograph.project import Step
from hypothesis import given, settings
from hypothesis import strategies as st

SCHEMA = Schema(
    task="regression",
    target="y",
    features=(Feature(name="a", shape=()), Feature(name="image", shape=(2, 2)), Feature(name="b", shape=())),
)


def some(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "a": draw.normal(50, 9, rows).astype("f4"),
        "image": draw.uniform(0, 16, (rows, 2, 2)).astype("f4"),
        "b": np.full(rows, 3, "f4"),
    }


@given(st.lists(st.integers(1, 99), max_size=5), st.sampled_from(["standardise", "min_max"]))
@settings(max_examples=25, deadline=None)
def test_fitting_in_blocks_equals_fitting_at_once(cuts, kind):
    features = some(100)
    edges = [0, *sorted(set(cuts)), 100]
    blocks = [{n: v[a:b] for n, v in features.items()} for a, b in itertools.pairwise(edges)]
    steps = [Step(step=kind)]
    whole = fit(steps, [moments(features)], SCHEMA)
    pieces = fit(steps, map(moments, blocks), SCHEMA)
    for name in features:
        assert pieces.steps[0].columns[name] == pytest.approx(whole.steps[0].columns[name], rel=1e-12)


def test_standardised_columns_have_mean_zero_and_deviation_one_and_a_constant_stays_finite():
    features = some(1000)
    out = fit([Step(step="standardise")], [moments(features)], SCHEMA).apply(features, SCHEMA)
    assert out.keys() == SCHEMA.inputs.keys()
    assert out["features"].shape == (1000, 2)
    assert out["features"].mean(0) == pytest.approx([0, 0], abs=1e-4)
    assert out["features"].std(0) == pytest.approx([1, 0], abs=1e-4)
    assert (out["image"].mean(), out["image"].std()) == pytest.approx((0, 1), abs=1e-4)


def test_steps_see_what_the_steps_before_them_made():
    features = some(1000)
    both = [Step(step="standardise"), Step(step="min_max", columns=["image"])]
    out = fit(both, [moments(features)], SCHEMA).apply(features, SCHEMA)
    assert (out["image"].min(), out["image"].max()) == pytest.approx((0, 1), abs=1e-5)
    assert out["features"][:, 0].std() == pytest.approx(1, abs=1e-4)


def test_the_state_is_json_and_answers_to_the_bit():
    features = some(100)
    state = fit([Step(step="standardise")], [moments(features)], SCHEMA)
    again = Preprocessing.model_validate_json(state.model_dump_json())
    for name, values in state.apply(features, SCHEMA).items():
        assert np.array_equal(values, again.apply(features, SCHEMA)[name])
