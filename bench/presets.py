"""Ready-made models beside scikit-learn: what `heliograph init` proposes for a data set, run to the end.

    uv run python bench/presets.py [--seeds 3]

Each set's project is the proposed one, with the seed of its split changed; the stage `baseline` fits scikit-learn's linear model
and boosted trees on the same training rows and tests on the same test rows. `worse` counts the comparisons that the preset loses.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

from common import cluster, finish, metrics, ran

SETS = {"breast_cancer": "accuracy", "wine": "accuracy", "digits": "accuracy", "diabetes": "r2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    from heliograph.jobs.propose import columns_of, propose

    found: dict[str, list[float]] = {}
    worse = 0
    with tempfile.TemporaryDirectory() as temp:
        texts = {}
        for name in SETS:
            source = f"sklearn://{name}"
            texts[name] = propose(name.replace("_", "-"), source, columns_of(source), "target", Path(temp))
        with cluster() as running:
            for seed in range(chosen.seeds):
                for name, figure in SETS.items():
                    text = texts[name].replace("seed: 0}", f"seed: {seed}}}").replace("explain: {rows: 100}", "")
                    run = ran(Path(temp) / f"{name}-{seed}", running, text, "")
                    own = metrics(run)[figure]
                    beside = json.loads((run["baseline"] / "baseline.json").read_text())["models"]
                    worse += sum(m["verdict"] == "the model is worse" for m in beside)
                    said = ", ".join(f"{m['name']} {m['figures'][figure]:.4f} ({m['verdict']})" for m in beside)
                    print(f"seed {seed}  {name:<14} {figure} {own:.4f}  {said}", flush=True)
                    for key, value in [("preset", own), *((m["name"], m["figures"][figure]) for m in beside)]:
                        found.setdefault(f"{name}: {key}", []).append(value)
    finish({key: mean(values) for key, values in found.items()} | {"worse": worse})


if __name__ == "__main__":
    main()
