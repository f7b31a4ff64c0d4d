"""Which of the trials of a search is best."""

import numpy as np

from ..project import Project
from .record import Trial
from .search import Config, front
from .space import metrics_of, signs_of, tune_of


class Choice:
    """Which trial is best. Of several metrics: of the Pareto front, those whose first metric is at most `tolerance` worse than
    the best one, and of them the one that is best in the others, in their order."""

    def __init__(self, project: Project, done: list[Trial]):
        self.metrics, self.signs = metrics_of(project), np.array(signs_of(project))
        values = np.array([[t.values[m] for m in self.metrics] for t in done]) * self.signs
        kept = front(values)
        self.front = [done[i] for i in kept]
        """The Pareto front, by the first metric."""
        order = sorted(range(len(done)), key=lambda i: tuple(values[i]))
        if len(self.metrics) == 1:
            self.ranked, self.said = [done[i] for i in order], f"the best {self.metrics[0]}"
        else:
            tolerance = tune_of(project).tolerance
            near = {i for i in kept if values[i, 0] <= values[:, 0].min() + tolerance}
            on_front = sorted(near, key=lambda i: tuple(values[i, 1:])) + [i for i in order if i in kept and i not in near]
            self.ranked = [done[i] for i in on_front] + [done[i] for i in order if i not in kept]
            others = ", then ".join(self.metrics[1:])
            self.said = (
                f"{len(kept)} on the Pareto front; chosen: best in {others} among those whose {self.metrics[0]} is within "
                f"{tolerance:g} of the best"
            )
            self.front.sort(key=lambda t: self.signs[0] * t.values[self.metrics[0]])
        self.best = self.ranked[0]

    def values(self, trial: Trial) -> str:
        return "  ".join(figure(trial.values[m]) for m in self.metrics)


def figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"


def said(config: Config) -> str:
    return ", ".join(
        f"{key.rpartition('.')[2]} {value:.4g}" if isinstance(value, float) else f"{key.rpartition('.')[2]} {value}"
        for key, value in config.items()
    )
