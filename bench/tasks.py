"""Several tasks: the digit and whether it is even, by one network and by two.

    uv run python bench/tasks.py [--seeds 5]

The one has the body of each of the two, and both heads. A third network has lost a half of its labels, 50 % of each kind.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from statistics import mean

from common import cluster, finish, metrics, ran

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
FILE = """\
name: digits
data: {{source: "made:{source}", target: {target}, features: [image], split: {{validation: 0, test: 0.3, seed: {seed}}}}}
model: {{hp: {{filters: 16, units: 64}}}}
train: {{epochs: 20, batch_size: 64, {balance}optimizer: {{name: adam, learning_rate: 0.002}}, seed: {seed}}}
"""
MADE = """\
import numpy as np
import pandas as pd
import ray.data
from sklearn.datasets import load_digits


def rows(lost):
    found = load_digits()
    draw = np.random.default_rng(0)
    digit, parity = found.target.astype(float), np.where(found.target % 2, "odd", "even").astype(object)
    digit[draw.random(1797) < lost], parity[draw.random(1797) < lost] = np.nan, None
    kept = ~np.isnan(digit) | np.array([p is not None for p in parity])
    table = pd.DataFrame({"image": list(found.images.astype("f4")), "digit": digit, "parity": parity})
    return ray.data.from_pandas(table[kept])


def whole():
    return rows(0)


def half():
    return rows(0.5)
"""
MODEL = """\
import keras
from keras import layers


def build(schema, hp):
    image = keras.Input(schema.input_shape, name="image")
    x = layers.Reshape((8, 8, 1))(image)
    x = layers.Conv2D(hp.filters, 3, padding="same", activation="relu")(x)
    x = layers.Conv2D(2 * hp.filters, 3, padding="same", activation="relu")(x)
    x = layers.Flatten()(layers.MaxPooling2D()(x))
    x = layers.Dropout(0.3)(layers.Dense(hp.units, activation="relu")(x))
    heads = {a.target: layers.Dense(a.outputs, activation="softmax", name=a.target)(x) for a, _ in schema.parts}
    return keras.Model(image, heads if len(heads) > 1 else next(iter(heads.values())))
"""
CASES = (
    ("digit alone", "whole", "digit", ""),
    ("parity alone", "whole", "parity", ""),
    ("both", "whole", "[digit, parity]", ""),
    ("both, balanced", "whole", "[digit, parity]", "balance: uncertainty, "),
    ("both, half of the labels", "half", "[digit, parity]", ""),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    root, found, parameters = Path(tempfile.mkdtemp()), {}, {}
    try:
        with cluster() as running:
            for seed in range(parser.parse_args().seeds):
                for name, source, target, balance in CASES:
                    text = FILE.format(source=source, target=target, balance=balance, seed=seed)
                    run = ran(root / f"{name}-{seed}".replace(" ", "-").replace(",", ""), running, text, MODEL, made=MADE)
                    test = metrics(run)
                    parameters[name] = json.loads((run["train"] / "result.json").read_text())["parameters"]
                    for task, figures in test.get("tasks", {target: test}).items():
                        found.setdefault(f"{name}: {task}", []).append(figures["accuracy"])
                        print(f"seed {seed}  {name:<26} {task:<7} test {figures['accuracy']:.4f}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    alone = {task: mean(found[f"{task} alone: {task}"]) for task in ("digit", "parity")}
    gaps = {f"{name}, {task} behind": alone[task] - mean(found[f"{name}: {task}"])
            for name, *_ in CASES[2:] for task in alone}  # fmt: skip
    share = parameters["both"] / (parameters["digit alone"] + parameters["parity alone"])
    finish({name: mean(values) for name, values in found.items()} | gaps | {"parameters of one to those of two": share})


if __name__ == "__main__":
    main()
