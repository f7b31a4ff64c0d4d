"""Local explanations of networks on breast cancer: ours beside the library `shap`.

    uv run python bench/explain.py [--rows 110] [--repeats 3]

The reference is shap's permutation explainer, 50 background rows: 20 × 61 answers a row, whose time is compared, and 200 × 61,
which is nearer to what both estimate. Expected gradients are ours, in one process, TensorFlow's tracing counted; correlations are
over all values of all rows. Two networks: the example as it is, which is sure of nearly every row, and one with smoothed labels.
`two workers` explains a larger set (test rows with noise) by our Shapley values, in one process and over two Ray tasks
whose start is counted.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from common import cluster, finish, in_turn, ran

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
EXAMPLE = Path(__file__).parent.parent / "examples" / "breast_cancer"
SMOOTHED = "class_weights: balanced\n  label_smoothing: 0.1\n"


def compared(run, rows_wanted: int, repeats: int) -> tuple[dict, tuple]:
    """(figures, what explains more rows of the same)."""
    import shap
    from heliograph.cluster.keys import KeyStore
    from heliograph.jobs import explain
    from heliograph.jobs.engine import keras_model
    from heliograph.jobs.evaluate import Sources, test_rows
    from heliograph.jobs.export import sample

    kept: dict = {}
    keys = KeyStore(run.folder / "keys")
    sources = Sources(run["prepare"], run["train"], keys, keys)
    engine = sources.engine()
    columns, _ = test_rows(sources, rows_wanted)
    rows = engine.preprocessing.apply(columns)
    outputs = engine.forward(rows)
    which = outputs.argmax(axis=1)
    background, _ = sample(sources.prepared, keys, "train", 50)
    who = explain.players(engine.schema, engine.preprocessing, columns)
    (name,) = rows

    def timed(key: str, work) -> float:
        began = time.perf_counter()
        kept[key] = work()
        return time.perf_counter() - began

    def reference(times: int):
        explainer = shap.PermutationExplainer(lambda x: engine.forward({name: x.astype(np.float32)}), background[name], seed=0)
        values = explainer(rows[name].astype(np.float64), max_evals=times * 61, silent=True).values
        return values[np.arange(len(which)), :, which]

    def ours():
        return explain.by_player(explain.gradients(keras_model(sources.trained, keys), rows, background, which), who)

    reference(1), ours()  # libraries load, and compile
    contenders = {
        "shap, 20 x 61 answers": lambda: timed("reference", lambda: reference(20)),
        "expected gradients (ours)": lambda: timed("ours", ours),
    }
    seconds = in_turn(repeats, contenders, "s")
    near = reference(200)
    gap = outputs[np.arange(len(which)), which] - engine.forward(background).mean(axis=0)[which] - kept["ours"].sum(axis=1)

    def correlation(a, b) -> float:
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    figures = {
        "correlation": correlation(kept["ours"], near),
        "correlation_20": correlation(kept["ours"], kept["reference"]),
        "shap_20_with_200": correlation(kept["reference"], near),
        "vs_shap_time": median(seconds["expected gradients (ours)"]) / median(seconds["shap, 20 x 61 answers"]),
        "additivity_gap_mean": float(np.abs(gap).mean()),
        "surrogate_fidelity": json.loads((run["explain"] / "explain.json").read_text())["surrogate"]["fidelity"],
    }
    return figures, (sources, rows[name], background, which, who)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=110)
    parser.add_argument("--many", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp, cluster() as running:
        from heliograph.jobs import explain
        from heliograph.trust import Explain

        text, said = (EXAMPLE / "heliograph.yaml").read_text() + "\nexplain: {}\n", {}
        for kind, changed in (("sure", text), ("smoothed", text.replace("class_weights: balanced", SMOOTHED))):
            run = ran(Path(temp) / kind, running, changed, EXAMPLE / "model.py")
            print(f"network: {kind}")
            figures, held = compared(run, chosen.rows, chosen.repeats)
            said |= {f"{kind}_{key}": value for key, value in figures.items()}
        sources, rows, background, which, who = held
        rng = np.random.default_rng(0)
        take = rng.integers(0, len(which), chosen.many)
        (name,) = background
        large = {name: (rows[take] + rng.normal(0, 0.1, (chosen.many, rows.shape[1]))).astype(np.float32)}
        work = explain._Local(sources, Explain(method="permutation", orders=2), large, background, which[take], who)
        found = {}

        def alone() -> float:
            began = time.perf_counter()
            found["one"] = work.of(np.arange(chosen.many))
            return time.perf_counter() - began

        def divided() -> float:
            began = time.perf_counter()
            found["two"] = explain._local(work)
            return time.perf_counter() - began

        both = in_turn(2, {"one process": alone, "two workers": divided}, "s")
        assert np.array_equal(found["one"], found["two"])
        said["two_workers_speedup"] = median(both["one process"]) / median(both["two workers"])
    finish(said)


if __name__ == "__main__":
    main()
