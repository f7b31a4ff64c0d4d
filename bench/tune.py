"""`heliograph tune` on the digits example, with trials of real trainings.

    uv run python bench/tune.py search [seeds]       20 Bayesian trials against 40 random ones, of two workers each
    uv run python bench/tune.py schedule [seeds]     ASHA against training every trial to its end: epochs, and the best

Each seed runs both, one after the other, as `heliograph tune` on a copy of the example. Random trials are the same ones for both
sides of `schedule`.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import finish

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits"
SIDES: dict[str, dict[str, dict[str, Any]]] = {
    "search": {
        "bayesian 20": {"tune": {"trials": 20}},
        "random 40": {"tune": {"trials": 40, "search": "random"}},
    },
    "schedule": {
        "asha": {"tune": {"trials": 27, "search": "random", "scheduler": "asha"}, "train": {"workers": 1, "epochs": 27}},
        "full": {"tune": {"trials": 27, "search": "random"}, "train": {"workers": 1, "epochs": 27}},
    },
}


def tuned(settings: dict[str, dict[str, Any]], seed: int) -> tuple[float, int, float]:
    """(best validation accuracy, epochs over all trials, seconds) of a search."""
    with tempfile.TemporaryDirectory() as folder:
        for file in EXAMPLE.glob("*.py"):
            shutil.copy(file, folder)
        project = yaml.safe_load((EXAMPLE / "heliograph.yaml").read_text())
        for section, values in settings.items():
            project[section] |= values
        project["tune"]["seed"] = seed
        (Path(folder) / "heliograph.yaml").write_text(yaml.safe_dump(project, sort_keys=False))
        began = time.monotonic()
        command = [sys.executable, "-m", "heliograph", "tune", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = map(json.loads, (Path(folder) / "runs/default/tune/trials.jsonl").read_text().splitlines())
        ended = [line for line in lines if line["status"] in ("finished", "stopped")]
        best = max(line["values"]["val_accuracy"] for line in ended)
        return best, sum(len(line["curve"]) for line in ended), time.monotonic() - began


def main() -> None:
    what, seeds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else {"search": 5, "schedule": 3}[sys.argv[1]]
    found: dict[str, list[tuple[float, int, float]]] = {name: [] for name in SIDES[what]}
    for seed in range(seeds):
        for name, settings in SIDES[what].items():
            found[name].append(tuned(settings, seed))
            best, epochs, seconds = found[name][-1]
            print(f"seed {seed}  {name:<12} best {best:.4f}  {epochs:>5} epochs  {seconds:.0f} s", flush=True)
    (one, other), medians = found, {name: np.median(rows, axis=0) for name, rows in found.items()}
    finish({
        "best": float(medians[one][0]), "best_other": float(medians[other][0]),
        "points": 100 * float(medians[one][0] - medians[other][0]),
        "fewer_epochs": float(np.median([b[1] / a[1] for a, b in zip(found[one], found[other], strict=True)])),
        "seconds": float(medians[one][2]), "seconds_other": float(medians[other][2]),
    })  # fmt: skip


if __name__ == "__main__":
    main()
