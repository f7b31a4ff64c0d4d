"""What adversarial and private training buy on digits, and what they cost.

    uv run python bench/defend.py [--seeds 2] [--only small,private]

Every network is trained by `heliograph`'s own run (one worker) on splits drawn by the seed: plain, adversarial (PGD-7, half of
each step), and private at two budgets with a smaller network; then attacked (PGD, 20 steps, 3 restarts, 0.1 of the range) and
tried by membership inference (the loss threshold that tells training rows best). A step of the private training is timed against
a plain one of the same network and batch. `overfitted` is where membership inference finds something: few rows, trained on for
long, plain and private. The plain network is attacked by adversarial-robustness-toolbox, too: the same steps, restarts and reach.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean, median

from common import cluster, finish, metrics, ran

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits" / "model.py"
SMALL = """\
import keras
from keras import layers


def build(schema, hp):
    image = keras.Input(schema.input_shape, name="image")
    x = layers.Reshape((*schema.input_shape, 1))(image)
    x = layers.Conv2D(16, 3, activation="tanh")(x)
    x = layers.Conv2D(16, 3, activation="tanh")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = layers.Dense(32, activation="tanh")(x)
    return keras.Model(image, layers.Dense(schema.outputs, activation="softmax")(x))
"""


def project(name: str, seed: int, train: str, test: float = 0.3, more: str = "") -> str:
    return f"""\
name: {name}
data: {{source: "sklearn://digits", target: target, split: {{validation: 0.05, test: {test}, seed: {seed}}}, shards: 2}}
model: {{hp: {{filters: 32, units: 64, dropout: 0.3}}}}
train: {{{train}, seed: {seed}}}
evaluate: {{resamples: 0{more}}}
"""


ATTACK = ", attack: {epsilon: 0.1, steps: 20, restarts: 3, rows: 1000}"
PRIVATE = "batch_size: 512, ema: 0.9, optimizer: {name: adam, learning_rate: 0.01}"
ALL = {
    "plain": (EXAMPLE, "epochs: 20, optimizer: {learning_rate: 0.002}", 0.3, ATTACK),
    "adversarial": (EXAMPLE, "epochs: 20, optimizer: {learning_rate: 0.002}, adversarial: {epsilon: 0.1, steps: 7}", 0.3, ATTACK),
    "small": (SMALL, f"epochs: 60, {PRIVATE}", 0.15, ""),
    "private 8": (SMALL, f"epochs: 60, {PRIVATE}, privacy: {{epsilon: 8}}", 0.15, ""),
    "private 2.3": (SMALL, f"epochs: 40, {PRIVATE}, privacy: {{epsilon: 2.3}}", 0.15, ""),
    "overfitted": (EXAMPLE, "epochs: 150, optimizer: {learning_rate: 0.002}", 0.85, ""),
    "overfitted, private 8": (EXAMPLE, f"epochs: 60, {PRIVATE.replace('512', '128')}, privacy: {{epsilon: 8}}", 0.85, ""),
}


def step_seconds(run) -> float:
    lines = [json.loads(line) for line in (run["train"] / "steps.jsonl").read_text().splitlines()]
    return median(max(line["compute_ms"]) for line in lines[3:]) / 1000


def beside_art(run) -> dict[str, float]:
    """Accuracy under each attack, ours and the toolbox's, of the first test rows of digits, and its seconds."""
    import keras
    import numpy as np
    import tensorflow as tf
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent, SquareAttack
    from art.estimators.classification import TensorFlowV2Classifier
    from heliograph.cluster.keys import KeyStore
    from heliograph.jobs.attack import Box, by_gradient, by_search
    from heliograph.jobs.engine import keras_model
    from heliograph.jobs.evaluate import Sources, test_rows
    from heliograph.trust import Attack

    keys = KeyStore(run.folder / "keys")
    sources = Sources(run["prepare"], run["train"], keys, keys)
    columns, target = test_rows(sources, 1000)
    engine = sources.engine()
    ((name, rows),) = engine.preprocessing.apply(columns).items()
    box = Box.of(sources.prepared, keys, [], "bench")
    low, high = (np.asarray(v[name], np.float32) for v in (box.low, box.high))
    reach = 0.1 * float(box.span[name].max())  # of every pixel the same
    ours, model = keras_model(run["train"], keys), keras_model(run["train"], keys)
    model.layers[-1].activation = keras.activations.linear  # its loss of probabilities has no gradient where the model is sure
    model = keras.Sequential([keras.Input((*rows.shape[1:], 1)), keras.layers.Reshape(rows.shape[1:]), model])
    low, high, images = low[..., None], high[..., None], rows[..., None].astype(np.float32)
    classifier = TensorFlowV2Classifier(
        model=model, nb_classes=10, input_shape=images.shape[1:], clip_values=(low, high),
        loss_object=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )  # fmt: skip
    pgd = {"eps": reach, "eps_step": reach * 2.5 / 20, "max_iter": 20, "num_random_init": 3, "batch_size": 512, "verbose": False}
    attacks = {
        "fgsm": FastGradientMethod(classifier, eps=reach, eps_step=reach, batch_size=512),
        "pgd": ProjectedGradientDescent(classifier, **pgd),
        "random": SquareAttack(classifier, eps=reach, max_iter=120, nb_restarts=3, verbose=False),
    }
    clean = model.predict(images, verbose=0).argmax(axis=1) == target
    said = {}
    for method, attack in attacks.items():
        began = time.perf_counter()
        moved = attack.generate(images, target)
        said[f"{method}: art seconds"] = time.perf_counter() - began
        said[f"{method}: art"] = float((clean & (model.predict(moved, verbose=0).argmax(axis=1) == target)).mean())
        began = time.perf_counter()
        settings, own = Attack(method=method), ours if method != "random" else engine.forward
        right = (by_search if method == "random" else by_gradient)(own, {name: rows}, target, box, settings)
        said[f"{method}: ours"] = float((clean & right).mean())
        said[f"{method}: our seconds"] = time.perf_counter() - began
        print({k: round(v, 4) for k, v in said.items() if k.startswith(method)}, flush=True)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    found: dict[str, list[dict]] = {name: [] for name in ALL if any(part in name for part in chosen.only.split(","))}
    plain = None
    with tempfile.TemporaryDirectory() as temp, cluster() as running:
        for seed in range(chosen.seeds):
            for name, rows in found.items():
                model, train, test, more = ALL[name]
                folder = Path(temp) / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
                run = ran(folder, running, project("digits", seed, train, test, more), model)
                test_figures, trained = metrics(run), json.loads((run["train"] / "result.json").read_text())
                attacked = run["attack"] / "attack.json"
                row = {
                    "accuracy": test_figures["accuracy"],
                    "membership": test_figures["membership"]["advantage"],
                    "membership_auc": test_figures["membership"]["auc"],
                    "step": step_seconds(run),
                }
                if attacked.exists():
                    row["robust"] = json.loads(attacked.read_text())["robust_accuracy"]
                if "privacy" in trained:
                    row["epsilon"] = trained["privacy"]["epsilon"]
                if (name, seed) == ("plain", 0):
                    plain = run
                rows.append(row)
                print(f"seed {seed}  {name:<24}", {k: round(v, 4) for k, v in row.items()}, flush=True)
        art = beside_art(plain) if plain else {}
    said = {f"{name}: {key}": mean(row[key] for row in rows) for name, rows in found.items() for key in rows[0]}
    if "small: step" in said and "private 8: step" in said:
        said["private_step_vs_plain"] = said["private 8: step"] / said["small: step"]
    finish(said | art)


if __name__ == "__main__":
    main()
