"""Fusion: what several small digits networks become together, beside the best of them.

    uv run python bench/fuse.py [--seeds 5]

Each seed draws the rows anew: four networks from beginnings of their own, and four that went on from a common one with other
learning rates. What is chosen, the best member too, is chosen on the validation rows; figures are of the test rows.
"""

import argparse
import os
from statistics import mean

import numpy as np
from common import finish

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
RATES = (0.0005, 0.001, 0.002, 0.004)


def network():
    from keras import Input, Sequential, layers

    return Sequential([
        Input((8, 8, 1), name="image"), layers.Conv2D(8, 3, activation="relu"), layers.Conv2D(16, 3, activation="relu"),
        layers.MaxPooling2D(), layers.Flatten(), layers.Dense(32, activation="relu"), layers.Dense(10, activation="softmax"),
    ])  # fmt: skip


def fitted(model, rows, target, rate: float, epochs: int):
    import keras

    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    model.fit(rows, target, batch_size=64, epochs=epochs, verbose=0)
    return model


def figures(seed: int) -> dict[str, float]:
    import keras
    from heliograph.datasets.schema import Feature, Schema
    from heliograph.jobs import fuse
    from sklearn.datasets import load_digits

    feature = Feature(name="image", kind="tensor", shape=(8, 8, 1))
    labels = tuple(range(10))
    schema = Schema(task="classification", target="y", classes=labels, features=(feature,), inputs={"image": (8, 8, 1)})
    found, order = load_digits(), np.random.default_rng(seed).permutation(1797)
    images, target = (found.images[order, ..., None] / 16).astype(np.float32), found.target[order]
    train, held, test = slice(0, 400), slice(400, 700), slice(700, None)

    def quality(model, part=test) -> float:
        return fuse._quality(target[part], fuse._answers(model, {"image": images[part]}), schema)

    def best(models) -> float:
        return quality(max(models, key=lambda m: quality(m, held)))

    keras.utils.set_random_seed(seed)
    alone = [fitted(network(), images[train], target[train], 0.002, 20) for _ in range(4)]
    outputs = [fuse._answers(m, {"image": images[held]}) for m in alone]
    weights = fuse._best_weights(target[held], outputs, schema)
    out = {
        "members": mean(map(quality, alone)),
        "best member": best(alone),
        "mean": quality(fuse._weighted(alone, np.full(4, 0.25))),
        "weighted": quality(fuse._weighted(alone, weights)),
        "stacking": quality(fuse._stacked(alone, target[held], outputs, schema)[0]),
        "soup of these": quality(fuse._souped([keras.models.clone_model(alone[0]), *alone[1:]], [1, 2, 3])),
    }
    begun, relatives = fitted(network(), images[train], target[train], 0.002, 20), []
    for rate in RATES:
        model = network()
        model.set_weights(begun.get_weights())
        relatives.append(fitted(model, images[train], target[train], rate, 6))
    inputs = {"image": images[held]}
    ranked = sorted(range(4), key=lambda i: -quality(relatives[i], held))
    out["best relative"] = quality(relatives[ranked[0]])
    out["mean of relatives"] = quality(fuse._weighted(relatives, np.full(4, 0.25)))
    taken = fuse._helpful(relatives, ranked, inputs, target[held], schema)
    kept = relatives[taken[0]].get_weights()
    out["greedy soup"] = quality(fuse._souped(relatives, taken))
    relatives[taken[0]].set_weights(kept)
    out["soup"] = quality(fuse._souped(relatives, list(range(4))))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    every = []
    for seed in range(parser.parse_args().seeds):
        every.append(figures(seed))
        print(f"seed {seed}  " + "  ".join(f"{name} {value:.4f}" for name, value in every[-1].items()), flush=True)
    finish({name.replace(" ", "_"): mean(f[name] for f in every) for name in every[0]})


if __name__ == "__main__":
    main()
