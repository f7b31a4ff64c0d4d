"""What a model must show before it goes out: the `evaluate` section of the project file, and what training does for it
(`train.adversarial`, `train.privacy`)."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .settings import Section

SLICE = r"^\s*(?P<column>[^<>=!]+?)\s*(?:(?P<sign>>=|<=|==|!=|>|<)\s*(?P<value>.+?))?\s*$"
LIMIT = r"^(?P<sign>>=|<=) *(?P<value>-?\d+(?:\.\d+)?(?:e-?\d+)?) *(?P<ci>\(ci (?:low|high)\))?$"
ACROSS = ("rows", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "log_loss", "roc_auc", "mae", "rmse", "r2")
"""Figures of a slice."""
FIGURES = (
    "accuracy", "balanced_accuracy", "roc_auc", "average_precision", "log_loss", "brier", "ece", "mcc", "top_3", "top_5",
    "precision", "recall", "f1", "mae", "rmse", "r2",
)  # fmt: skip
"""Figures of the test rows."""
BESIDE = (
    "robust_accuracy",
    "membership_advantage",
    "cost",
    "latency_p50_ms",
    "latency_p99_ms",
    "size_mb",
    "behaviour",
    "epsilon",
)
"""What else a gate may ask for."""


class Costs(Section):
    """What a wrong answer costs, of two classes: the threshold that costs least is chosen by the validation rows."""

    positive: str
    """the class that is looked for"""
    false_positive: Annotated[float, Field(ge=0)] = 1.0
    false_negative: Annotated[float, Field(ge=0)] = 1.0


class Attack(Section):
    """How hard it is to make the model answer wrongly by small changes of its inputs."""

    method: Literal["pgd", "fgsm", "random"] = "pgd"
    """projected gradient descent (Madry et al., 2018), one step of it (Goodfellow et al., 2015), or a search that sees answers
    alone and needs no gradients"""
    epsilon: Annotated[float, Field(gt=0, le=1)] = 0.1
    """how far a number may move, as a share of its range in the training rows"""
    steps: Annotated[int, Field(ge=1)] = 20
    restarts: Annotated[int, Field(ge=1)] = 3
    rows: Annotated[int, Field(ge=1)] = 1000
    """of the test split, that are attacked"""
    fixed: list[str] = []
    """columns that no attacker can change; text, times and ones and zeros never are changed"""


class Behaviour(Section):
    """A test of what the model does (Ribeiro et al., Beyond accuracy: behavioral testing with CheckList, 2020)."""

    name: str
    test: Literal["invariance", "direction", "minimum"]
    """`invariance`: the answer stays when `change` is made; `direction`: it moves as `expect` says; `minimum`: given rows are
    answered as `expect` says"""
    change: dict[str, str | float | int] = {}
    """column to what becomes of it: a value, `+ 5`, `- 5`, `* 1.1`, or `noise 0.05` (a share of its range)"""
    where: str | None = None
    """rows that it is tried on, such as `age > 60`"""
    expect: str | None = None
    """of `direction`: `up` or `down`; of `minimum`: the class, or `>= 3` of a number"""
    of: str | None = None
    """of `direction`, where there are classes: the class whose probability is meant"""
    rows: list[dict[str, Any]] = []
    """of `minimum`: requests"""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """of the rows that must pass"""

    @model_validator(mode="after")
    def _is_whole(self):
        if self.test == "minimum":
            if not self.rows or self.expect is None or self.change:
                raise ValueError("a test `minimum` needs `rows` and `expect`, and changes nothing")
        elif not self.change or self.rows:
            raise ValueError(f"a test `{self.test}` needs `change`, a mapping of columns, and no `rows`")
        if self.test == "direction" and self.expect not in ("up", "down"):
            raise ValueError("a test `direction` needs `expect: up` or `expect: down`")
        return self


class Evaluate(Section):
    """How the model is judged, and what it must reach to go into production."""

    slices: list[Annotated[str, Field(pattern=SLICE)]] = []
    """parts of the test rows with figures of their own: `age > 60`, or a column alone, `region`, for each of its values"""
    worst: Annotated[int, Field(ge=0)] = 5
    """parts that the model does worst on, found among values and ranges of the columns and pairs of them"""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """of the intervals"""
    resamples: Annotated[int, Field(ge=0)] = 400
    """Poisson bootstrap; 0: no intervals"""
    costs: Costs | None = None
    baseline: bool | None = None
    """whether scikit-learn's linear model and boosted trees learn the same rows, to be held against (default: if the model is a
    preset)"""
    attack: Attack | None = None
    """`attack: {}` measures `robust_accuracy`"""
    behaviour: list[Behaviour] = []
    require: dict[str, Annotated[str, Field(pattern=LIMIT)]] = {}
    """figure to limit: `accuracy: ">= 0.95 (ci low)"`, `"slice:*.recall": ">= 0.8"`, `latency_p99_ms: "<= 20"`; a version that
    fails one is not put into production"""

    @field_validator("require")
    @classmethod
    def _knows_its_figures(cls, require: dict[str, str]) -> dict[str, str]:
        for name, limit in require.items():
            of_slice = re.fullmatch(r"slice:.+\.(\w+)", name)
            known = ACROSS if of_slice else (*FIGURES, *BESIDE)
            found = of_slice[1] if of_slice else name
            if found not in known:
                raise ValueError(f"`{name}`: `{found}` is no figure: there are {', '.join(known)}")
            if "(ci" in limit and (of_slice or name in BESIDE):
                raise ValueError(f"`{name}`: has no interval, so write the limit without `(ci …)`")
        return require

    @model_validator(mode="after")
    def _measures_what_it_requires(self):
        if "robust_accuracy" in self.require and self.attack is None:
            raise ValueError("require: robust_accuracy is measured by an attack: write `attack: {}` beside it")
        if "cost" in self.require and self.costs is None:
            raise ValueError("require: cost needs `costs` beside it")
        if "behaviour" in self.require and not self.behaviour:
            raise ValueError("require: behaviour needs tests: write them under `behaviour`")
        if any("(ci" in limit for limit in self.require.values()) and not self.resamples:
            raise ValueError("require: a limit of an interval needs `resamples` above 0")
        return self


class Adversarial(Section):
    """Train on inputs that were changed so that the model errs (Madry et al., Towards deep learning models resistant to
    adversarial attacks, 2018)."""

    epsilon: Annotated[float, Field(gt=0, le=1)] = 0.1
    """how far a number may move, as a share of its range in the training rows"""
    steps: Annotated[int, Field(ge=1)] = 7
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """of each step's rows"""
    fixed: list[str] = []
    """columns that no attacker can change"""


class Privacy(Section):
    """Train so that the model tells little of any one row (DP-SGD: Abadi et al., Deep learning with differential privacy, 2016).
    Steps are drawn by Poisson sampling, each row's gradient is clipped, and noise is added to their sum."""

    epsilon: Annotated[float, Field(gt=0)] | None = None
    """the budget of the whole training; the noise follows from it"""
    noise: Annotated[float, Field(gt=0)] | None = None
    """deviation of the noise, in clips, in the place of `epsilon`"""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """default: 1 / (1.1 times the training rows)"""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """the longest gradient of a row"""

    @model_validator(mode="after")
    def _is_one_budget(self):
        if (self.epsilon is None) == (self.noise is None):
            raise ValueError("write `epsilon`, the budget, or `noise`, and not both")
        return self


class Explain(Section):
    """Why the model answers as it does: of all test rows, and of the first ones each."""

    method: Literal[
        "auto", "expected_gradients", "integrated_gradients", "permutation", "shap", "shap_deep", "shap_gradient", "lime"
    ] = "auto"
    """of each row's values: gradients, or Shapley values from answers alone (`permutation`); `auto`: gradients where the inputs
    are numbers; `shap` (its permutation, deep and gradient explainers) and `lime` are the libraries of these names
    (`heliograph[explain]`)"""
    rows: Annotated[int, Field(ge=1)] = 500
    """of the test split"""
    background: Annotated[int, Field(ge=1)] = 50
    """training rows that a row is held against"""
    orders: Annotated[int, Field(ge=1)] = 5
    """of `permutation`: random orders of the columns, each also backwards"""
    repeats: Annotated[int, Field(ge=1)] = 5
    """of permuting a column, to see what it is worth"""
    dependence: Annotated[int, Field(ge=0)] = 4
    """columns, the most important ones, whose partial dependence is followed"""
    depth: Annotated[int, Field(ge=1, le=10)] = 4
    """of the decision tree that stands in for the model"""
