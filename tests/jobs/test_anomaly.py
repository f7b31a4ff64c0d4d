"""What the detector says of signals, and what a training does about it."""

import json

import numpy as np
import pytest
from heliograph.datasets.shards import Manifest
from heliograph.errors import RunError
from heliograph.jobs.anomaly import Detector
from heliograph.jobs.steps import FINITE, LOSS, NORM, OWN, RATE
from heliograph.jobs.watch import EVENTS, STEPS, read_lines

from . import traced
from .test_faults import job, run


def signals(steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A training that gets better, with the noise of its batches; two ranks' seconds."""
    rng = np.random.default_rng(seed)
    own = np.ones((steps, OWN), np.float32)
    own[:, LOSS] = (0.3 + 2 * np.exp(-np.arange(steps) / 150)) * np.exp(0.2 * rng.normal(size=steps))
    own[:, NORM] = 1.5 * np.exp(0.25 * rng.normal(size=steps))
    return own, 0.05 * np.exp(0.05 * rng.normal(size=(steps, 2)))


def test_a_sound_training_gives_no_alarm():
    for seed in range(4):
        assert Detector(2).see(0, *signals(2000, seed)) == []


@pytest.mark.parametrize(
    ("fault", "kind", "within"),
    [
        ("nan", "nan", 1),
        ("loss", "loss", 3),
        ("dead", "gradient", 5),
        ("vanished", "gradient", 5),
        ("rate", "rate", 1),
        ("slow", "time 1", 5),
    ],
)
def test_a_fault_is_named_soon_and_once(fault, kind, within):
    own, seconds = signals(620)
    if fault == "nan":
        own[600:, FINITE] = 0
    elif fault == "loss":
        own[600:, LOSS] *= 8
    elif fault == "dead":
        own[600:, NORM] *= 1e-5
    elif fault == "vanished":
        own[600:, [LOSS, NORM]] *= 1e-5
    elif fault == "rate":
        own[600:, RATE] *= 5
    else:
        seconds[600:, 1] *= 1.6
    found = Detector(2).see(0, own, seconds)
    assert len(found) == 1
    assert found[0].kind == kind
    assert 0 < found[0].step - 600 <= within
    assert found[0].serious == (fault != "slow")


POISON = """
import keras
import numpy as np
import tensorflow as tf


class Poison(keras.layers.Layer):
    \"\"\"Multiplies its rows once, in the step that it is told, if the learning rate is still what it was.\"\"\"

    def __init__(self, at, file, **kwargs):
        super().__init__(**kwargs)
        self.at, self.file, self.calls = at, file, 0

    def factor(self):
        self.calls += 1
        fault = self.at <= self.calls < self.at + 12
        return np.float32(-20.0 if fault else 1.0)

    def call(self, x, training=False):
        if training:
            x = x * tf.ensure_shape(tf.numpy_function(self.factor, [], tf.float32), ())
        return x


def build(schema, hp):
    inputs = keras.Input(schema.input_shape)
    x = Poison(hp.at, "")(inputs)
    x = keras.layers.Dense(8)(x[:, 1:])
    return keras.Model(inputs, keras.layers.Dense(schema.outputs, activation="softmax")(x))
"""


def poisoned(folder, on_anomaly: str):
    project = traced.project(folder, "1", epochs=8, pause=0, train=f"on_anomaly: {on_anomaly}", seconds=0.05)
    (project / "model.py").write_text(POISON.replace("hp.at", "101"))
    return job(project)


def test_a_training_that_is_told_to_stop_at_an_anomaly_says_at_which(cluster, tmp_path):
    given = poisoned(tmp_path / "project", "stop")
    with pytest.raises(Exception) as raised:
        run(given)
    assert "training stopped: the" in str(raised.value) and "train.on_anomaly is stop" in str(raised.value)
    anomaly = next(e for e in read_lines(given.folder / EVENTS) if e["kind"] == "anomaly")
    assert 101 <= anomaly["step"] <= 105
    steps = -(-Manifest.read(given.prepared).rows("train") // 16)
    assert f"epoch {(anomaly['step'] - 1) // steps + 1}, rows " in anomaly["text"]


def test_a_training_that_rolls_back_goes_on_from_before_with_a_smaller_rate(cluster, tmp_path):
    given = poisoned(tmp_path / "project", "rollback")
    from heliograph.jobs.train import train

    train(given, lambda *_: None, lambda _: None)
    events = [e for e in read_lines(given.folder / EVENTS) if e["kind"] in ("anomaly", "rollback")]
    assert [e["kind"] for e in events[:2]] == ["anomaly", "rollback"]
    back = int(events[1]["text"].split("back to step ")[1].split(",")[0])
    assert back < 101
    lines = read_lines(given.folder / STEPS)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert lines[-1]["learning_rate"] == pytest.approx(0.01 * 0.3)
    assert json.loads((given.folder / "result.json").read_text())["loss"] < 1.0


def test_errors_of_the_project_are_one_line(cluster, tmp_path):
    for given, said in (
        ("resources: {cpus: 500}", "train.workers is 1 with 500 CPU each"),
        ("loss: binary_crossentropy", "train.loss: `binary_crossentropy` does not fit an output of shape (rows, 2)"),
        ("metrics: [nonsense]", "train.metrics: `nonsense` is not a Keras metric"),
        ("stop: {when: speed >= 3}", "train.stop.when: `speed` is not measured"),
        ("schedule: {name: Cosine}", "train.schedule: no schedule `Cosine`"),
    ):
        project = traced.project(tmp_path / "project", train=given)
        with pytest.raises(Exception) as raised:
            run(job(project, tmp_path / "run"))
        from heliograph.cluster.runtime import explained

        mistake = explained(raised.value)
        assert mistake and said in str(mistake), raised.value
        assert not isinstance(mistake, RunError) or "500" in given
