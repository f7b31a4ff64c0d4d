"""Compare: whether one model is really better than another, on the same rows.

Both answer the same test rows. Differences of figures get paired intervals (each resampling weighs the rows of both alike), and
which of them is right where only one is gets McNemar's exact test (1947); for numbers, the squared errors get Wilcoxon's (1945).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..errors import ModelError
from ..trust import FIGURES
from .engine import Engine
from .evaluate import Sources, test_rows
from .figures import LOWER, draws, weighted

SAMPLES = 1000
LEVEL = 0.05


def paired(target: np.ndarray, a: np.ndarray, b: np.ndarray, schema: Any, seed: int = 0) -> dict[str, Any]:
    """Of outputs `[rows, …]` of two models: `figures` (figure → a, b, low and high of b - a), `p`, who is better in words, and
    both confusion matrices (truth by row) where there are classes."""
    from scipy import stats

    of = [weighted(target, outputs, schema) for outputs in (a, b)]
    ones = np.ones((1, len(target)), np.float32)
    own = [{name: float(v[0]) for name, v in each(ones).items()} for each in of]
    gaps: dict[str, list[np.ndarray]] = {}
    for weights in draws(len(target), SAMPLES, seed):
        first, second = (each(weights) for each in of)
        for name in first:
            gaps.setdefault(name, []).append(second[name] - first[name])
    figures = {}
    for name in [n for n in FIGURES if n in gaps and np.isfinite(own[0][n]) and np.isfinite(own[1][n])]:
        every = np.concatenate(gaps[name])
        low, high = np.quantile(every[np.isfinite(every)], [LEVEL / 2, 1 - LEVEL / 2])
        figures[name] = {"a": own[0][name], "b": own[1][name], "low": float(low), "high": float(high)}
    if schema.classes:
        right = [outputs.argmax(axis=1) == target for outputs in (a, b)]
        only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        p = float(stats.binomtest(only[1], sum(only)).pvalue) if sum(only) else 1.0
        ahead = only[1] - only[0]
        test = f"McNemar: the first alone is right in {only[0]} rows, the second alone in {only[1]}, p {p:.3g}"
    else:
        errors = [np.square(outputs[:, 0] - target) for outputs in (a, b)]
        differ = errors[0] - errors[1]
        said: Any = stats.wilcoxon(differ) if differ.any() else None
        p = float(said.pvalue) if said else 1.0
        ahead = float(np.median(differ))
        test = f"Wilcoxon, of squared errors: p {p:.3g}"
    verdict = "no difference is shown" if p >= LEVEL or not ahead else f"the {'second' if ahead > 0 else 'first'} is better"
    found = {"figures": figures, "p": p, "test": test, "verdict": verdict, "rows": len(target)}
    if schema.classes:
        count = len(schema.classes)
        matrices = [np.bincount(target * count + outputs.argmax(axis=1), minlength=count**2) for outputs in (a, b)]
        found |= {"classes": schema.classes, "confusion": [m.reshape(count, count).tolist() for m in matrices]}
    return found


def compare(places: tuple[Path, Path], prepared: Path, shards: KeyStore | None, keys: KeyStore) -> dict[str, Any]:
    """Two bundles (or folders of a `train` stage with `prepared` beside) on a run's test rows. Raises ModelError where they do
    not answer the same question."""
    engines = [Engine(place, place, 1, keys=keys) for place in places]
    columns, target = test_rows(Sources(prepared, places[0], shards, keys), None)
    own = Engine(places[0], prepared, 1, keys=keys).schema
    if own.tasks:
        raise ModelError("models of several targets are not compared yet: compare those of one")
    for place, engine in zip(places, engines, strict=True):
        if (engine.schema.classes, engine.schema.target) != (own.classes, own.target):
            raise ModelError(f"{place}: predicts `{engine.schema.target}` otherwise than this run's rows have it")
        if missing := [f.name for f in engine.schema.features if f.name not in columns]:
            raise ModelError(f"{place}: needs the column `{missing[0]}`, which this run's rows lack")
    answers: list[np.ndarray] = [e.predict({f.name: columns[f.name] for f in e.schema.features}) for e in engines]
    has = target >= 0 if own.classes else np.isfinite(target)
    kind: Callable[[Any], Any] = np.int64 if own.classes else np.float64
    return paired(target[has].astype(kind), answers[0][has], answers[1][has], own)


def short_names(first: str, second: str) -> tuple[str, str]:
    """What tells two addresses apart: of folders, their paths from where they part."""
    a, b = Path(first).parts, Path(second).parts
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    return str(Path(*a[same:])), str(Path(*b[same:]))


def lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each figure: name, first, second, difference with its interval, which is better."""
    out = []
    for name, f in found["figures"].items():
        sure = f["low"] > 0 or f["high"] < 0
        second = (f["b"] > f["a"]) != (name in LOWER)
        better = ("second" if second else "first") if sure else ""
        out.append(
            (name, f"{f['a']:.4f}", f"{f['b']:.4f}", f"{f['b'] - f['a']:+.4f} ({f['low']:+.4f} to {f['high']:+.4f})", better)
        )
    return out
