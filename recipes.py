"""How a trained model is made smaller and faster: the `compress` section of the project file.

A recipe is a list of steps. Steps that train (`distil`, `prune`, `channels`, `qat`) go from one Keras model to another; the last
step may say how its numbers are kept (`dynamic_range`, `float16`, `int8`, `int4`, `onnx_int8`). Each recipe is a candidate.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from .settings import Section


class Training(Section):
    """A step that trains, as `train` says but for what is written here."""

    epochs: Annotated[int, Field(ge=1)] | None = None
    """default: a third of `train.epochs`, 3 at least (of `distil`: all)"""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """default: `train.optimizer`'s"""


class Distil(Training):
    """Train another, smaller model to answer as teachers do (Hinton, Vinyals and Dean, 2015)."""

    step: Literal["distil"]
    build: Annotated[str, Field(pattern=r"^\w+:\w+$")] | None = None
    """`file:function` that builds the student (default: `model.build`)"""
    hp: dict[str, bool | int | float | str] = {}
    """what is other in the student than in `model.hp`"""
    teachers: list[str] = []
    """models by name, folder or file, as in `model.start.model`; several answer by their mean (default: this project's model)"""
    temperature: Annotated[float, Field(gt=0)] = 3.0
    """softens the probabilities of both"""
    labels: Annotated[float, Field(ge=0, le=1)] = 0.1
    """the share of the loss that is the labels'; the rest is the teachers'"""
    features: dict[str, str] = {}
    """layers of the student to layers of the (first) teacher, whose outputs they shall resemble"""


class Prune(Training):
    """Set the smallest weights of all layers together to zero, step by step while it trains on (Zhu and Gupta, 2017)."""

    step: Literal["prune"]
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """the share of the weights that become zero"""
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d?:[1-9]\d?$")] | None = None
    """`2:4`: of each 4 weights in a row of inputs the 2 largest stay, in the place of `sparsity`"""
    layers: list[str] = ["*"]
    """patterns of names"""

    @field_validator("pattern")
    @classmethod
    def _keeps_some(cls, pattern: str | None) -> str | None:
        if pattern and not int(pattern.split(":")[0]) < int(pattern.split(":")[1]):
            raise ValueError("N:M keeps N of each M weights: N must be smaller than M")
        return pattern


class Channels(Training):
    """Take whole channels and units out, those with the smallest weights, and train the smaller model on."""

    step: Literal["channels"]
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """of the channels that go"""
    layers: list[str] = ["*"]
    """patterns of names; layers whose channels cannot go (the last one, those that are added to others) stay as they are"""


class Qat(Training):
    """Train with weights and activations rounded to 8 bits, so that `int8` afterwards costs less (Jacob et al., 2018)."""

    step: Literal["qat"]


class DynamicRange(Section):
    """LiteRT, weights in 8 bits; activations as they come."""

    step: Literal["dynamic_range"]


class Float16(Section):
    """LiteRT, weights in 16 bits."""

    step: Literal["float16"]


class Calibrated(Section):
    rows: Annotated[int, Field(ge=1)] = 256
    """of the training data, which show how large activations become"""


class Int8(Calibrated):
    """LiteRT, weights and activations in 8 bits."""

    step: Literal["int8"]


class Int4(Section):
    """LiteRT, weights in 4 bits (ai-edge-quantizer)."""

    step: Literal["int4"]


class OnnxInt8(Calibrated):
    """ONNX Runtime, weights and activations in 8 bits (QDQ)."""

    step: Literal["onnx_int8"]


Trains = Distil | Prune | Channels | Qat
Numbers = DynamicRange | Float16 | Int8 | Int4 | OnnxInt8


def _named(step: Any) -> Any:
    return {"step": step} if isinstance(step, str) else step


def _listed(recipe: Any) -> Any:
    return [recipe] if isinstance(recipe, (str, dict)) else recipe


AnyStep = Annotated[Trains | Numbers, Field(discriminator="step"), BeforeValidator(_named)]
Recipe = Annotated[list[AnyStep], Field(min_length=1), BeforeValidator(_listed)]
FIGURES = ("accuracy", "roc_auc", "mae", "rmse", "r2")
"""Of the rows, in the order in which they are looked for."""
REQUIRED = (*FIGURES, "drop", "size", "gzip", "latency", "latency_ms")


class Compress(Section):
    """Smaller and faster forms of the trained model, made side by side; the best that is good enough goes into the bundle."""

    recipes: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")], Recipe] = {
        "dynamic-range": [DynamicRange(step="dynamic_range")],
        "int8": [Int8(step="int8")],
    }
    """name to steps; a step without settings is its name: `small: [{step: prune, sparsity: 0.9}, int8]`"""
    require: dict[str, Annotated[str, Field(pattern=r"^(>=|<=) *-?\d+(\.\d+)?(e-?\d+)?$")]] = {"drop": "<= 0.01"}
    """figure to limit: `accuracy`, `roc_auc`, `r2`, `mae`, `rmse`; `drop` (of accuracy or R² against the trained model);
    `size`, `gzip`, `latency` (shares of its float32 file, of that compressed, of its time); `latency_ms` (of one row)"""
    prefer: Literal["latency", "size"] = "latency"
    """the least of which is chosen among those that meet it"""
    parallel: Annotated[int, Field(ge=1)] | None = None
    """recipes at a time (default: what the cluster holds, 4 at most)"""

    @field_validator("recipes")
    @classmethod
    def _ends_with_numbers(cls, recipes: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name, steps in recipes.items():
            if early := next((s.step for s in steps[:-1] if isinstance(s, Numbers)), None):
                raise ValueError(f"`{name}`: {early} says how numbers are kept, so it can only be the last step")
        return recipes

    @field_validator("require")
    @classmethod
    def _knows_its_figures(cls, require: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in require if name not in REQUIRED]:
            raise ValueError(f"`{unknown[0]}` is no figure of a candidate: there are {', '.join(REQUIRED)}")
        return require
