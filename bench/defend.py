"""What adversarial and private training buy on digits, and what they cost.

    uv run python bench/defend.py [--seeds 2] [--only small,private]

Every network is trained by `heliograph`'s own run (one worker) on splits drawn by the seed: plain, adversarial (PGD-7, half of
each step), and private at two budgets with a smaller network; then attacked (PGD, 20 steps, 3 restarts, 0.1 of the range) and
tried by membership inference (the loss threshold that tells training rows best). A step of the private training is timed against
a plain one of the same network and batch. `overfitted` is where membership inference finds something: few rows, trained on for
long, plain and private.
"""

import argparse
import json
import tempfile
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    found: dict[str, list[dict]] = {name: [] for name in ALL if any(part in name for part in chosen.only.split(","))}
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
                rows.append(row)
                print(f"seed {seed}  {name:<24}", {k: round(v, 4) for k, v in row.items()}, flush=True)
    said = {f"{name}: {key}": mean(row[key] for row in rows) for name, rows in found.items() for key in rows[0]}
    if "small: step" in said and "private 8: step" in said:
        said["private_step_vs_plain"] = said["private 8: step"] / said["small: step"]
    finish(said)


if __name__ == "__main__":
    main()
