"""Transfer: digits that are rotated and noisy, 5 rows a class, learnt from scratch or from a network that knows the upright ones.

    uv run python bench/transfer.py [--seeds 5]

The upright digits that the first network learns are other images than the rotated ones. Each seed draws both halves anew.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from statistics import mean

from common import cluster, finish, ran, test_accuracy

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
CNN = Path(__file__).parent.parent / "examples" / "digits" / "model.py"
FILE = """\
name: digits
data:
  source: "made:{source}"
  target: target
  split: {{validation: 0, test: {test}, seed: {seed}}}
  preprocess: [{{step: standardise}}]
model: {model}
train: {{epochs: {epochs}, batch_size: {batch}, optimizer: {{name: adam, learning_rate: 0.002}}, seed: {seed}}}
"""
MADE = '''\
import numpy as np
import pandas as pd
import ray.data
from heliograph.datasets import shards
from heliograph.project import Split
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

SEED = {seed}


def halves():
    found = load_digits()
    order = np.random.default_rng(SEED).permutation(1797)
    return [(found.images[half].astype("f4"), found.target[half]) for half in (order[:900], order[900:])]


def table(images, target):
    return ray.data.from_pandas(pd.DataFrame({{"image": list(images), "target": target}}))


def upright():
    return table(*halves()[0])


def turned():
    """Rotated by 20 to 50 degrees, with noise of a quarter of the range: 5 training rows of each class, and all test rows."""
    images, target = halves()[1]
    draw = np.random.default_rng(SEED)
    images = np.stack([rotate(i, draw.uniform(20, 50), reshape=False, order=1) for i in images])
    images = (images + draw.normal(0, 4, images.shape)).astype("f4")
    hashes = shards.row_hashes({{"image": images}}, target.astype(float), SEED)
    train = hashes >= shards.first_train_hash(Split(validation=0, test=0.6, seed=SEED))
    few = [i for kind in range(10) for i in np.flatnonzero(train & (target == kind))[:5]]
    taken = [*few, *np.flatnonzero(~train)]
    return table(images[taken], target[taken])
'''
HP = "{hp: {filters: 32, units: 64, dropout: 0.3}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    root, found = Path(tempfile.mkdtemp()), {"scratch": [], "transfer": []}
    try:
        with cluster() as running:
            for seed in range(options.seeds):
                made = MADE.format(seed=seed)
                text = FILE.format(source="upright", test=0.1, seed=seed, model=HP, epochs=12, batch=64)
                source = ran(root / f"upright-{seed}", running, text, CNN, made=made)
                start = f"{{start: {{model: '{source.folder}', keep_head: true}}}}"
                for name, model in (("scratch", HP), ("transfer", start)):
                    text = FILE.format(source="turned", test=0.6, seed=seed, model=model, epochs=60, batch=16)
                    run = ran(root / f"{name}-{seed}", running, text, CNN, made=made)
                    found[name].append(test_accuracy(run))
                    print(f"seed {seed}  {name:<10} test {found[name][-1]:.4f}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    gains = [b - a for a, b in zip(found["scratch"], found["transfer"], strict=True)]
    finish(
        {"scratch": mean(found["scratch"]), "transfer": mean(found["transfer"]), "gain": mean(gains), "least_gain": min(gains)}
    )


if __name__ == "__main__":
    main()
