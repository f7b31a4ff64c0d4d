"""Several targets: one model for all, losses of the rows that have them, figures and outputs by name."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from heliograph import project
from heliograph.cluster.keys import KeyStore
from heliograph.datasets.schema import Feature, Schema, Task, prediction_columns
from heliograph.datasets.shards import Manifest
from heliograph.errors import DataError, ModelError, ProjectError
from heliograph.jobs import tasks
from heliograph.jobs.engine import Engine
from heliograph.jobs.export import sample, saved_model
from heliograph.jobs.watch import METRICS, read_lines

from ..conftest import executed

FILE = """\
name: spots
data: {{source: "made:rows", target: {target}, split: {{validation: 0.2, test: 0.2}}, shards: 2}}
train: {{epochs: 12, batch_size: 32, {train}optimizer: {{name: adam, learning_rate: 0.01}}}}
"""
MADE = '''\
import numpy as np
import pandas as pd
import ray.data


def rows():
    """Pictures of 8×8 with a spot, of three kinds by where it is, and how bright it is; each is known of two rows in three."""
    draw = np.random.default_rng(1)
    kinds, light = draw.integers(0, 3, 600), draw.uniform(1, 3, 600)
    images = draw.normal(0, 0.2, (600, 8, 8)).astype(np.float32)
    for image, kind, bright in zip(images, kinds, light):
        image[2 * kind : 2 * kind + 2] += bright
    names = np.array(["top", "middle", "bottom"], object)[kinds]
    names[::3], light[1::3] = None, np.nan
    return ray.data.from_pandas(pd.DataFrame({"image": list(images), "kind": names, "light": light}))
'''
MODEL = """\
import keras
from keras import layers


def build(schema, hp):
    image = keras.Input(schema.input_shape, name="image")
    x = layers.Dense(24, activation="relu")(layers.Flatten()(image))
    return keras.Model(image, {"light": layers.Dense(1)(x), "kind": layers.Dense(3, activation="softmax")(x)})
"""


def written(folder: Path, target: str = "[kind, light]", train: str = "", model: str = MODEL) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "made.py").write_text(MADE)
    (folder / "model.py").write_text(model)
    (folder / "heliograph.yaml").write_text(FILE.format(target=target, train=train))
    return folder


SCHEMA = Schema(
    task="several", target="kind, light", features=(Feature(name="x", kind="tensor", shape=(4,)),), inputs={"x": (4,)},
    tasks=(Task(name="kind", classes=("a", "b")), Task(name="light")),
)  # fmt: skip


def test_a_model_of_two_targets_is_trained_judged_and_taken_out_by_name(tmp_path, cluster):
    train = "balance: uncertainty, tasks: {light: {loss: huber, metrics: [mae, mse]}}, "
    run = executed(written(tmp_path / "spots", train=train), cluster)
    schema, manifest = Schema.read(run["prepare"]), Manifest.read(run["prepare"])
    assert [(t.name, t.classes) for t in schema.tasks] == [("kind", ("bottom", "middle", "top")), ("light", ())]
    assert sum(manifest.rows(split) for split in ("train", "validation", "test")) == 600
    share = np.array(manifest.lacking) / manifest.rows("train")
    np.testing.assert_allclose(share, 1 / 3, atol=0.08)
    last = read_lines(run["train"] / METRICS)[-1]
    assert {"val_kind_accuracy", "val_light_mae", "val_light_mse", "kind_weight", "light_weight"} <= last.keys()
    assert last["light_weight"] != pytest.approx(1, abs=0.01)  # it was learnt
    test = json.loads((run["evaluate"] / "metrics.json").read_text())
    assert test["tasks"]["kind"]["accuracy"] > 0.9
    assert test["tasks"]["light"]["mae"] < 0.25
    assert test["accuracy"] == test["tasks"]["kind"]["accuracy"]
    assert test["tasks"]["kind"]["rows"] < test["rows"]
    keys = KeyStore(run.folder / "keys")
    inputs, target = sample(run["prepare"], keys, "validation", 50)
    assert target.shape == (50, 2)
    outputs = Engine(run["bundle"], run["bundle"], keys=keys).forward(inputs)
    columns = prediction_columns(outputs, schema)
    assert list(columns) == ["kind prediction", "kind probabilities", "light prediction"]
    known = np.isfinite(target)
    right = np.array(schema.tasks[0].classes)[target[known[:, 0], 0].astype(int)]
    assert (np.array(columns["kind prediction"].to_pylist())[known[:, 0]] == right).mean() > 0.9
    model = keras.saving.load_model(run["bundle"] / "model.keras", compile=False)
    model(inputs["image"])
    assert saved_model(model, run["prepare"], keys, tmp_path / "saved") < 1e-5
    serve = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    answered = serve(image=tf.constant(inputs["image"]))
    np.testing.assert_allclose(answered["kind"], outputs[:, :3], atol=1e-5)
    np.testing.assert_allclose(answered["light"], outputs[:, 3:], atol=1e-5)


def test_a_loss_is_of_the_targets_that_a_row_has():
    target = np.array([[0, 2.0], [1, np.nan], [np.nan, -1.0], [np.nan, np.nan]], np.float32)
    outputs = np.array([[0.9, 0.1, 1.0], [0.2, 0.8, 5.0], [0.5, 0.5, 0.0], [0.5, 0.5, 9.0]], np.float32)
    each = [keras.losses.sparse_categorical_crossentropy, keras.losses.mean_squared_error]
    of_kind, of_light = -np.log([0.9, 0.8, 1, 1]), np.array([1.0, 0, 1.0, 0])
    plain = tasks.Losses(SCHEMA, each, [1.0, 0.5], [], False)
    np.testing.assert_allclose(plain(target, outputs), of_kind + 0.5 * of_light, rtol=1e-5, atol=1e-6)
    shared = tasks.Losses(SCHEMA, each, [1.0, 1.0], [0.5, 0.25], False)
    np.testing.assert_allclose(shared(target, outputs), 2 * of_kind + 4 * of_light, rtol=1e-5, atol=1e-6)
    learnt = tasks.Losses(SCHEMA, each, [1.0, 1.0], [], True)
    for variable, value in zip(learnt.variables, (0.3, -0.2), strict=True):
        variable.assign(value)
    has = np.isfinite(target)
    expected = np.exp(-0.3) * of_kind + 0.3 * has[:, 0] + np.exp(0.2) * of_light - 0.2 * has[:, 1]
    np.testing.assert_allclose(learnt(target, outputs), expected, rtol=1e-5, atol=1e-6)
    assert learnt.learned() == pytest.approx({"kind_weight": np.exp(-0.3), "light_weight": np.exp(0.2)})
    meter = tasks.Meter(keras.metrics.SparseCategoricalAccuracy("accuracy"), 0, SCHEMA)
    meter.update_state(tf.constant(target), tf.constant(outputs))
    assert (meter.name, float(meter.result())) == ("kind_accuracy", 1.0)


def test_outputs_are_joined_and_named_again():
    given = keras.Input((4,), name="x")
    model = keras.Model(
        given, {"light": keras.layers.Dense(1)(given), "kind": keras.layers.Dense(2, activation="softmax")(given)}
    )
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    together = tasks.joined(model, SCHEMA, "model.py: build")
    np.testing.assert_allclose(together(rows)[:, :2], model(rows)["kind"], atol=1e-6)
    again = tasks.named(together, SCHEMA)(rows)
    np.testing.assert_allclose(again["light"], model(rows)["light"], atol=1e-6)
    one = keras.Model(given, keras.layers.Dense(3)(given))
    with pytest.raises(ModelError, match="no output is called `kind`"):
        tasks.joined(one, SCHEMA, "model.py: build")
    wide = keras.Model(given, {"kind": keras.layers.Dense(3)(given), "light": keras.layers.Dense(1)(given)})
    with pytest.raises(
        ModelError, match=r"output `kind` is \(3,\) for a row, \(2,\) is needed: a probability for each of 2 classes"
    ):
        tasks.joined(wide, SCHEMA, "model.py: build")


def test_every_mistake_is_a_line(tmp_path, cluster):
    for target, train, said in (
        ("[kind]", "", "data.target"),
        ("[kind, kind]", "", "target names a column twice"),
        ("[kind, light]", "loss: huber, ", "write loss, metrics and weight of each under `train.tasks`"),
        ("[kind, light]", "tasks: {ligth: {weight: 2}}, ", "train.tasks: `ligth` is no target: there are kind, light"),
        ("kind", "balance: uncertainty, ", "train.tasks and train.balance are for several targets"),
    ):
        with pytest.raises(ProjectError) as caught:
            project.load(written(tmp_path / "bad", target, train))
        assert said in str(caught.value)
    with pytest.raises(DataError, match="has no column `colour`"):
        executed(written(tmp_path / "column", "[kind, colour]"), cluster)
    folder = written(tmp_path / "empty", "[kind, light]")
    (folder / "made.py").write_text(MADE.replace("light[1::3] = None, np.nan", "light[:] = None, np.nan"))
    with pytest.raises(DataError, match="`kind, light` all empty"):
        executed(folder, cluster)
