"""Two workers train what one trains."""

import base64
import json
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from heliograph.cluster.keys import DATA_KEY, KeyStore
from heliograph.datasets.ingest import Part
from heliograph.datasets.schema import parse_instances
from heliograph.datasets.shards import Manifest
from heliograph.jobs.engine import Engine
from heliograph.jobs.prepare import prepare
from heliograph.jobs.train import train
from heliograph.jobs.watch import EVENTS, METRICS, STEPS, read_lines
from heliograph.jobs.worker import STOP_FILE, Job
from heliograph.project import Augment, Checkpoint, Data, Model, Optimizer, Schedule, Split, Stop, Train, Watch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..conftest import ROOT


@pytest.fixture(scope="module")
def job(cluster, tmp_path_factory) -> Job:
    """The digits, prepared and sealed; the example's model without its dropout, whose masks depend on the batch's shape."""
    folder = tmp_path_factory.mktemp("train")
    keys = KeyStore(folder / "keys")
    keys.rotate(DATA_KEY)
    (folder / "prepared").mkdir()
    prepare(Data(source="sklearn://digits", target="target"), folder, keys, folder / "prepared", lambda *_: None)
    return Job(
        name="digits",
        train=Train(epochs=3, batch_size=64, workers=1, optimizer=Optimizer(learning_rate=0.002)),
        model=Model(hp={"filters": 8, "units": 32, "dropout": 0.0}),
        project=ROOT / "examples" / "digits",
        prepared=folder / "prepared",
        keys=keys,
        folder=folder,
    )


def trained(job: Job, folder, workers: int, **settings) -> list[dict]:
    """The figures of each epoch."""
    folder.mkdir(exist_ok=True)
    settings = job.train.model_copy(update={"workers": workers, **settings})
    train(replace(job, train=settings, folder=folder), lambda *_: None, lambda _: None)
    return read_lines(folder / METRICS)


def interrupted(job: Job, folder) -> None:
    """Ask for an end as Ctrl-C does, as soon as there are workers: after a step, a checkpoint follows the next one."""
    begun = len(read_lines(folder / EVENTS))

    def stop() -> None:
        while len(read_lines(folder / EVENTS)) == begun:
            time.sleep(0.02)
        (folder / STOP_FILE).touch()

    threading.Thread(target=stop, daemon=True).start()
    trained(job, folder, 1)
    assert not (folder / "result.json").exists()


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


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


def test_augmented_rows_are_the_same_on_two_workers_and_after_an_interruption(job, alone, tmp_path):
    varied = replace(job, augment=Augment(rotate=10, translate=0.1, contrast=0.2, mixup=0.3))
    one = trained(varied, tmp_path / "one", 1)
    assert one[0]["loss"] > 1.05 * alone[0]["loss"]  # harder than what does not vary
    interrupted(varied, tmp_path / "two")
    two = trained(varied, tmp_path / "two", 2)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2e-3)


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


def test_training_goes_on_from_the_last_whole_checkpoint_in_the_middle_of_an_epoch(job, alone, tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):
        interrupted(job, folder)
    checkpoints = folder / "checkpoints"
    assert sorted(c.name for c in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    # A damaged newest checkpoint is passed over, and so is one that was never published.
    state = checkpoints / "step-00000004" / "state.npz"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    shutil.copytree(checkpoints / "step-00000002", checkpoints / ".step-00000069.part")
    lines = trained(job, folder, 1)
    events = read_lines(folder / EVENTS)
    assert [event["step"] for event in events] == [0, 2, 2, 2]
    assert "step-00000004: passed over" in events[3]["text"]
    assert [line["step"] for line in lines] == [23, 46, 69]
    for line, undisturbed in zip(lines, alone, strict=True):
        for figure in ("loss", "accuracy", "val_loss", "val_accuracy"):
            assert line[figure] == pytest.approx(undisturbed[figure], rel=1e-3)
    keys = [line["step"] for line in read_lines(folder / STEPS)]
    assert keys == sorted(set(keys))
    assert sum(line["steps"] for line in read_lines(folder / STEPS)) == 69


def test_every_way_to_cut_a_step_is_the_same_step(job, tmp_path, monkeypatch):
    """Clipped by the global norm, smoothed, weighted and scheduled; as one piece, as pieces, mirrored, on two workers."""
    strategy = {
        "optimizer": Optimizer(learning_rate=0.004, global_clipnorm=0.5),
        "schedule": Schedule(name="CosineDecay", warmup=10),
        "label_smoothing": 0.1,
        "class_weights": {"3": 2.0, "8": 0.5},
        "stop": Stop(steps=40),
    }
    whole = trained(job, tmp_path / "whole", 1, **strategy)
    rates = {line["step"]: line["learning_rate"] for line in read_lines(tmp_path / "whole" / STEPS)}
    assert rates[1] == pytest.approx(0.0004)
    assert rates[40] < 0.0002
    runs = {"pieces": (1, {"accumulate": 3, "xla": True}), "workers": (2, {"accumulate": 2})}
    found = {name: trained(job, tmp_path / name, workers, **strategy, **more) for name, (workers, more) in runs.items()}
    monkeypatch.setenv("HELIOGRAPH_LOGICAL_DEVICES", "2")
    found["mirrored"] = trained(job, tmp_path / "mirrored", 1, **strategy)
    for name, lines in found.items():
        for line, one in zip(lines, whole, strict=True):
            for figure in ("loss", "accuracy", "val_loss"):
                assert line[figure] == pytest.approx(one[figure], rel=2e-3), (name, figure)


def test_half_precision_with_a_moving_average_trains_and_exports_what_was_best(job, tmp_path):
    lines = trained(job, tmp_path / "run", 1, precision="mixed_float16", ema=0.9, export="best", metrics=["accuracy"])
    assert lines[-1]["val_accuracy"] > 0.85
    assert result(tmp_path / "run")["onnx_gap"] < 1e-5


NORMED = """\
import keras
from keras import layers


def build(schema, hp):
    image = keras.Input(schema.input_shape, name="image")
    x = layers.Dense(16, use_bias=False, name="inner")(layers.Flatten()(image))
    x = layers.BatchNormalization(name="norm")(x)
    return keras.Model(image, layers.Dense(schema.outputs, activation="softmax", name="out")(x))
"""


def test_the_mean_of_the_last_epochs_is_exported_with_statistics_of_its_own(job, tmp_path):
    import keras

    (tmp_path / "model.py").write_text(NORMED)
    normed = replace(job, project=tmp_path, model=Model())
    trained(normed, tmp_path / "swa", 1, epochs=4, swa=2, checkpoint=Checkpoint(keep=4))
    model = keras.saving.load_model(tmp_path / "swa" / "model.keras", compile=False)
    ends = [np.load(place / "state.npz") for place in sorted((tmp_path / "swa" / "checkpoints").glob("step-*"))]
    assert len(ends) == 4
    for name in ("inner", "out"):
        kernel = model.get_layer(name).get_weights()[0]
        every = [next(v for v in end.values() if v.shape == kernel.shape) for end in ends]
        np.testing.assert_allclose(kernel, np.mean(every[1:], axis=0), atol=1e-6)
    part = Part(job.prepared, Manifest.read(job.prepared), "train", job.keys, 0, 1, 64, None)
    image = np.concatenate([part.read_window(w, 1)["image"] for w in range(part.windows)])
    found = image.reshape(len(image), -1) @ model.get_layer("inner").get_weights()[0]
    _, _, mean, variance = model.get_layer("norm").get_weights()
    np.testing.assert_allclose(mean, found.mean(axis=0), atol=0.05 * found.std())
    np.testing.assert_allclose(variance, found.var(axis=0), rtol=0.1)


def test_training_stops_when_it_is_told_to(job, tmp_path):
    watched = Watch(profile=10, histograms=True)
    lines = trained(job, tmp_path / "when", 1, epochs=50, stop=Stop(when="val_accuracy >= 0.85"), watch=watched)
    board = tmp_path / "when" / "tensorboard"
    assert list(board.glob("plugins/profile/*/*.xplane.pb")), "the profile that was asked for"
    events = EventAccumulator(str(board), size_guidance={"tensors": 0}).Reload()
    assert events.Graph().node
    assert any(tag.endswith("kernel") for tag in events.Tags()["tensors"])
    assert lines[-1]["val_accuracy"] >= 0.85
    assert result(tmp_path / "when")["stopped"].startswith("val_accuracy is 0.")
    schedule = Schedule(name="ReduceLROnPlateau", patience=1, factor=0.5, min_delta=10.0)
    lines = trained(job, tmp_path / "patience", 1, epochs=50, schedule=schedule, stop=Stop(patience=3, min_delta=10.0))
    assert len(lines) == 4, "the first epoch is always better than nothing; three more are not better by 10"
    assert read_lines(tmp_path / "patience" / STEPS)[-1]["learning_rate"] == pytest.approx(0.002 * 0.5**2)


THREE_INPUTS = """
import keras
from keras import layers


def build(schema, hp):
    given = {name: keras.Input(shape, name=name) for name, shape in schema.inputs.items()}
    words = layers.GlobalAveragePooling1D()(layers.Embedding(50, 8)(given["note"]))
    seen = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, activation="relu")(given["file"]))
    x = layers.Concatenate()([given["features"], words, seen])
    return keras.Model(given, layers.Dense(schema.outputs, activation="softmax")(layers.Dense(16, activation="relu")(x)))
"""


def test_numbers_words_and_images_are_inputs_of_one_model(cluster, tmp_path):
    """From a table with paths of images, to two workers, to the engine that answers a request."""
    rng = np.random.default_rng(0)
    lines = ["size,note,file,w,kind"]
    for i in range(160):
        Image.new("RGB", (12, 12), (40 + 150 * (i % 2), 90, 10)).save(tmp_path / f"{i}.png")
        lines.append(f"{rng.normal():.3f},{'a red one' if i % 4 < 2 else 'some blue thing'},{i}.png,{1 + i % 3},{'xyzx'[i % 4]}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "model.py").write_text(THREE_INPUTS)
    data = Data.model_validate(
        {
            "source": "t.csv", "target": "kind", "weight": "w", "types": {"file": "image"}, "encrypt": False, "shards": 2,
            "preprocess": [
                {"step": "standardise"}, {"step": "tokenise", "length": 4}, {"step": "resize", "height": 8, "width": 8}
            ],
        }
    )  # fmt: skip
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    prepare(data, tmp_path, None, prepared, lambda *_: None)
    settings = Train(epochs=30, batch_size=16, workers=2, optimizer=Optimizer(learning_rate=0.02))
    job = Job("three", settings, Model(), tmp_path, prepared, None, tmp_path / "run", Augment(noise=0.1, flip="both", mixup=0.1))
    job.folder.mkdir()
    train(job, lambda *_: None, lambda _: None)
    assert result(job.folder)["onnx_gap"] < 1e-4
    assert read_lines(job.folder / METRICS)[-1]["val_accuracy"] > 0.9
    engine = Engine(job.folder, prepared)
    with (tmp_path / "1.png").open("rb") as photo:
        asked = {"size": 0.1, "note": "a red one", "file": {"b64": base64.b64encode(photo.read()).decode()}}
    answer = engine.predict(parse_instances([asked], engine.schema))[0]
    assert engine.schema.classes[int(answer.argmax())] == "y"
