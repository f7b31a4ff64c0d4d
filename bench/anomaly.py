"""How many faults of a training the detector finds, how soon, and how often it cries wolf.

    uv run --group bench python bench/anomaly.py [runs of each fault]

Real trainings (digits and two synthetic sets; Adam and SGD; several batch sizes, rates and seeds) with a fault put in at a
random step, for the rest of a short run: flipped labels, a learning rate or inputs that are multiplied, NaNs, a worker that
becomes slower. Loss, gradient norm and computing time are what `jobs/steps.py` measured. The ranks' times are those of two
processes at work side by side on steps of about 40 ms (shorter ones stutter more than a slow worker does), from a random
place on; a slower worker's are multiplied. Clean trainings give the false alarms. A strong fault counts as found when the
first alarm after it comes within 5 steps, a weak one within 20.
"""

import contextlib
import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
from common import answer, child, finish
from heliograph.datasets.ingest import Block
from heliograph.jobs.anomaly import Detector
from heliograph.jobs.steps import HOST, OWN, Feed, Objective, Steps

WITHIN = {"strong": 5, "weak": 20}
CLEAN_STEPS, TIMED_STEPS = 1500, 1500
STRONG = {"labels": 0.3, "rate": 30.0, "inputs": 16.0, "nan": 1.0, "slow": 1.6}
WEAK = {"labels": 0.1, "rate": 5.0, "slow": 1.25}


def rows(kind: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(kind)
    if kind == 0:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return ((x - x.mean(0)) / (x.std(0) + 1e-3)).astype("float32"), y.astype("int64")
    y = rng.integers(0, 10, 20_000)
    centres = rng.normal(size=(10, 64))
    x = centres[y] + (2.0 if kind == 1 else 3.0) * rng.normal(size=(20_000, 64))
    return x.astype("float32"), y


def train(
    seed: int, count: int, fault: str = "", strength: float = 0.0, at: int = 10**9, width: int = 512, batch: int = 0
) -> np.ndarray:
    """Signals `[count, OWN + 1]` of one training; the fault is in every step from `at` on."""
    import keras
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # a worker beside another has a core, not the machine
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(2)
    rng = np.random.default_rng(seed)
    x, y = rows(seed % 3)
    batch = batch or int(rng.choice([32, 64, 128]))
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(width, activation="relu") for _ in range(2 + seed % 2)]
    layers.append(keras.layers.Dropout(0.3))
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(10, activation="softmax")])
    rate = float(rng.choice([0.001, 0.003]))
    factor = keras.Variable(1.0, trainable=False)

    class Rate(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return rate * tf.convert_to_tensor(factor.value)

        def get_config(self):
            return {}

    optimizer = keras.optimizers.Adam(Rate()) if seed % 4 else keras.optimizers.SGD(Rate(), momentum=0.9)
    if not seed % 4:
        rate *= 10
    optimizer.build(model.trainable_variables)
    loss = keras.losses.sparse_categorical_crossentropy
    strategy = tf.distribute.get_strategy()
    steps = Steps(
        model,
        Objective(loss),
        optimizer,
        [keras.metrics.Mean("loss")],
        strategy,
        ({"x": (64,)}, tf.TensorSpec((None,), tf.int64)),
        0,
        1,
    )
    host, found, done, order = np.zeros(HOST, np.float32), [], 0, rng.permutation(len(x))
    at_row = 0
    while done < count:
        piece = min(8 if done < at else count, count - done, max(1, at - done) if done < at else 8)
        chosen = [order[(at_row + i) % len(x)] for i in range(piece * batch)]
        at_row += piece * batch
        if at_row >= len(x):
            at_row, order = 0, rng.permutation(len(x))
        inputs, target = x[chosen], y[chosen].copy()
        if done >= at:
            if fault == "labels":
                flipped = rng.random(len(target)) < strength
                target[flipped] = rng.integers(0, 10, int(flipped.sum()))
            elif fault == "inputs":
                inputs = inputs * np.float32(strength)
            elif fault == "nan":
                inputs = np.where(rng.random(inputs.shape) < 0.001, np.float32("nan"), inputs)
            elif fault == "rate":
                factor.assign(strength)
        edges = np.arange(piece + 1, dtype=np.int32) * batch
        block = Block({"x": inputs}, target, np.ones(len(target), np.float32), edges, np.full(piece, batch, np.float32), {})
        found.append(steps.train(next(Feed(iter([block]), "CPU:0")), 0, piece, host).steps)
        done += piece
    return np.concatenate(found)


def seen(signals: np.ndarray, times: np.ndarray, call: int = 8) -> list:
    """All alarms of one training, looked at a call at a time, as rank 0 does."""
    detector, alarms = Detector(times.shape[1]), []
    for first in range(0, len(signals), call):
        piece = slice(first, first + call)
        alarms += detector.see(first, signals[piece, :OWN], times[piece])
    return alarms


def timed(seed: int) -> None:
    """A child: the computing times of a training whose steps are long."""
    print(json.dumps(train(seed, TIMED_STEPS, width=1024, batch=256)[20:, OWN].tolist()))


def main(runs: int) -> None:
    pairs = []
    for seed in (1, 2):
        both = [child(__file__, "timed", str(seed)) for _ in range(2)]
        pairs.append(np.stack([np.array(answer(process)) for process in both], axis=1))
        print(f"a step of two processes side by side: {1000 * np.median(pairs[-1]):.1f} ms", flush=True)

    def times(seed: int, count: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        pair = pairs[seed % len(pairs)]
        found = np.roll(pair, rng.integers(len(pair)), axis=0)
        return np.resize(found, (count, 2))[:, :: rng.choice([1, -1])].copy()

    steps = false = 0
    for seed in range(max(7, runs // 2)):
        signals = train(seed, CLEAN_STEPS)
        alarms = seen(signals, times(seed, len(signals)))
        steps, false = steps + len(signals), false + len(alarms)
        print(f"clean training {seed}: {len(alarms)} alarms in {len(signals)} steps {[a.text for a in alarms]}", flush=True)
    shares = {}
    for name, faults in (("strong", STRONG), ("weak", WEAK)):
        hits = []
        for fault, strength in faults.items():
            delays, early = [], 0
            for run in range(runs):
                at = int(np.random.default_rng(1000 + run).integers(200, 500))
                signals = train(100 + run, at + WITHIN["weak"], fault, strength, at)
                ranks = times(100 + run, len(signals))
                if fault == "slow":
                    ranks[at:, 0] *= strength
                alarms = [a.step - at for a in seen(signals, ranks)]
                early += sum(a < 1 for a in alarms)
                delays.append(next((a for a in alarms if a >= 1), None))
            found = [d for d in delays if d is not None and d <= WITHIN[name]]
            hits.append(len(found) / runs)
            mean = f", after {np.mean(found):.1f} steps" if found else ""
            print(f"{name:6} {fault:7} ×{strength:<5g} found {len(found)} of {runs}{mean}; {early} alarms before it", flush=True)
        shares[name] = float(np.mean(hits))
    finish({"strong_found": shares["strong"], "weak_found": shares["weak"], "false_per_10k": false / steps * 10_000})


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["timed", seed]:
            timed(int(seed))
        case given:
            main(int(given[0]) if given else 20)
