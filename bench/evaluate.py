"""Figures of ten million predictions: ours, over two workers, and scikit-learn's in one process.

    uv run python bench/evaluate.py [--rows 10000000] [--repeats 3]

Both read the same files (float32 probabilities of two classes, eight files) and compute accuracy, balanced accuracy, MCC,
confusion, precision, recall and F1 (macro, weighted, micro), areas under ROC and precision-recall curve with the curves, log loss
and Brier score; ours adds calibration. Intervals of all of them: ours by 200 Poisson resamplings of a part, scikit-learn's by
resampling all rows, of which two are timed and multiplied. Ray is started before: its start is not counted. The width of both
intervals of the area is printed, of as many resamplings as scikit-learn was given time for (`--resamples`).
"""

import argparse
import functools
import math
import pickle
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from common import cluster, finish, in_turn

FILES = 8


def schema():
    from heliograph.datasets.schema import Feature, Schema

    return Schema(task="classification", target="y", classes=("no", "yes"), features=(Feature(name="x"),))


def written(folder: Path, rows: int) -> None:
    for i in range(FILES):
        rng = np.random.default_rng(i)
        n = rows // FILES
        target = (rng.random(n) < 0.3).astype(np.int64)
        logit = rng.normal(1.2 * (2 * target - 1), 1.5)
        score = (1 / (1 + np.exp(-logit))).astype(np.float32)
        np.save(folder / f"target-{i}.npy", target)
        np.save(folder / f"outputs-{i}.npy", np.stack([1 - score, score], axis=1))


def read(folder: Path, i: int):
    return np.load(folder / f"target-{i}.npy"), np.load(folder / f"outputs-{i}.npy")


def look(batch: dict, folder: Path, share: float) -> dict:
    from heliograph.jobs import figures

    out = []
    for i in map(int, batch["id"]):
        target, outputs = read(folder, i)
        state = figures.Classified.of(target, outputs)
        state.spill(folder, f"run-{i}")
        kept = np.random.default_rng([i, 1]).random(len(target)) < share
        memory = psutil.Process().memory_info().rss
        out.append(pickle.dumps((state, target[kept], outputs[kept], memory)))
    return {"found": np.array(out, dtype=object)}


def ours(folder: Path, rows: int) -> dict:
    import ray.data
    from heliograph.jobs import figures

    call = functools.partial(look, folder=folder, share=min(1.0, figures.MOST_KEPT / rows))
    done = ray.data.range(FILES, override_num_blocks=FILES).map_batches(call, batch_format="numpy", batch_size=None)
    parts = [pickle.loads(b) for batch in done.iter_batches(batch_size=None, batch_format="numpy") for b in batch["found"]]
    state = functools.reduce(figures.Classified.merge, (p[0] for p in parts))
    found = state.figures(schema())
    found["kept"] = np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts])
    found["worker_mb"] = max(p[3] for p in parts) / 2**20
    return found


def theirs(target: np.ndarray, outputs: np.ndarray) -> dict:
    from sklearn import metrics

    guess, score = outputs.argmax(axis=1), outputs[:, 1].astype(np.float64)
    found = {
        "accuracy": metrics.accuracy_score(target, guess),
        "balanced_accuracy": metrics.balanced_accuracy_score(target, guess),
        "mcc": metrics.matthews_corrcoef(target, guess),
        "roc_auc": metrics.roc_auc_score(target, score),
        "average_precision": metrics.average_precision_score(target, score),
        "log_loss": metrics.log_loss(target, outputs.astype(np.float64)),
        "brier": metrics.brier_score_loss(target, score),
    }
    metrics.confusion_matrix(target, guess)
    metrics.roc_curve(target, score)
    metrics.precision_recall_curve(target, score)
    for average in ("macro", "weighted", "micro"):
        found[average] = metrics.precision_recall_fscore_support(target, guess, average=average, zero_division=0)[:3]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--resamples", type=int, default=2)
    chosen = parser.parse_args()
    kept: dict = {}
    with tempfile.TemporaryDirectory() as temp, cluster():
        folder = Path(temp)
        written(folder, chosen.rows)

        def timed(name, work) -> float:
            began = time.perf_counter()
            kept[name] = work()
            return time.perf_counter() - began

        def whole():
            parts = [read(folder, i) for i in range(FILES)]
            return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

        ours(folder, chosen.rows)  # workers start, libraries load
        seconds = in_turn(
            chosen.repeats,
            {
                "heliograph, two workers": lambda: timed("ours", lambda: ours(folder, chosen.rows)),
                "scikit-learn": lambda: timed("theirs", lambda: theirs(*whole())),
            },
            "s",
        )
        own, other = kept["ours"], kept["theirs"]
        gaps = [abs(own[name] - value) for name, value in other.items() if isinstance(value, float)]
        for average in ("macro", "weighted", "micro"):
            gaps += [abs(a - b) for a, b in zip(own[average].values(), other[average], strict=True)]

        from heliograph.jobs import figures

        target, outputs = own["kept"]
        ours_took, resampled = [], []
        for repeat in range(chosen.repeats):
            began = time.perf_counter()
            ends = figures.intervals(own, target, outputs, schema(), chosen.rows, 200, 0.95, repeat)
            ours_took.append(time.perf_counter() - began)
            print(f"repeat {repeat + 1}  heliograph, 200 resamplings {ours_took[-1]:10.2f} s", flush=True)
        every, rng, theirs_took = whole(), np.random.default_rng(0), []
        for repeat in range(chosen.resamples):
            began = time.perf_counter()
            rows = rng.integers(0, chosen.rows, chosen.rows)
            resampled.append(theirs(every[0][rows], every[1][rows])["roc_auc"])
            theirs_took.append(time.perf_counter() - began)
            print(f"repeat {repeat + 1}  scikit-learn, 1 resampling  {theirs_took[-1]:10.2f} s", flush=True)
        low, high = ends["roc_auc"]
        spread = float(np.std(resampled, ddof=1)) * 2 * 1.96
        exact = own["roc_auc"]
        # The area's deviation by Hanley and McNeil (1982), which needs no resampling.
        yes, no = 0.3 * chosen.rows, 0.7 * chosen.rows
        q1, q2 = exact / (2 - exact), 2 * exact**2 / (1 + exact)
        formula = math.sqrt((exact * (1 - exact) + (yes - 1) * (q1 - exact**2) + (no - 1) * (q2 - exact**2)) / (yes * no))
        print(f"95 % interval of the area: ours {high - low:.2e} wide, Hanley and McNeil {2 * 1.96 * formula:.2e}, ", end="")
        print(f"{chosen.resamples} resamplings of all rows {spread:.2e}")
    finish({
        "rows": chosen.rows,
        "vs_sklearn_time": median(seconds["heliograph, two workers"]) / median(seconds["scikit-learn"]),
        "bootstrap_vs_sklearn": median(ours_took) / (200 * median(theirs_took)),
        "max_gap": max(gaps),
        "worker_mb": own["worker_mb"],
        "driver_mb": psutil.Process().memory_info().rss / 2**20,
    })  # fmt: skip


if __name__ == "__main__":
    main()
