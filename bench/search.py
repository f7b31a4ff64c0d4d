"""Hyper-parameter search against those that people use: keras-tuner, Optuna, hyperopt, random and grid.

    uv run --group bench python bench/search.py [seeds] [evaluations]

Branin and Hartmann-6, 25 evaluations: regret after the last, the median over the seeds; the error rate of a small network on
handwritten digits, 8 seeds at most. Each seed runs all of them in turn. Then ours with four trials under way at a time, of which
the oldest ends first. Milliseconds are of one suggestion, with what the library does to learn of the value.
"""

import contextlib
import functools
import io
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from heliograph.jobs.search import SEARCHES, Config, Dimension, Space

A = np.array([[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]])
P = 1e-4 * np.array(
    [[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
     [2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]]
)  # fmt: skip
Trace = tuple[float, float]
"""(regret, milliseconds a suggestion)."""


def branin(c: Config) -> float:
    x, y = c["x"], c["y"]
    bowl = (y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6) ** 2
    return bowl + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10 - 0.397887


def hartmann6(c: Config) -> float:
    x = np.array([c[f"x{i}"] for i in range(6)])
    return float(3.32237 - (np.array([1, 1.2, 3, 3.2]) * np.exp(-(A * (x - P) ** 2).sum(1))).sum())


@functools.cache
def digits() -> Any:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    return train_test_split(x / 16, y, test_size=540, random_state=0, stratify=y)


def mlp(c: Config) -> float:
    """Error rate of two layers on handwritten digits."""
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    x, held_out, y, truth = digits()
    layers = (round(2 ** c["log2_units1"]), round(2 ** c["log2_units2"]))
    model = MLPClassifier(
        layers, learning_rate_init=10 ** c["log10_rate"], alpha=10 ** c["log10_alpha"], batch_size=round(2 ** c["log2_batch"]),
        max_iter=8, random_state=0,
    )  # fmt: skip
    try:
        with threadpool_limits(1):
            return float(1 - model.fit(x, y).score(held_out, truth))
    except ValueError:  # weights that are no numbers any more
        return 1.0


MLP = {"log10_rate": (-4, -0.3), "log2_units1": (3, 8), "log2_units2": (3, 8), "log10_alpha": (-6, 0), "log2_batch": (4, 8)}
PROBLEMS: dict[str, tuple[dict[str, tuple[float, float]], Callable[[Config], float]]] = {
    "branin": ({"x": (-5, 10), "y": (0, 15)}, branin),
    "hartmann6": ({f"x{i}": (0, 1) for i in range(6)}, hartmann6),
    "digits mlp": (MLP, mlp),
}


def ours(search: str, at_once: int = 1) -> Callable[..., Trace]:
    def run(bounds: dict[str, tuple[float, float]], of: Callable[[Config], float], trials: int, seed: int) -> Trace:
        space = Space({name: Dimension(*ends) for name, ends in bounds.items()})
        past: list[tuple[Config, float]] = []
        running: list[Config] = []
        seconds = 0.0
        while len(past) < trials:
            while len(running) < at_once and len(past) + len(running) < trials:
                began = time.perf_counter()
                running.append(SEARCHES[search](space, past, running, seed) or {})
                seconds += time.perf_counter() - began
            config = running.pop(0)
            past.append((config, of(config)))
        return min(v for _, v in past), 1e3 * seconds / trials

    return run


def grid(bounds: dict[str, tuple[float, float]], of: Callable[[Config], float], trials: int, seed: int) -> Trace:
    """The finest grid that the evaluations pay for, in a random order."""
    levels = max(2, int(trials ** (1 / len(bounds)) + 1e-9))
    space = Space({name: Dimension(*ends, step=(ends[1] - ends[0]) / (levels - 1)) for name, ends in bounds.items()})
    configs = space.grid()
    chosen = np.random.default_rng(seed).permutation(len(configs))[:trials]
    return min(of(configs[i]) for i in chosen), 0.0


def optuna(bounds: dict[str, tuple[float, float]], of: Callable[[Config], float], trials: int, seed: int) -> Trace:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, seconds = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed)), 0.0
    for _ in range(trials):
        began = time.perf_counter()
        trial = study.ask()
        config = {name: trial.suggest_float(name, *ends) for name, ends in bounds.items()}
        seconds += time.perf_counter() - began
        value = of(config)
        began = time.perf_counter()
        study.tell(trial, value)
        seconds += time.perf_counter() - began
    return study.best_value, 1e3 * seconds / trials


def hyperopt(bounds: dict[str, tuple[float, float]], of: Callable[[Config], float], trials: int, seed: int) -> Trace:
    import hyperopt

    inside, space = 0.0, {name: hyperopt.hp.uniform(name, *ends) for name, ends in bounds.items()}

    def timed(config: Config) -> float:
        nonlocal inside
        began = time.perf_counter()
        value = of(config)
        inside += time.perf_counter() - began
        return value

    known, began = hyperopt.Trials(), time.perf_counter()
    hyperopt.fmin(
        timed, space, hyperopt.tpe.suggest, trials, trials=known, rstate=np.random.default_rng(seed), show_progressbar=False
    )
    return min(known.losses()), 1e3 * (time.perf_counter() - began - inside) / trials


def keras_tuner(bounds: dict[str, tuple[float, float]], of: Callable[[Config], float], trials: int, seed: int) -> Trace:
    import keras_tuner as kt

    space = kt.HyperParameters()
    for name, (low, high) in bounds.items():
        space.Float(name, low, high)
    oracle = kt.oracles.BayesianOptimizationOracle(
        objective=kt.Objective("loss", "min"), max_trials=trials, seed=seed, hyperparameters=space
    )
    seconds, best = 0.0, math.inf
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        oracle._set_project_dir(folder, "search")
        for _ in range(trials):
            began = time.perf_counter()
            trial: Any = oracle.create_trial("tuner0")
            seconds += time.perf_counter() - began
            value = of(trial.hyperparameters.values)
            best = min(best, value)
            began = time.perf_counter()
            oracle.update_trial(trial.trial_id, {"loss": value})
            trial.status = "COMPLETED"
            oracle.end_trial(trial)
            seconds += time.perf_counter() - began
    return best, 1e3 * seconds / trials


CONTENDERS: dict[str, Callable[..., Trace]] = {
    "heliograph": ours("bayesian"), "heliograph, 4 at once": ours("bayesian", 4), "keras-tuner": keras_tuner,
    "optuna tpe": optuna, "hyperopt tpe": hyperopt, "random": ours("random"), "grid": grid,
}  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    seeds, trials = (int(n) for n in [*sys.argv[1:], *("20", "25")[len(sys.argv) - 1 :]])
    regret: dict[tuple[str, str], float] = {}
    pace: dict[str, float] = {}
    for problem, (bounds, of) in PROBLEMS.items():
        found: dict[str, list[Trace]] = {name: [] for name in CONTENDERS}
        for seed in range(seeds if problem != "digits mlp" else min(seeds, 8)):
            for name, run in CONTENDERS.items():
                found[name].append(run(bounds, of, trials, seed))
            print(f"{problem} seed {seed:<3}" + "".join(f"  {name} {of[-1][0]:.4f}" for name, of in found.items()), flush=True)
        for name, traces in found.items():
            regrets, times = np.array(traces).T
            regret[problem, name] = float(np.median(regrets))
            pace[name] = float(np.mean(times))
            low, high = np.quantile(regrets, (0.25, 0.75))
            print(f"{problem:<10} {name:<22} regret {np.median(regrets):.4f} [{low:.4f}, {high:.4f}]  {pace[name]:.0f} ms")

    def against(name: str, problem: str) -> float:
        return round(regret[problem, "heliograph"] / regret[problem, name], 4)

    print(json.dumps({
        "branin_vs_keras_tuner": against("keras-tuner", "branin"),
        "hartmann6_vs_keras_tuner": against("keras-tuner", "hartmann6"),
        "vs_optuna": [against("optuna tpe", p) for p in PROBLEMS],
        "vs_hyperopt": [against("hyperopt tpe", p) for p in PROBLEMS],
        "vs_random": [against("random", p) for p in PROBLEMS],
        "vs_grid": [against("grid", p) for p in PROBLEMS],
        "parallel_penalty": [round(regret[p, "heliograph, 4 at once"] / regret[p, "heliograph"], 3) for p in PROBLEMS],
        "milliseconds": {name: round(ms, 1) for name, ms in pace.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
