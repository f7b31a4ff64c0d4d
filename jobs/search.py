"""Search: which configuration to try next, from what the ones before have come to.

A searcher is a function of the past: `suggest(space, past, running, seed)` gives the next configuration, and the same one for the
same past. So there is no state to save: whoever knows the finished trials can go on.

    grid      all combinations, in order
    random    independent draws
    tpe       Tree-structured Parzen estimator (Bergstra et al., 2011), Optuna's
    bayesian  a Gaussian process and expected improvement (Jones, Schonlau and Welch, 1998), ours: see `bayesian`

`tune_search` puts any of them into a program of Ray Tune. Values are minimised.
"""

import ast
import functools
import itertools
import json
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Config = dict[str, Any]
Past = Sequence[tuple[Config, float]]
"""Finished trials: (configuration, value); the value is infinite for one that failed."""
LEVELS = 5
"""Of a dimension without steps, on a grid."""
CANDIDATES, NEAR = 1024, 256
"""Points at which the expected improvement is asked: anywhere, and around the best."""
HOPE = 0.25
"""Deviations by which what runs is believed to be better than expected, so that others look elsewhere.

Four at a time, 40 seeds, the median regret on Branin and Hartmann-6: 0.029 and 1.05 with none, 0.017 and 0.95 with this, 0.022
and 0.97 with half a deviation, 0.065 and 1.11 with one; fantasies drawn at random 0.034 and 1.19, eight of them averaged 0.023
and 0.96, constant liars 0.4 and more. One at a time with three results fewer, which four in parallel lack: 0.010 and 0.96."""
TRIES = 1000
"""Draws that may break the constraints or repeat, one after the other, before the space counts as used up."""


@dataclass(frozen=True)
class Dimension:
    """One parameter. Values lie between `low` and `high` (both reached), or are one of `choices`.

    step: between values. log: as many trials between 1 and 10 as between 10 and 100. integer: whole numbers. when: the values
    that other parameters must have for this one to exist."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @functools.cached_property
    def count(self) -> int:
        """How many values there are; 0 for any number."""
        if self.choices:
            return len(self.choices)
        step = self.step or (1 if self.integer else 0)
        return math.floor((self.high - self.low) / step + 1e-9) + 1 if step else 0

    def value(self, place: float) -> Any:
        """place: in [0, 1]."""
        if self.choices:
            return self.choices[min(int(place * self.count), self.count - 1)]
        if not self.count:
            return self._between(place)
        step = self.step or 1
        index = round((self._between(place) - self.low) / step) if self.log else int(place * self.count)
        found = self.low + step * min(max(index, 0), self.count - 1)
        return round(found) if self.integer else float(f"{found:.12g}")

    def _between(self, place: float) -> float:
        if self.log:
            found = math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))
        else:
            found = self.low + place * (self.high - self.low)
        return min(max(found, self.low), self.high)  # which rounding would pass

    def place(self, value: Any) -> float:
        """The inverse of `value`, in the middle of what comes to the same."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / self.count
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        if self.count:
            return (round((value - self.low) / (self.step or 1)) + 0.5) / self.count
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, (str, bool)) or not self.low <= value <= self.high:
            return False
        return not self.count or math.isclose(self.value(self.place(value)), value, rel_tol=1e-9)

    def nearest(self, value: Any) -> Any:
        """The value of this dimension that comes closest; its middle for what is no number, its first choice for none of them."""
        if self.choices:
            return value if value in self.choices else self.choices[0]
        if isinstance(value, (str, bool)) or value is None:
            return self.value(0.5)
        return self.value(self.place(min(max(value, self.low), self.high)))

    def grid(self) -> list[Any]:
        if self.count and (self.choices or not self.log):
            return [self.value((i + 0.5) / self.count) for i in range(self.count)]
        return list(dict.fromkeys(self.value(i / (LEVELS - 1)) for i in range(LEVELS)))


@dataclass(frozen=True)
class Space:
    """What is searched. constraints: such as `a >= b` or `a * b <= 512`, which every configuration keeps."""

    dimensions: dict[str, Dimension]
    constraints: tuple[str, ...] = ()
    _checks: list[Callable[[Config], bool]] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        self._checks.extend(constraint(text, set(self.dimensions)) for text in self.constraints)

    def config(self, places: np.ndarray) -> Config:
        """places: `[dimensions]` in [0, 1]; a parameter that does not exist for the others' values is left out."""
        found: Config = {}
        for (name, dimension), place in zip(self.dimensions.items(), places, strict=True):
            if all(found.get(other) in values for other, values in dimension.when):
                found[name] = dimension.value(float(place))
        return found

    def nearest(self, values: Config) -> Config:
        """What comes closest to values of another space. It need not keep the constraints."""
        found: Config = {}
        for name, dimension in self.dimensions.items():
            if all(found.get(other) in allowed for other, allowed in dimension.when):
                found[name] = dimension.nearest(values.get(name))
        return found

    def keeps(self, config: Config) -> bool:
        """Whether it keeps the constraints, of those whose parameters it has."""
        return all(check(config) for check in self._checks)

    def holds(self, config: Config) -> bool:
        """Whether it is of this space: so that trials of another one can be taken over."""
        for name, dimension in self.dimensions.items():
            exists = all(config.get(other) in values for other, values in dimension.when)
            if (name in config) != exists or (exists and not dimension.holds(config[name])):
                return False
        return config.keys() <= self.dimensions.keys() and self.keeps(config)

    def features(self, configs: Sequence[Config]) -> np.ndarray:
        """What the surrogate sees: a column in [0, 1] for each number (a parameter that is not there is in the middle), and
        one for each choice."""
        rows = []
        for config in configs:
            row: list[float] = []
            for name, dimension in self.dimensions.items():
                if dimension.choices:
                    row += [float(name in config and config[name] == choice) for choice in dimension.choices]
                else:
                    row.append(dimension.place(config[name]) if name in config else 0.5)
            rows.append(row)
        return np.array(rows, float)

    def grid(self) -> list[Config]:
        found: dict[str, Config] = {}
        for values in itertools.product(*(d.grid() for d in self.dimensions.values())):
            config: Config = {}
            for (name, dimension), value in zip(self.dimensions.items(), values, strict=True):
                if all(config.get(other) in allowed for other, allowed in dimension.when):
                    config[name] = value
            if self.keeps(config):
                found[repr(config)] = config
        return list(found.values())


OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Mod: operator.mod,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip


def constraint(text: str, names: set[str]) -> Callable[[Config], bool]:
    """Parameters (by their full names), numbers, texts, + - * / %, comparisons, `and`, `or`. Raises ValueError."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"`{text}` is no constraint: {error.msg}") from None
    used: set[str] = set()

    def build(node: ast.AST) -> Callable[[Config], Any]:
        match node:
            case ast.Constant(value=value) if isinstance(value, (int, float, str, bool)):
                return lambda config: value
            case ast.Name() | ast.Attribute():
                name = ast.unparse(node)
                if name not in names:
                    raise ValueError(f"`{text}`: `{name}` is not in the space: {', '.join(sorted(names))}")
                used.add(name)
                return lambda config: config[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
                a, b = build(left), build(right)
                return lambda config: OPERATIONS[type(op)](a(config), b(config))
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in OPERATIONS for op in ops):
                parts = [build(left), *map(build, others)]
                pairs = list(zip(ops, itertools.pairwise(parts), strict=True))
                return lambda config: all(OPERATIONS[type(op)](a(config), b(config)) for op, (a, b) in pairs)
            case ast.BoolOp(op=op, values=values):
                each, join = [build(v) for v in values], all if isinstance(op, ast.And) else any
                return lambda config: join(part(config) for part in each)
        raise ValueError(f"`{text}`: `{ast.unparse(node)}` cannot be in a constraint")

    check = build(tree)
    return lambda config: bool(check(config)) if used <= config.keys() else True


def front(values: np.ndarray) -> list[int]:
    """The Pareto front of `[trials, objectives]`: the rows that no other row beats in one and equals or beats in all."""
    at_most, less = (values[:, None] <= values[None]).all(axis=2), (values[:, None] < values[None]).any(axis=2)
    return np.flatnonzero(~(at_most & less).any(axis=0)).tolist()


def blended(values: np.ndarray, seed: int) -> np.ndarray:
    """`[trials, objectives]` to one value a trial: the augmented Tchebycheff norm with weights drawn anew for each suggestion, so
    that suggestions spread along the front (Knowles, ParEGO, 2006)."""
    finite = np.isfinite(values).all(axis=1)
    if not finite.any():
        return np.full(len(values), math.inf)
    low, high = values[finite].min(axis=0), values[finite].max(axis=0)
    weights = np.random.default_rng(seed).dirichlet(np.ones(values.shape[1]))
    share = weights * (values - low) / np.where(high > low, high - low, 1.0)
    return np.where(finite, share.max(axis=1) + 0.05 * share.sum(axis=1), math.inf)


def grid(space: Space, past: Past, running: Sequence[Config], seed: int) -> Config | None:
    tried = _names([*(c for c, _ in past), *running])
    return next((config for config in space.grid() if repr(config) not in tried), None)


def random(space: Space, past: Past, running: Sequence[Config], seed: int) -> Config | None:
    """Never the same twice. None when nothing new is found."""
    tried = _names([*(c for c, _ in past), *running])
    draw = np.random.default_rng([seed, len(tried)])
    return _first(space, tried, (draw.random(len(space.dimensions)) for _ in range(TRIES)))


def tpe(space: Space, past: Past, running: Sequence[Config], seed: int) -> Config | None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed + 1000 * (len(past) + len(running))))
    kinds = {name: _distribution(d) for name, d in space.dimensions.items()}
    worst = max((v for _, v in past if math.isfinite(v)), default=0.0)
    for config, value in past:
        distributions = {name: kinds[name] for name in config}
        known = value if math.isfinite(value) else worst
        study.add_trial(optuna.trial.create_trial(params=config, distributions=distributions, value=known))
    tried = _names([*(c for c, _ in past), *running])
    for _ in range(TRIES // 10):
        trial, config = study.ask(), {}
        for name, dimension in space.dimensions.items():
            if all(config.get(other) in values for other, values in dimension.when):
                config[name] = trial._suggest(name, kinds[name])  # what `suggest_float` and its like come to
        if repr(config) not in tried and space.keeps(config):
            return config
        study.tell(trial, worst)
    return random(space, past, running, seed)


def _distribution(dimension: Dimension) -> Any:
    from optuna import distributions

    if dimension.choices:
        return distributions.CategoricalDistribution(dimension.choices)
    if dimension.integer:
        step = int(dimension.step or 1)
        high = int(dimension.low + step * (dimension.count - 1))
        return distributions.IntDistribution(int(dimension.low), high, dimension.log, 1 if dimension.log else step)
    return distributions.FloatDistribution(
        dimension.low, dimension.high, dimension.log, None if dimension.log else dimension.step
    )


def bayesian(space: Space, past: Past, running: Sequence[Config], seed: int) -> Config | None:
    """The configuration with the largest expected improvement under a Gaussian process.

    The first min(2d, 10) are a scrambled Sobol sequence. Then scikit-learn's process (Matérn 5/2, a length scale for each
    column, noise; log-normal priors) is fitted to the values, made Gaussian by Yeo-Johnson where bad ones stick out and cut at
    2.5 deviations where they do not. Improvement is over the best *mean* of what was tried, since values are noisy. What is
    running counts with about the value that the process expects there (the "kriging believer" of Ginsbourger et al., 2010), so
    that parallel trials go to different places. Candidates are real configurations: whole numbers and choices are as they will
    be.
    """
    found = surrogate(space, past, running, seed)
    tried = _names([*(c for c, _ in past), *running])
    if found is None:
        return _start(space, tried, seed)
    draw = np.random.default_rng([seed, len(tried)])
    most: tuple[float, Config | None] = (-1.0, None)
    d, best = len(space.dimensions), [_places(space, config) for config in found.best(3)]
    around = [draw.random((CANDIDATES, d)), *(_near(draw, b, NEAR // 2, scale) for b in best for scale in (0.2, 0.05))]
    for scale in (None, 0.05, 0.015, 0.005):
        if scale is not None:
            if most[1] is None:
                break
            around = [_near(draw, _places(space, most[1]), NEAR, scale)]
        configs = [c for c in map(space.config, np.concatenate(around).clip(0, 1)) if space.keeps(c) and repr(c) not in tried]
        if configs:
            gains = found.improvement(space.features(configs))
            if gains.max() > most[0]:
                most = float(gains.max()), configs[int(gains.argmax())]
    return most[1] or random(space, past, running, seed)


def expected_improvement(space: Space, past: Past, seed: int = 0) -> float:
    """The largest one there is, of the range of what was found; infinite while nothing is known."""
    found = surrogate(space, past, (), seed)
    if found is None:
        return math.inf
    draw = np.random.default_rng(seed)
    configs = [c for c in map(space.config, draw.random((CANDIDATES, len(space.dimensions)))) if space.keeps(c)]
    return float(found.improvement(space.features(configs)).max()) if configs else 0.0


class Surrogate:
    """A fitted process over `Space.features`, of values with mean 0 and deviation 1."""

    def __init__(self, process: Any, configs: list[Config], x: np.ndarray):
        self.process, self.configs, self.x = process, configs, x
        self.noise = float(process.kernel_.k2.noise_level)
        self.mean = self.process.predict(x)

    def best(self, count: int) -> list[Config]:
        return [self.configs[i] for i in np.argsort(self.mean)[:count]]

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation, without the noise."""
        mean, deviation = self.process.predict(x, return_std=True)
        return mean, np.sqrt(np.maximum(deviation**2 - self.noise, 1e-12))

    def improvement(self, x: np.ndarray) -> np.ndarray:
        from scipy.special import ndtr

        mean, deviation = self.predict(x)
        gap = self.mean.min() - mean
        z = gap / deviation
        return gap * ndtr(z) + deviation * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def surrogate(space: Space, past: Past, running: Sequence[Config], seed: int) -> Surrogate | None:
    """None while there are too few finite values."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    values = np.array([v for _, v in past], float)
    known = np.isfinite(values)
    if len(past) + len(running) < starts(space) or known.sum() < 2 or np.ptp(values[known]) == 0:
        return None
    values[~known] = values[known].max()  # a failure is as bad as the worst that did not fail
    configs = [c for c, _ in past]
    x, y = space.features(configs), gaussian(values)
    width = x.shape[1]
    scales: Any = np.full(width, 0.5)
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(scales, (0.05, 10.0), nu=2.5) + WhiteKernel(1e-3, (1e-6, 0.3))
    process: Any = GaussianProcessRegressor(kernel, alpha=1e-9, optimizer=_most_probable)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the noise at its bound: a function without any
        process.fit(x, y)
    if running:
        x, configs = np.concatenate([x, space.features(running)]), [*configs, *running]
        mean, deviation = process.predict(x[len(y) :], return_std=True)
        believed = np.concatenate([y, mean - HOPE * deviation])
        process = GaussianProcessRegressor(process.kernel_, alpha=1e-9, optimizer=None)  # pyright: ignore[reportArgumentType]
        process.fit(x, believed)
    return Surrogate(process, configs, x)


def _most_probable(loss: Callable[..., Any], start: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, float]:
    """The kernel's parameters, by their logarithms: the likelihood's best, held by a wide normal prior, without which few trials
    in many dimensions are explained by a few of them. (Four at a time on Hartmann-6: a median regret of 0.50 instead of 1.19.)"""
    from scipy.optimize import minimize

    deviation = np.full(len(start), 1.0)
    deviation[-1] = 3.0  # of the noise, less is known

    def held(logs: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = loss(logs)
        z = (logs - start) / deviation
        return value + 0.5 * float(z @ z), slope + z / deviation

    found = minimize(held, start, jac=True, bounds=bounds, method="L-BFGS-B")
    return found.x, found.fun


def gaussian(values: np.ndarray) -> np.ndarray:
    """Values to mean 0 and deviation 1: by Yeo-Johnson where bad ones stick out, cut at 2.5 deviations where they do not.

    Measured on functions with cliffs and on smooth ones: each transform loses on the other kind."""
    from scipy.stats import skew
    from sklearn.preprocessing import PowerTransformer

    standard = (values - values.mean()) / (values.std() or 1.0)
    if float(skew(standard)) <= 1:
        return np.minimum(standard, 2.5)
    made = np.asarray(PowerTransformer(standardize=True).fit_transform(standard[:, None]))[:, 0]
    return made if np.isfinite(made).all() and made.std() > 1e-9 else standard


def starts(space: Space) -> int:
    return min(2 * len(space.dimensions), 10)


def _start(space: Space, tried: set[str], seed: int) -> Config | None:
    from scipy.stats import qmc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a count that is no power of two
        points = qmc.Sobol(len(space.dimensions), rng=seed).random(TRIES)
    return _first(space, tried, iter(points))


def _first(space: Space, tried: set[str], points: Any) -> Config | None:
    configs = (space.config(point) for point in points)
    return next((c for c in configs if space.keeps(c) and repr(c) not in tried), None)


def _places(space: Space, config: Config) -> np.ndarray:
    return np.array([d.place(config[n]) if n in config else 0.5 for n, d in space.dimensions.items()])


def _near(draw: np.random.Generator, place: np.ndarray, count: int, scale: float) -> np.ndarray:
    """Around a place; some move in a few dimensions only, and a choice among few must be able to change."""
    points = place + draw.normal(0, scale, (count, len(place)))
    points = np.where(draw.random(points.shape) < 0.7, points, place)
    return np.where(draw.random(points.shape) < 0.05, draw.random(points.shape), points)


def _names(configs: Sequence[Config]) -> set[str]:
    return {repr(config) for config in configs}


SEARCHES: dict[str, Callable[[Space, Past, Sequence[Config], int], Config | None]] = {
    "grid": grid, "random": random, "bayesian": bayesian, "tpe": tpe,
}  # fmt: skip


def tune_search(space: Space, metric: str, mode: str, search: str = "bayesian", seed: int = 0, past: Past = ()) -> Any:
    """Any of these as a search algorithm of Ray Tune: `tune.TuneConfig(search_alg=tune_search(space, "loss", "min"))`.

    The trainable is given the configuration. past: trials of before, in the metric's own direction. Trials that failed count
    as the worst."""
    from ray.tune.search import Searcher

    sign = 1.0 if mode == "min" else -1.0

    class TuneSearch(Searcher):
        def __init__(self) -> None:
            super().__init__(metric=metric, mode=mode)
            self.past: list[tuple[Config, float]] = [(c, sign * v) for c, v in past]
            self.running: dict[str, Config] = {}

        def suggest(self, trial_id: str) -> Any:
            found = SEARCHES[search](space, self.past, list(self.running.values()), seed)
            if found is None:
                return Searcher.FINISHED
            self.running[trial_id] = found
            return dict(found)

        def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
            config = self.running.pop(trial_id)
            value = float((result or {}).get(metric, math.nan))
            self.past.append((config, sign * value if math.isfinite(value) and not error else math.inf))

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).write_text(json.dumps([self.past, self.running]))

        def restore(self, checkpoint_path: str) -> None:
            past, self.running = json.loads(Path(checkpoint_path).read_text())
            self.past = [(config, value) for config, value in past]

    return TuneSearch()
