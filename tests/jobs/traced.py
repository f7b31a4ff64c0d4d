"""A project that writes down which rows each training step really had, and what that says of a training that was disturbed."""

import json
from pathlib import Path

import numpy as np
from heliograph.datasets.shards import Manifest, open_shard, read_rows
from heliograph.jobs.watch import EVENTS, METRICS, STEPS, read_lines

MODEL = '''\
import json
import os
import time

import keras
import tensorflow as tf


class Recorder(keras.layers.Layer):
    """Appends the row numbers (the first feature) of each training step to a file of this process; hides them from the model."""

    file = None

    def __init__(self, folder, pause, **kwargs):
        super().__init__(**kwargs)
        self.folder, self.pause = folder, pause

    def write(self, numbers):
        if Recorder.file is None:
            rank = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", 0)
            name = f"{time.time_ns()}-{rank}"
            Recorder.file = open(os.path.join(self.folder, name), "w", buffering=1)
        Recorder.file.write(json.dumps(numbers.numpy().astype(int).tolist()) + "\\n")
        time.sleep(self.pause)

    def call(self, x, training=False):
        if training:
            with tf.control_dependencies([tf.py_function(self.write, [x[:, 0]], [])]):
                x = tf.identity(x)
        return x[:, 1:]


def build(schema, hp):
    inputs = keras.Input(schema.input_shape)
    x = Recorder(hp.folder, hp.pause)(inputs)
    x = keras.layers.Dense(8, activation="tanh")(x)
    return keras.Model(inputs, keras.layers.Dense(schema.outputs, activation="softmax")(x))
'''
AHEAD = 3
"""A rank may have its first rows some seconds before rank 0 writes that an attempt began; attempts are further apart."""
FILE = """\
name: traced
data: {{source: rows.csv, target: kind, split: {{validation: 0.1, test: 0.1}}, preprocess: [], shards: 4, encrypt: false}}
model: {{hp: {{folder: {folder}, pause: {pause}}}}}
train:
  {{{train}epochs: {epochs}, batch_size: 16, workers: {workers}, encrypt: true,
   checkpoint: {{seconds: {seconds}}}, optimizer: {{learning_rate: 0.01}}}}
"""


def project(
    folder: Path, workers: str = "1", epochs: int = 3, pause: float = 0.05, train: str = "", seconds: float = 0.3
) -> Path:
    """400 rows, about 20 steps an epoch. train: settings more; seconds: of a checkpoint."""
    (folder / "traces").mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(MODEL)
    more = f"{train}, " if train else ""
    text = FILE.format(folder=folder / "traces", pause=pause, epochs=epochs, workers=workers, train=more, seconds=seconds)
    (folder / "heliograph.yaml").write_text(text)
    rng = np.random.default_rng(0)
    points = rng.normal(size=(400, 3))
    kinds = (points.sum(axis=1) > 0).astype(int)
    lines = [f"{i},{a:.4f},{b:.4f},{c:.4f},{kind}" for i, ((a, b, c), kind) in enumerate(zip(points, kinds, strict=True))]
    (folder / "rows.csv").write_text("number,a,b,c,kind\n" + "\n".join(lines) + "\n")
    return folder


def training_rows(prepared: Path) -> set[int]:
    found: set[int] = set()
    for shard in Manifest.read(prepared).splits["train"]:
        file = prepared / shard.file
        with open_shard(file, None) as opened:
            found |= set(read_rows(opened, file)["features"][:, 0].astype(int).tolist())
    return found


def epochs_of_rows(traces: Path, trained: Path, steps_of_epoch: int) -> list[list[int]]:
    """For each epoch, the row numbers of the steps that count: an attempt's steps up to where the next one took over."""
    begun = []
    for event in read_lines(trained / EVENTS):
        if event["kind"] == "workers":
            begun.append((event["time"], int(event["text"].split()[0]), event["step"]))
    by_step: dict[int, list[int]] = {}
    for (since, workers, start), end in zip(begun, [*(time for time, *_ in begun[1:]), float("inf")], strict=True):
        files = [f for f in traces.iterdir() if since < int(f.name.split("-")[0]) / 1e9 + AHEAD < end]
        if not files:
            continue  # it ended before its first step
        assert len(files) == workers, f"{files} for {workers} workers"
        by_step = {step: numbers for step, numbers in by_step.items() if step <= start}
        ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        for i in range(min(map(len, ranks))):
            by_step[start + i + 1] = [number for rank in ranks for number in rank[i]]
    assert sorted(by_step) == list(range(1, len(by_step) + 1))
    epochs: list[list[int]] = [[] for _ in range(len(by_step) // steps_of_epoch)]
    for step, numbers in by_step.items():
        epochs[(step - 1) // steps_of_epoch] += numbers
    return epochs


def check(folder: Path, prepared: Path, trained: Path) -> list[dict]:
    """Every row once an epoch, every metric once; the figures of each epoch."""
    figures = read_lines(trained / METRICS)
    rows = training_rows(prepared)
    for numbers in epochs_of_rows(folder / "traces", trained, figures[0]["step"]):
        assert len(numbers) == len(rows)
        assert set(numbers) == rows
    keys = [line["step"] for line in read_lines(trained / STEPS)]
    assert keys == sorted(set(keys))
    assert sum(line["steps"] for line in read_lines(trained / STEPS)) == figures[-1]["step"]
    assert [line["epoch"] for line in figures] == list(range(1, len(figures) + 1))
    return figures
