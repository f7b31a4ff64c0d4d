"""Preprocessing: fitted on the training split, applied by the same code in training and in the endpoint.

The state is plain numbers in JSON, one entry a step, so a bundle can be read without trusting it. Fitting is one pass of
mergeable moments (Chan, Golub and LeVeque 1983): every block of rows gives count, mean, squared deviations, minimum and
maximum a column, and these are merged on the driver.
"""

from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..project import Step
from .schema import Schema


class Moments(BaseModel):
    """Of all numbers of one column, over rows and positions in a tensor alike."""

    model_config = ConfigDict(frozen=True)
    count: int
    mean: float
    squares: float
    """Sum of squared deviations from the mean."""
    low: float
    high: float

    def merge(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * other.count / count,
            squares=self.squares + other.squares + delta * delta * self.count * other.count / count,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
        )


def moments(features: dict[str, np.ndarray]) -> dict[str, Moments]:
    out = {}
    for name, values in features.items():
        wide = values.astype(np.float64)
        mean = float(wide.mean())
        squares = float(((wide - mean) ** 2).sum())
        out[name] = Moments(count=wide.size, mean=mean, squares=squares, low=float(wide.min()), high=float(wide.max()))
    return out


class Affine(BaseModel):
    """A fitted step: `(x - shift) / scale` for each column."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: str
    columns: dict[str, tuple[float, float]]


class Preprocessing(BaseModel):
    """The fitted state, in the order of application."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int = 1
    steps: tuple[Affine, ...]

    def apply(self, features: dict[str, np.ndarray], schema: Schema) -> dict[str, np.ndarray]:
        """float32 features `[rows, *shape]` by name, to the model's inputs by name."""
        out = dict(features)
        for step in self.steps:
            for name, (shift, scale) in step.columns.items():
                out[name] = (out[name] - np.float32(shift)) / np.float32(scale)
        numbers = [f.name for f in schema.features if f.shape == ()]
        together = {"features": np.stack([out[n] for n in numbers], axis=1)} if numbers else {}
        return together | {f.name: out[f.name] for f in schema.features if f.shape != ()}


def fit(steps: list[Step], partial: Iterable[dict[str, Moments]], schema: Schema) -> Preprocessing:
    """The state of `steps` from the moments of the training split's blocks.

    A step sees what the steps before it made of the numbers; the steps here are affine, so moments carry over exactly.
    """
    known: dict[str, Moments] = {}
    for block in partial:
        for name, found in block.items():
            known[name] = known[name].merge(found) if name in known else found
    fitted = []
    for step in steps:
        columns = {}
        for name in step.columns or [f.name for f in schema.features]:
            m = known[name]
            if step.step == "standardise":
                shift, scale = m.mean, (m.squares / m.count) ** 0.5
            else:
                shift, scale = m.low, m.high - m.low
            scale = scale or 1.0
            columns[name] = (shift, scale)
            known[name] = Moments(
                count=m.count,
                mean=(m.mean - shift) / scale,
                squares=m.squares / scale**2,
                low=(m.low - shift) / scale,
                high=(m.high - shift) / scale,
            )
        fitted.append(Affine(step=step.step, columns=columns))
    return Preprocessing(steps=tuple(fitted))
