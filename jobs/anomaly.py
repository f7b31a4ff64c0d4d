"""Anomalies in a training, seen as it runs: on rank 0, from the signals of every step.

- A loss or gradient that is NaN or infinite, at once.
- Robust z-scores of the logarithms of loss and gradient norm, and of each rank's computing time against the others', held
  against the last sound steps: their median, and the larger of their MAD and what their upper tail says. Two sums over them
  say that it is no single odd batch: the median of three steps, and a one-sided CUSUM (Page, 1954), in which a weak fault
  adds up. An Isolation Forest (Liu, Ting, Zhou, 2008), fitted on the training's own sound steps, says whether such a point is
  like those; a small autoencoder says the same of the last eight steps as a whole.
- A gradient that dies: its norm falls to a thousandth, at once while the loss stays, for `ALL` steps where it falls too (inputs
  that are far too large make a converged model certain of everything).
- A learning rate that jumps: where a model has converged, the loss shows it only many steps later.

Either model alone cries wolf on heavy tails, so a step is an anomaly when one of them finds it strange *and* it lies far out.
Logarithms are of the value plus a tenth of what it was at first: a loss that is as good as zero may double in peace.
Measured in `bench/anomaly.py`.
"""

import warnings
from collections import deque
from dataclasses import dataclass

import numpy as np

from .steps import FINITE, LOSS, NORM, RATE

WINDOW, LEAST = 128, 48
"""Sound steps that a step is held against, at most and at least."""
REFIT = 1024
"""Sound steps after which the models are fitted anew, once there are so many; until then each time that they have doubled."""
RECENTRE = 8
"""Sound steps for which a median and a deviation hold."""
SPAN = 8
"""Steps of the autoencoder's window."""
FAR, FAR_ALL, FAR_SUM, MOST = (4.5, 6.5), (3.2, 2.6), (11.0, 16.0), (10.0, 6.0)
"""How far out a point must lie, of loss and gradient, and of times, which stutter by themselves: the median of three and the
least of `ALL`, in deviations; the CUSUM, in deviations added up; and the most that one step adds to it."""
ALL = 4
DRIFT = 1.2
"""What a step takes from the CUSUM."""
HELD = 16
"""Steps after which what was strange, and yet no anomaly, belongs to what is normal."""
QUIET = 25
"""Steps after an anomaly in which its kind is not reported again."""
MOST_HISTORY = 1024
DEAD = 1e-3
JUMP = 3.0
"""A learning rate above so many times the most that it has been: schedules rise step by step, and restart below their top."""


@dataclass(frozen=True)
class Anomaly:
    step: int
    """Counted from 1."""
    kind: str
    text: str
    serious: bool
    """Whether it harms the model (a slow rank does not)."""


def load_models() -> None:
    """Import scikit-learn before the first models are due: it takes seconds."""
    import sklearn.ensemble
    import sklearn.neural_network  # noqa: F401


class Detector:
    """`see` takes the signals of the next steps and says what is wrong in them."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.names = ["loss", "gradient", *(f"time {rank}" for rank in range(ranks))]
        self._raw: deque[np.ndarray] = deque(maxlen=WINDOW)
        """Logarithms of sound steps."""
        self._stale = 0
        """How many of them came since the last median."""
        self._z: deque[np.ndarray] = deque(maxlen=SPAN)
        """z-scores of the last steps, sound or not."""
        self._points: deque[np.ndarray] = deque(maxlen=MOST_HISTORY)
        self._windows: deque[np.ndarray] = deque(maxlen=MOST_HISTORY)
        self._first: list[np.ndarray] = []
        self._learned, self._due = 0, 2 * LEAST
        self._centre = self._spread = np.zeros(0)
        self._sum = np.zeros(len(self.names))
        times = len(self.names) - 2
        self._far_median, self._far_all, self._far_sum, self._most = (
            np.array([m, m, *[t] * times]) for m, t in (FAR, FAR_ALL, FAR_SUM, MOST)
        )  # fmt: skip
        self._held: deque[tuple[int, np.ndarray]] = deque()
        self._least = np.array([0.08, 0.08, *[0.04] * times])
        """The least deviation of each logarithm that counts."""
        self._forest = self._coder = None
        self._quiet: dict[str, int] = {}
        self._dying = 0
        """Steps in a row without a gradient to speak of."""
        self._top_rate = 0.0

    def see(self, done: int, own: np.ndarray, seconds: np.ndarray) -> list[Anomaly]:
        """Steps `done + 1`, `done + 2`, …: own is `[steps, OWN]`, seconds `[steps, ranks]` of `steps.Signals`."""
        found = []
        for i in range(len(own)):
            found += self._step(done + 1 + i, own[i], seconds[i])
        return found

    def forget(self) -> None:
        """Training went back to a checkpoint: the last steps say nothing of the next ones."""
        self._z.clear()
        self._sum[:] = 0.0
        self._quiet.clear()

    def _step(self, step: int, own: np.ndarray, seconds: np.ndarray) -> list[Anomaly]:
        if not own[FINITE]:
            return self._say(step, "nan", "the gradient is not finite (NaN or infinite): the step was left out", True)
        if step == 1:
            return []  # its time is the compilation's
        values = np.array([own[LOSS], own[NORM]], float)
        if len(self._first) < 16:
            self._first.append(np.abs(values))
        floor = 0.1 * np.median(self._first, axis=0) + 1e-12
        time = np.log(np.maximum(seconds, 1e-6))
        if self.ranks > 1:  # against the other ranks: whatever slows all of them is not a rank's fault
            time = np.array([time[r] - np.median(np.delete(time, r)) for r in range(self.ranks)])
        raw = np.concatenate([np.log(np.abs(values) + floor), time])
        jumped = own[RATE] > JUMP * self._top_rate
        self._top_rate = max(self._top_rate, float(own[RATE]))
        if len(self._raw) < LEAST:
            self._keep(raw)
            return []
        if self._stale >= RECENTRE or not len(self._centre):
            self._recentre()
        centre = self._centre
        z = np.clip((raw - centre) / self._spread, -1.0, self._most)
        self._z.append(z)
        self._sum = np.maximum(0.0, self._sum + z - DRIFT)
        recent = np.array(self._z)
        median = np.median(recent[-3:], axis=0)
        point = np.concatenate([median, self._sum])
        far = self._judge(point, recent)
        sound = (z < 5.0).all() and (self._sum < self._far_sum / 2).all()
        if sound:
            self._keep(raw)
            self._learn(point, recent)
        found = []
        if jumped:
            found += self._say(step, "rate", f"the learning rate jumped to {own[RATE]:.3g}", True)
        self._dying = self._dying + 1 if own[NORM] < DEAD * (np.exp(centre[1]) - floor[1]) else 0
        if self._dying == ALL or (own[NORM] < DEAD * np.exp(centre[1]) and own[LOSS] > 0.5 * np.exp(centre[0])):
            found += self._say(step, "gradient", f"the gradient dies: its norm is {own[NORM]:.2g}", True)
        if far is not None:
            found += self._name(step, far, own, seconds, centre)
            self._sum[:] = 0.0
            self._held.clear()
        elif not sound:
            self._held.append((step, raw))
        while self._held and self._held[0][0] <= step - HELD:
            self._keep(self._held.popleft()[1])
        return found

    def _keep(self, raw: np.ndarray) -> None:
        self._raw.append(raw)
        self._stale += 1

    def _recentre(self) -> None:
        history, self._stale = np.array(self._raw), 0
        self._centre = np.median(history, axis=0)
        mad = 1.4826 * np.median(np.abs(history - self._centre), axis=0)
        tail = (np.quantile(history, 0.97, axis=0) - self._centre) / 1.88
        self._spread = np.maximum(np.maximum(mad, tail), self._least)

    def _judge(self, point: np.ndarray, recent: np.ndarray) -> int | None:
        """The signal that lies furthest out, if it lies far and a model finds the point strange."""
        count = len(self.names)
        over = np.maximum(point[:count] / self._far_median, point[count:] / self._far_sum)
        if len(recent) >= ALL:
            over = np.maximum(over, recent[-ALL:].min(axis=0) / self._far_all)
        furthest = int(np.argmax(over))
        if over[furthest] < 1:
            return None
        if self._forest is None or self._coder is None:
            return furthest
        strange = self._forest.score_samples([point])[0] < self._forest_bound
        if not strange and len(recent) == SPAN:
            strange = self._error(recent.reshape(1, -1))[0] > self._coder_bound
        return furthest if strange else None

    def _learn(self, point: np.ndarray, recent: np.ndarray) -> None:
        self._points.append(point)
        if len(recent) == SPAN:
            self._windows.append(recent.reshape(-1))
        self._learned += 1
        if self._learned < self._due or len(self._windows) < LEAST:
            return
        from sklearn.ensemble import IsolationForest
        from sklearn.neural_network import MLPRegressor

        self._due = self._learned + min(self._learned, REFIT)
        points, windows = np.array(self._points), np.clip(np.array(self._windows), -6, 6)
        self._forest = IsolationForest(n_estimators=64, random_state=0).fit(points)  # of 256 samples each, as in the paper
        self._forest_bound = np.quantile(self._forest.score_samples(points), 0.02)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._coder = MLPRegressor(hidden_layer_sizes=(6,), activation="tanh", max_iter=60, random_state=0).fit(
                windows, windows
            )
        errors = self._error(windows)
        self._coder_bound = np.median(errors) + 8 * 1.4826 * np.median(np.abs(errors - np.median(errors)))

    def _error(self, windows: np.ndarray) -> np.ndarray:
        assert self._coder is not None
        windows = np.clip(windows, -20, 20)
        return ((self._coder.predict(windows) - windows) ** 2).mean(axis=1)

    def _name(self, step: int, signal: int, own: np.ndarray, seconds: np.ndarray, centre: np.ndarray) -> list[Anomaly]:
        name = self.names[signal]
        if name == "loss":
            return self._say(step, name, f"the loss jumped to {own[LOSS]:.3g} from {np.exp(centre[0]):.3g}", True)
        if name == "gradient":
            return self._say(step, name, f"the gradient's norm jumped to {own[NORM]:.3g} from {np.exp(centre[1]):.3g}", True)
        rank = int(name.split()[1])
        usual = float(np.exp(centre[signal]))
        now = seconds[rank] / (np.median(np.delete(seconds, rank)) if self.ranks > 1 else usual)
        text = f"rank {rank} is slow: a step takes it {1000 * seconds[rank]:.3g} ms"
        text += (
            f", {now:.2f} times the other ranks' (before: {usual:.2f})" if self.ranks > 1 else f", before {1000 * usual:.3g} ms"
        )
        return self._say(step, name, text, False)

    def _say(self, step: int, kind: str, text: str, serious: bool) -> list[Anomaly]:
        family = "time" if kind.startswith("time") else "model"
        quiet = step <= self._quiet.get(family, -1)
        self._quiet[family] = step + QUIET
        return [] if quiet else [Anomaly(step, kind, text, serious)]
