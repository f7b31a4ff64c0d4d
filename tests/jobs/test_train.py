"""Two workers train what one trains."""

import json
import shutil
from dataclasses import replace

import pytest
from heliograph.cluster.keys import DATA_KEY, KeyStore
from heliograph.jobs.prepare import prepare
from heliograph.jobs.train import Job, train
from heliograph.project import Data, Model, Optimizer, Split, Train

from ..conftest import ROOT


@pytest.fixture(scope="module")
def job(cluster, tmp_path_factory) -> Job:
    """The digits, prepared and sealed; the example's model without its dropout, whose masks depend on the batch's shape."""
    folder = tmp_path_factory.mktemp("train")
    keys = KeyStore(folder / "keys")
    keys.secret(DATA_KEY, create=True)
    (folder / "prepared").mkdir()
    prepare(Data(source="sklearn://digits", target="target"), folder, keys, folder / "prepared", lambda *_: None)
    return Job(
        train=Train(epochs=3, batch_size=64, workers=1, optimizer=Optimizer(learning_rate=0.002)),
        model=Model(hp={"filters": 8, "units": 32, "dropout": 0.0}),
        project=ROOT / "examples" / "digits",
        prepared=folder / "prepared",
        keys=keys,
        folder=folder,
    )


def trained(job: Job, folder, workers: int, epochs: int = 3) -> list[dict]:
    folder.mkdir(exist_ok=True)
    settings = job.train.model_copy(update={"workers": workers, "epochs": epochs})
    train(replace(job, train=settings, folder=folder), lambda *_: None)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory) -> list[dict]:
    return trained(job, tmp_path_factory.mktemp("alone") / "run", 1)


def test_two_workers_train_what_one_worker_trains(job, alone, tmp_path):
    together = trained(job, tmp_path / "run", 2)
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    for two, one in zip(together, alone, strict=True):
        assert two["workers"] == 2
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(set(result["weights_sha256"])) == 1
    assert result["onnx_gap"] < 1e-5


def test_layers_that_keep_statistics_end_equal_on_all_ranks(job, tmp_path):
    (tmp_path / "model.py").write_text(
        """\
import keras
from keras import layers


def build(schema, hp):
    image = keras.Input(schema.input_shape)
    x = layers.Dense(16, use_bias=False, kernel_regularizer="l2")(layers.Flatten()(image))
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Dropout(0.2)(x)
    return keras.Model(image, layers.Dense(schema.outputs, activation="softmax")(x))
"""
    )
    lines = trained(replace(job, project=tmp_path), tmp_path / "run", 2)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(set(result["weights_sha256"])) == 1
    # The validation used the statistics that were averaged; it has no dropout, so it must be the better one.
    assert lines[-1]["val_accuracy"] > lines[-1]["accuracy"] > 0.4, lines


def test_a_regression_without_validation_rows_trains_and_exports(job, tmp_path):
    (tmp_path / "model.py").write_text(
        """\
import keras


def build(schema, hp):
    inputs = keras.Input(schema.input_shape)
    return keras.Model(inputs, keras.layers.Dense(schema.outputs)(inputs))
"""
    )
    (tmp_path / "prepared").mkdir()
    data = Data(source="sklearn://diabetes", target="target", split=Split(validation=0.0, test=0.2))
    prepare(data, tmp_path, job.keys, tmp_path / "prepared", lambda *_: None)
    settings = job.train.model_copy(update={"optimizer": Optimizer(learning_rate=0.5)})
    lines = trained(replace(job, project=tmp_path, prepared=tmp_path / "prepared", train=settings), tmp_path / "run", 1)
    assert lines[-1]["mae"] < lines[0]["mae"]
    assert not any(name.startswith("val_") for name in lines[-1])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["onnx_gap"] < 1e-2


def test_training_goes_on_from_the_last_whole_checkpoint(job, alone, tmp_path):
    folder = tmp_path / "run"
    trained(job, folder, 1, epochs=2)
    checkpoints = folder / "checkpoints"
    assert sorted(c.name for c in checkpoints.iterdir()) == ["epoch-00001", "epoch-00002"]
    # A damaged newest checkpoint is passed over, and so is one that was never published.
    state = checkpoints / "epoch-00002" / "state.npz"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    shutil.copytree(checkpoints / "epoch-00001", checkpoints / ".epoch-00003.part")
    lines = trained(job, folder, 1)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=1e-3)
    assert lines[-1]["val_loss"] == pytest.approx(alone[-1]["val_loss"], rel=1e-3)
