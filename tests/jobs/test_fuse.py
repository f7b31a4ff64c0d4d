"""Fusion: models become one bundle, chosen by rows that none was trained on; weights are averaged where there is one ancestor."""

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from heliograph.cluster.keys import KeyStore
from heliograph.datasets.schema import Feature, Schema
from heliograph.errors import ModelError, ProjectError
from heliograph.jobs import fuse
from heliograph.jobs.engine import Engine
from heliograph.jobs.export import sample
from heliograph.jobs.stages import Run

from ..conftest import executed

FILE = """\
name: spots
data: {{source: "made:rows", target: kind, split: {{validation: {validation}, test: 0.2}}, shards: 2}}
model: {{{model}}}
train: {{epochs: {epochs}, batch_size: 16, seed: {seed}, optimizer: {{name: adam, learning_rate: 0.005}}}}
keys: ../keys
registry: ../registry
"""
MADE = '''\
import numpy as np
import ray.data


def rows():
    """Pictures of 8×8 with a weak bright spot, of three kinds by where it is."""
    draw = np.random.default_rng(1)
    kinds = draw.integers(0, {classes}, 400)
    images = draw.normal(0, 0.6, (400, 8, 8)).astype(np.float32)
    for image, kind in zip(images, kinds):
        image[2 * kind : 2 * kind + 2] += 0.5
    return ray.data.from_items([{{"image": image, "kind": int(kind)}} for image, kind in zip(images, kinds)])
'''
MODEL = """\
import keras
from keras import layers


def build(schema, hp):
    image = keras.Input(schema.input_shape, name="image")
    x = layers.Flatten()(image)
    x = layers.Dense(12, activation="relu", name="hidden")(x)
    return keras.Model(image, layers.Dense(schema.outputs, activation="softmax", name="out")(x))
"""


def ran(folder: Path, cluster, model: str, seed: int = 0, epochs: int = 3, validation: float = 0.3, classes: int = 3) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "made.py").write_text(MADE.format(classes=classes))
    (folder / "model.py").write_text(MODEL)
    (folder / "heliograph.yaml").write_text(FILE.format(model=model, seed=seed, epochs=epochs, validation=validation))
    return executed(folder, cluster)


@pytest.fixture(scope="module")
def place(tmp_path_factory, cluster) -> Path:
    """Where two independent models are (`spots@1`, `@2`), and two that went on from the first of them (`@3`, `@4`)."""
    root = tmp_path_factory.mktemp("fuse")
    for seed in (0, 1):
        ran(root / "members", cluster, "", seed)
    for seed in (2, 3):
        ran(root / "members", cluster, "start: {model: spots@1, keep_head: true}", seed, epochs=2)
    return root


def fused(place: Path, cluster, members: str, by: str) -> Run:
    return ran(place / by, cluster, f"fuse: {{members: [{members}], by: {by}}}")


def answers(run: Run, name: str = "bundle") -> np.ndarray:
    keys = KeyStore(run.folder.parent.parent.parent / "keys")
    return Engine(run[name], run["prepare"], keys=keys).forward(sample(run["prepare"], keys, "validation", 40)[0])


def of(place: Path, run: Run, version: int) -> np.ndarray:
    keys = KeyStore(place / "keys")
    bundle = place / "registry" / "spots" / str(version)
    return Engine(bundle, bundle, keys=keys).forward(sample(run["prepare"], keys, "validation", 40)[0])


def test_answers_are_averaged_weighted_and_stacked_in_one_bundle(place, cluster):
    run = fused(place, cluster, "spots@1, spots@2", "mean")
    expected = np.mean([of(place, run, version) for version in (1, 2)], axis=0)
    np.testing.assert_allclose(answers(run), expected, atol=1e-5)
    assert {"model.onnx", "model.tflite", "model.keras", "metrics.json"} <= {p.name for p in run["bundle"].iterdir()}
    lineage = json.loads((run["bundle"] / "bundle.json").read_text())["lineage"]
    assert lineage["fusion"]["members"] == ["spots@1", "spots@2"]
    assert "ancestor" not in lineage
    weighted = fused(place, cluster, "spots@1, spots@2", "weighted")
    said = json.loads((weighted["train"] / "result.json").read_text())["fusion"]
    assert sum(said["weights"]) == pytest.approx(1, abs=0.001)
    expected = np.tensordot(said["weights"], [of(place, run, version) for version in (1, 2)], 1)
    np.testing.assert_allclose(answers(weighted), expected, atol=1e-3)
    stacked = fused(place, cluster, "spots@1, spots@2", "stacking")
    said = json.loads((stacked["train"] / "result.json").read_text())["fusion"]
    assert said["out_of_fold"] > 0.6
    np.testing.assert_allclose(answers(stacked).sum(1), 1, atol=1e-5)
    last = keras.saving.load_model(stacked["bundle"] / "model.keras", compile=False).get_layer("fused")
    assert last.weights[0].shape == (6, 3)


def test_weights_are_averaged_where_there_is_one_ancestor_and_nowhere_else(place, cluster):
    run = fused(place, cluster, "spots@3, spots@4", "soup")
    models = [keras.saving.load_model(place / "registry" / "spots" / v / "model.keras", compile=False) for v in ("3", "4")]
    made = keras.saving.load_model(run["bundle"] / "model.keras", compile=False)
    for own, *theirs in zip(made.get_weights(), *(m.get_weights() for m in models), strict=True):
        np.testing.assert_allclose(own, np.mean(theirs, axis=0), atol=1e-6)
    lineage = json.loads((run["bundle"] / "bundle.json").read_text())["lineage"]
    member = json.loads((place / "registry" / "spots" / "3" / "bundle.json").read_text())["lineage"]
    assert lineage["ancestor"] == member["ancestor"]
    greedy = fused(place, cluster, "spots@3, spots@4", "greedy_soup")
    said = json.loads((greedy["train"] / "result.json").read_text())["fusion"]
    assert said["fused"] >= max(said["validation"])
    assert said["taken"][0] == f"spots@{3 + int(np.argmax(said['validation']))}"
    with pytest.raises(ModelError, match=r"by: soup: model.fuse.members\[0\]: spots@1: its bundle names no ancestor"):
        fused(place, cluster, "spots@1, spots@2", "soup")


def test_every_mistake_is_a_line(place, cluster):
    bundle, other = place / "registry" / "spots" / "1", place / "other"
    shutil.copytree(bundle, other)
    member = "spots@1, ../other"
    (other / "schema.json").write_text((bundle / "schema.json").read_text().replace("[\n  0,\n  1,\n  2\n ]", "[0, 1]"))
    with pytest.raises(ModelError, match=r"members\[1\]: ../other: answers 2 classes .* of this project is 3 classes"):
        fused(place, cluster, member, "mean")
    shutil.copyfile(bundle / "schema.json", other / "schema.json")
    (other / "bundle.json").write_text((bundle / "bundle.json").read_text().replace('"data": "', '"data": "0'))
    with pytest.raises(ModelError, match=r"members\[1\]: ../other: was trained on other data or another split, maybe on rows"):
        fused(place, cluster, member, "weighted")
    with pytest.raises(ModelError, match="was trained on inputs that were prepared otherwise"):
        ran(place / "weighted", cluster, "fuse: {members: [spots@1, spots@2], by: weighted}", validation=0.25)
    with pytest.raises(ModelError, match="weighted chooses by validation rows"):
        ran(place / "weighted", cluster, "fuse: {members: [spots@1, spots@2], by: weighted}", validation=0.0)
    with pytest.raises(ModelError, match=r"model.fuse.members\[1\]: `spots@99`: spots has the versions 1, 2, 3"):
        fused(place, cluster, "spots@1, spots@99", "mean")
    for model, said in (
        ("fuse: {members: [spots@1]}", "model.fuse.members"),
        ("fuse: {members: [a, b]}, start: {model: c}", "write `start` or `fuse`"),
        ("start: {model: c, head: d, keep_head: true}", "keep_head replaces none"),
    ):
        with pytest.raises(ProjectError) as caught:
            ran(place / "bad", cluster, model)
        assert said in str(caught.value)


# The parts


def schema(classes: int) -> Schema:
    feature = Feature(name="x", kind="tensor", shape=(4,))
    labels = tuple(range(classes))
    task = "classification" if classes else "regression"
    return Schema(task=task, target="y", classes=labels, features=(feature,), inputs={"x": (4,)})


def test_weights_find_the_member_that_is_right():
    draw = np.random.default_rng(0)
    target = draw.integers(0, 3, 300)
    right = np.eye(3)[target] * 0.7 + 0.1
    wrong = draw.dirichlet([1, 1, 1], 300)
    found = fuse._best_weights(target, [wrong, right], schema(3))
    assert found[1] > 0.9
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()
    values = draw.normal(size=300).astype(np.float32)
    noisy = [(values + draw.normal(0, s, 300))[:, None] for s in (0.1, 0.2)]
    found = fuse._best_weights(values, noisy, schema(0))
    assert found[0] == pytest.approx(0.8, abs=0.1)  # by the inverse of the variances


@pytest.mark.parametrize("classes", [0, 2, 3])
def test_a_stacked_layer_computes_what_was_fitted(classes):
    keras.utils.set_random_seed(0)
    draw = np.random.default_rng(0)
    width = classes or 1
    activation = "softmax" if classes else None
    models = [keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(width, activation=activation)]) for _ in range(2)]
    rows = draw.normal(size=(200, 4)).astype(np.float32)
    target = (rows[:, 0] > 0).astype(int) + (rows[:, 1] > 0) * (classes == 3) if classes else rows[:, 0]
    outputs = [m(rows).numpy() for m in models]
    made, quality = fuse._stacked(models, target, outputs, schema(classes))
    kernel, bias, _ = fuse._meta_learner(np.concatenate(outputs, axis=1), target, schema(classes))
    logits = np.concatenate(outputs, axis=1) @ kernel + bias
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) if classes else logits
    np.testing.assert_allclose(made(rows), expected, atol=1e-5)
    if classes:
        from sklearn.linear_model import LogisticRegression

        own = [LogisticRegression(C=1 / p, max_iter=1000).fit(np.concatenate(outputs, axis=1), target) for p in fuse.PENALTIES]
        gaps = [np.abs(o.predict_proba(np.concatenate(outputs, axis=1)) - expected).max() for o in own]
        assert min(gaps) < 1e-5  # it is one of these
    assert quality > (0.3 if classes else -1)
    with pytest.raises(ModelError, match="stacking needs more validation rows"):
        fuse._meta_learner(np.ones((3, 2 * width)), target[:3], schema(classes))


def test_independent_weights_average_to_nothing_and_greedy_leaves_them_out():
    keras.utils.set_random_seed(0)
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(400, 4)).astype(np.float32)
    target = (rows[:, 0] > 0).astype(int) + (rows[:, 1] > 0)
    models = []
    for _ in range(3):
        layers = [
            keras.Input((4,), name="x"),
            keras.layers.Dense(6, activation="relu"),
            keras.layers.Dense(3, activation="softmax"),
        ]
        models.append(keras.Sequential(layers))
        models[-1].compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
        models[-1].fit(rows, target, epochs=8, verbose=0)
    single = [fuse._quality(target, m(rows).numpy(), schema(3)) for m in models]
    order = [int(i) for i in np.argsort(single)[::-1]]
    before = [m.get_weights() for m in models]
    taken = fuse._helpful(models, order, {"x": rows}, target, schema(3))
    for model, weights in zip(models, before, strict=True):
        for a, b in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(a, b)
    assert taken == order[:1]
    soup = fuse._souped(models, [0, 1, 2])
    assert fuse._quality(target, soup(rows).numpy(), schema(3)) < min(single) - 0.1
