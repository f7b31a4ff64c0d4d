"""Figures are scikit-learn's, however the rows are divided, and intervals cover what they should."""

import functools
import itertools

import numpy as np
import pytest
from heliograph.datasets.schema import Feature, Schema
from heliograph.jobs import figures as f
from sklearn import metrics


def schema(classes: int) -> Schema:
    task = "classification" if classes else "regression"
    return Schema(task=task, target="t", classes=tuple(range(classes)), features=(Feature(name="x"),))


def drawn(rows: int, classes: int, seed: int, coarse: bool = False):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, rows)
    logits = rng.normal(size=(rows, classes)) + 1.2 * np.eye(classes)[target]
    if coarse:  # many equal scores
        logits = np.round(logits)
    outputs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return target, outputs.astype(np.float32)


@pytest.mark.parametrize(("classes", "coarse"), [(2, False), (2, True), (3, False), (7, True)])
def test_figures_of_shards_are_scikit_learns_of_all_rows(classes, coarse):
    target, outputs = drawn(3000, classes, classes, coarse)
    cuts = [0, 11, 700, 701, 2400, 3000]
    states = [f.Classified.of(target[a:b], outputs[a:b]) for a, b in itertools.pairwise(cuts)]
    found = functools.reduce(f.Classified.merge, states).figures(schema(classes))
    guess, wide = outputs.argmax(axis=1), outputs.astype(np.float64)
    hot = np.eye(classes)[target]
    expected = {
        "accuracy": metrics.accuracy_score(target, guess),
        "balanced_accuracy": metrics.balanced_accuracy_score(target, guess),
        "mcc": metrics.matthews_corrcoef(target, guess),
        "log_loss": metrics.log_loss(target, wide),
        "roc_auc": np.mean([metrics.roc_auc_score(hot[:, c], outputs[:, c]) for c in range(classes)])
        if classes > 2
        else metrics.roc_auc_score(target, outputs[:, 1]),
        "average_precision": np.mean([metrics.average_precision_score(hot[:, c], outputs[:, c]) for c in range(classes)])
        if classes > 2
        else metrics.average_precision_score(target, outputs[:, 1]),
    }
    if classes > 3:
        expected["top_3"] = metrics.top_k_accuracy_score(target, outputs, k=3)
        expected["top_5"] = metrics.top_k_accuracy_score(target, outputs, k=5)
    if classes == 2:
        expected["brier"] = metrics.brier_score_loss(target, wide[:, 1])
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12, rel=1e-12), name
    for average in ("macro", "weighted", "micro"):
        each = metrics.precision_recall_fscore_support(target, guess, average=average, zero_division=0)[:3]
        assert list(found[average].values()) == pytest.approx(list(each), abs=1e-12)
    assert found["confusion"] == metrics.confusion_matrix(target, guess).tolist()
    assert sum(b["rows"] for b in found["calibration"]) == 3000
    gap = sum(b["rows"] * abs(b["confidence"] - b["accuracy"]) for b in found["calibration"]) / 3000
    assert found["ece"] == pytest.approx(gap, abs=1e-12)


def test_areas_of_runs_in_files_read_piece_by_piece_are_the_same(tmp_path, monkeypatch):
    target, outputs = drawn(5000, 2, 1)
    outputs[:2000] = outputs[0]  # a score that no piece can divide
    whole = f.Classified.of(target, outputs).figures(schema(2))
    parts = [f.Classified.of(target[a::3], outputs[a::3]) for a in range(3)]
    for i, part in enumerate(parts):
        part.spill(tmp_path, str(i))
    monkeypatch.setattr(f, "RANGE", 300)
    found = functools.reduce(f.Classified.merge, parts).figures(schema(2))
    assert found["roc_auc"] == pytest.approx(whole["roc_auc"], abs=1e-14)
    assert found["average_precision"] == pytest.approx(whole["average_precision"], abs=1e-12)
    drawn_ = found["curves"][0]
    assert np.all(np.diff(drawn_["recall"]) >= 0)
    assert drawn_["recall"][-1] == drawn_["false_positive_rate"][-1] == 1.0


def test_regression_is_scikit_learns():
    rng = np.random.default_rng(0)
    y = rng.normal(1e6, 1, 999)
    outputs = (y + rng.normal(0, 0.5, 999))[:, None].astype(np.float32)
    parts = [f.Regressed.of(y[a::4], outputs[a::4]) for a in range(4)]
    found = functools.reduce(f.Regressed.merge, parts).figures(schema(0))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(y, outputs[:, 0]), rel=1e-12)
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(y, outputs[:, 0]), rel=1e-12)
    assert found["r2"] == pytest.approx(metrics.r2_score(y, outputs[:, 0]), abs=1e-9)


def test_a_class_without_rows_and_a_single_row_have_figures():
    found = f.figures(np.array([1, 1, 1]), np.array([[0.2, 0.8, 0]] * 3, np.float32), schema(3))
    assert found["accuracy"] == found["balanced_accuracy"] == 1.0
    assert found["roc_auc"] is None
    assert found["classes"][0]["rows"] == 0
    assert f.figures(np.array([1.0]), np.array([[2.0]], np.float32), schema(0))["r2"] is None


def test_weighted_figures_with_weight_one_are_the_figures():
    for classes, coarse in ((2, True), (6, False)):
        target, outputs = drawn(800, classes, 3, coarse)
        plain = f.figures(target, outputs, schema(classes))
        ones = f.weighted(target, outputs, schema(classes))(np.ones((1, 800), np.float32))
        for name, value in ones.items():
            assert float(value[0]) == pytest.approx(plain[name], rel=1e-5), name


def test_intervals_cover_the_truth_and_those_of_a_part_are_as_wide():
    def hits(rows: int, kept: int) -> tuple[float, float]:
        inside, widths = 0, []
        for seed in range(60):
            target, outputs = drawn(rows, 2, 1000 + seed)
            estimate = f.figures(target, outputs, schema(2))
            found = f.intervals(estimate, target[:kept], outputs[:kept], schema(2), rows, 200, 0.95, seed)
            low, high = found["roc_auc"]
            inside += low <= truth <= high
            widths.append(high - low)
        return inside / 60, float(np.mean(widths))

    truth = f.figures(*drawn(400_000, 2, 5), schema(2))["roc_auc"]
    share, width = hits(1000, 1000)
    assert share >= 0.85
    share_of_part, width_of_part = hits(1000, 400)
    assert share_of_part >= 0.85
    assert width_of_part == pytest.approx(width, rel=0.1)


def test_weights_are_poisson():
    every = np.concatenate(list(f.draws(50_000, 20, 0)))
    assert every.mean() == pytest.approx(1, abs=0.01)
    assert every.var() == pytest.approx(1, abs=0.02)
