"""Fusion: several trained models become one, which is a bundle and an endpoint like any other.

    mean, weighted, stacking   one network that holds the members: what they answer is averaged, or given to a last layer
    soup, greedy_soup          one network of a member's size, whose weights are averages of theirs

What is chosen by rows (weights, the last layer, who is in a greedy soup) is chosen by the validation rows, which no member was
trained on; so members must come from the same data and split. How strong the last layer's penalty is, is chosen by folds of these
rows, each judged by a layer that was fitted on the others (stacking, Wolpert, 1992), and so is the figure that is told of it.

Averages of weights mean something only where the members have begun as the same network (Wortsman et al., Model soups, 2022):
independent ones answer no better than chance once averaged, so models whose bundles do not name one ancestor are refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..cluster.sealed import Seal
from ..cluster.storage import read_json, write_json
from ..datasets.preprocess import Preprocessing
from ..datasets.schema import Schema
from ..datasets.shards import Manifest
from ..errors import ModelError
from ..project import FILE, Fuse
from .engine import called, keras_model
from .export import answers, export, sample
from .model import check_shapes
from .registry import Registry
from .stages import hashed
from .steps import claim
from .transfer import digest, find

FOLDS = 5
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
SMALLEST = 1e-7
BY_ROWS = ("weighted", "stacking", "greedy_soup")
OF_WEIGHTS = ("soup", "greedy_soup")


@dataclass(frozen=True)
class Members:
    """What is fused, and for what. places: folders or files of models; names: as the project has them; data: the fingerprint of
    the prepared data."""

    settings: Fuse
    places: tuple[Path, ...]
    prepared: Path
    data: str
    keys: KeyStore | None
    """Opens the shards, if they are encrypted."""
    sealing: KeyStore
    encrypt: bool

    def note(self, i: int) -> dict[str, Any]:
        """What is known of how a member came to be; nothing of a bare file."""
        file = self.places[i] / "bundle.json"
        return read_json(file)["lineage"] if file.is_file() else {}

    @property
    def digest(self) -> str:
        return hashed([digest(place) for place in self.places])

    def lineage(self) -> dict[str, Any]:
        """For the bundle of what they become, which has their ancestor where it is an average of weights."""
        models = [self.note(i) for i in range(len(self.places))]
        fusion = {"by": self.settings.by, "members": list(self.settings.members), "lineages": models}
        return {"fusion": fusion} | ({"ancestor": models[0]["ancestor"]} if self.settings.by in OF_WEIGHTS else {})

    def where(self, i: int) -> str:
        return f"{FILE}: model.fuse.members[{i}]: {self.settings.members[i]}"


def places_of(settings: Fuse, base: Path, keys: KeyStore, models: Registry) -> list[Path]:
    """Where the members are. Raises what `transfer.find` raises."""
    where = f"{FILE}: model.fuse.members"
    return [find(address, base, keys, models, f"{where}[{i}]") for i, address in enumerate(settings.members)]


def require_alike(members: Members) -> None:
    """Raises ModelError where members cannot be fused in this way."""
    prepared, by = members.prepared, members.settings.by
    schema, steps = Schema.read(prepared), Preprocessing.read(prepared)
    if by in BY_ROWS and not Manifest.read(prepared).rows("validation"):
        raise ModelError(f"{FILE}: model.fuse.by: {by} chooses by validation rows: give `data.split.validation` a share")
    notes = [members.note(i) for i in range(len(members.places))]
    for i, place in enumerate(members.places):
        if not (place / "schema.json").is_file():
            continue
        theirs = Schema.read(place)
        if (
            theirs.classes != schema.classes
            or theirs.tasks != schema.tasks
            or list(theirs.inputs.values()) != list(schema.inputs.values())
        ):
            raise ModelError(f"{members.where(i)}: answers {_task(theirs)}, the data of this project is {_task(schema)}")
        if Preprocessing.read(place) != steps:
            raise ModelError(f"{members.where(i)}: was trained on inputs that were prepared otherwise: fuse models of one `data`")
    if by in BY_ROWS and schema.tasks:
        raise ModelError(f"{FILE}: model.fuse.by: {by} chooses by one target, and there are several: fuse by `mean` or `soup`")
    other = next((i for i, note in enumerate(notes) if note.get("data") != members.data), None)
    if by in BY_ROWS and other is not None:
        raise ModelError(
            f"{members.where(other)}: was trained on other data or another split, maybe on rows that {by} would choose by: "
            "fuse by `mean`, or models of one `data`"
        )
    ancestors = {note.get("ancestor") for note in notes}
    if by in OF_WEIGHTS and (len(ancestors) > 1 or None in ancestors):
        lacking = next((i for i, note in enumerate(notes) if not note.get("ancestor")), None)
        why = (
            f"{members.where(lacking)}: its bundle names no ancestor" if lacking is not None else "they have different ancestors"
        )
        raise ModelError(
            f"{FILE}: model.fuse.by: {by}: {why.removeprefix(f'{FILE}: ')}: weights of models that did not start from one "
            "(`model.start`) cannot be averaged: fuse by `mean`, `weighted` or `stacking`"
        )


def _task(schema: Schema) -> str:
    kinds = f"{len(schema.classes)} classes" if schema.classes else "a number"
    return f"{kinds} for inputs of {', '.join(map(str, schema.inputs.values()))}"


def fuse(members: Members, folder: Path) -> None:
    """Fill the folder as a training does: models in their formats and `result.json`. Raises ModelError."""
    import ray

    made: Any = ray.remote(max_calls=1)(_fuse)
    ray.get(made.remote(members, folder))


def _fuse(members: Members, folder: Path) -> None:
    claim(1, 2)
    schema, by = Schema.read(members.prepared), members.settings.by
    models = [keras_model(place, members.sealing) for place in members.places]
    for i, model in enumerate(models):
        check_shapes(model, schema, members.where(i))
    rows = 0 if schema.tasks else Manifest.read(members.prepared).rows("validation")
    inputs, target = sample(members.prepared, members.keys, "validation", rows) if rows else ({}, np.empty(0))
    outputs = [_answers(model, inputs) for model in models] if len(target) else []
    judged = [_quality(target, o, schema) for o in outputs]
    said: dict[str, Any] = {"by": by, "members": list(members.settings.members), "validation": judged}
    match by:
        case "mean":
            made = _weighted(models, np.full(len(models), 1 / len(models)))
        case "weighted":
            said["weights"] = _best_weights(target, outputs, schema).round(4).tolist()
            made = _weighted(models, np.array(said["weights"]))
        case "stacking":
            made, said["out_of_fold"] = _stacked(models, target, outputs, schema)
        case _:
            _require_one_shape(models, members)
            order = sorted(range(len(models)), key=lambda i: -judged[i] if judged else 0)
            taken = order if by == "soup" else _helpful(models, order, inputs, target, schema)
            said["taken"] = [members.settings.members[i] for i in taken]
            made = _souped(models, taken)
    made = called(made)
    if len(target):
        said["fused"] = _quality(target, _answers(made, inputs), schema)
    seal = Seal.make(folder, members.sealing) if members.encrypt else None
    gaps = export(made, members.prepared, members.keys, folder, seal)
    figures = {"workers": 1, "weights_sha256": [], "parameters": made.count_params(), "batch_size": 64}
    write_json(folder / "result.json", figures | gaps | {"fusion": said})


def _answers(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    rows = len(next(iter(inputs.values())))
    return np.concatenate([answers(model, {n: v[at : at + 1024] for n, v in inputs.items()}) for at in range(0, rows, 1024)])


def _quality(target: np.ndarray, outputs: np.ndarray, schema: Schema) -> float:
    """More is better: accuracy, or minus the mean squared error."""
    if schema.classes:
        return float((outputs.argmax(1) == target).mean())
    return -float(np.square(outputs[:, 0] - target).mean())


def _loss(target: np.ndarray, outputs: np.ndarray, schema: Schema) -> float:
    if schema.classes:
        return -float(np.log(np.maximum(outputs[np.arange(len(target)), target], SMALLEST)).mean())
    return float(np.square(outputs[:, 0] - target).mean())


# Of what members answer


def _inputs(models: list[Any]) -> tuple[Any, list[Any]]:
    """New inputs of the members' shapes, and what each member makes of them."""
    import keras

    given: dict[str, Any] = {t.name: keras.Input(t.shape[1:], dtype=t.dtype, name=t.name) for t in models[0].inputs}
    alone = len(given) == 1
    answered = []
    for i, model in enumerate(models):
        apart: Any = keras.Model(model.inputs[0] if alone else model.inputs, model.outputs[0], name=f"member_{i}")
        answered.append(apart(next(iter(given.values())) if alone else [given[t.name] for t in model.inputs]))
    return next(iter(given.values())) if alone else given, answered


def _weighted(models: list[Any], weights: np.ndarray) -> Any:
    import keras

    inputs, outputs = _inputs(models)
    scaled = [
        keras.layers.Rescaling(float(w), name=f"weight_{i}")(o) for i, (w, o) in enumerate(zip(weights, outputs, strict=True))
    ]
    return keras.Model(inputs, keras.layers.Add(name="fused")(scaled), name="ensemble")


def _best_weights(target: np.ndarray, outputs: list[np.ndarray], schema: Schema) -> np.ndarray:
    """Not negative, 1 in sum, with the least loss: a convex problem, both for log loss and for squared errors."""
    from scipy.optimize import minimize

    every = np.stack(outputs)
    count = len(outputs)
    found = minimize(
        lambda w: _loss(target, np.tensordot(w, every, 1), schema), np.full(count, 1 / count), method="SLSQP",
        bounds=[(0, 1)] * count, constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )  # fmt: skip
    weights = np.clip(found.x, 0, None)
    return weights / weights.sum()


def _stacked(models: list[Any], target: np.ndarray, outputs: list[np.ndarray], schema: Schema) -> tuple[Any, float]:
    """(the network, its quality out of fold)."""
    import keras

    features = np.concatenate(outputs, axis=1)
    kernel, bias, quality = _meta_learner(features, target, schema)
    inputs, answered = _inputs(models)
    together = keras.layers.Concatenate(name="answers")(answered)
    last = keras.layers.Dense(schema.outputs, activation="softmax" if schema.classes else None, name="fused")
    model = keras.Model(inputs, last(together), name="ensemble")
    last.set_weights([kernel, bias])
    return model, quality


def _meta_learner(features: np.ndarray, target: np.ndarray, schema: Schema) -> tuple[np.ndarray, np.ndarray, float]:
    """(kernel `[features, outputs]`, bias, quality out of fold) of a logistic or a ridge regression of what members answer."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict

    def learner(penalty: float) -> Any:
        return LogisticRegression(C=1 / penalty, max_iter=1000) if schema.classes else Ridge(alpha=penalty)

    rarest = min(np.unique(target, return_counts=True)[1]) if schema.classes else len(target)
    if len(target) < FOLDS or (schema.classes and (rarest < 2 or len(np.unique(target)) < len(schema.classes))):
        raise ModelError(
            f"{FILE}: model.fuse.by: stacking needs more validation rows, two of each class at least: use `weighted`"
        )
    folds: Any = StratifiedKFold if schema.classes else KFold
    cut = folds(min(FOLDS, int(rarest)), shuffle=True, random_state=0)
    tried = []
    for penalty in PENALTIES:
        method = "predict_proba" if schema.classes else "predict"
        made = np.asarray(cross_val_predict(learner(penalty), features, target, cv=cut, method=method))
        made = made if made.ndim > 1 else made[:, None]
        tried.append((_loss(target, made, schema), penalty, _quality(target, made, schema)))
    _, penalty, quality = min(tried)
    found = learner(penalty).fit(features, target)
    kernel, bias = np.atleast_2d(found.coef_).T, np.atleast_1d(found.intercept_)
    if schema.classes and kernel.shape[1] == 1:  # of two classes, the second one's log odds
        kernel, bias = np.concatenate([-kernel, kernel], axis=1) / 2, np.concatenate([-bias, bias]) / 2
    return kernel.astype(np.float32), bias.astype(np.float32), quality


# Of their weights


def _require_one_shape(models: list[Any], members: Members) -> None:
    first = [(w.path, tuple(w.shape)) for w in models[0].weights]
    for i, model in enumerate(models[1:], 1):
        other = [(w.path, tuple(w.shape)) for w in model.weights]
        pairs = zip(first, other, strict=False)
        if differ := next(((a, b) for a, b in pairs if a[1] != b[1]), None):
            (name, own), (_, its) = differ
            raise ModelError(f"{members.where(i)}: `{name}` is {its}, in {members.settings.members[0]} {own}: no mean of them")
        if len(first) != len(other):
            raise ModelError(f"{members.where(i)}: has {len(other)} weights, {members.settings.members[0]} has {len(first)}")


def _souped(models: list[Any], taken: list[int]) -> Any:
    """The first of those that are taken, with the mean of their weights."""
    made = models[taken[0]]
    made.set_weights(_mean([models[i].get_weights() for i in taken]))
    return made


def _mean(every: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.mean(weights, axis=0).astype(weights[0].dtype) for weights in zip(*every, strict=True)]


def _helpful(models: list[Any], order: list[int], inputs: Any, target: np.ndarray, schema: Schema) -> list[int]:
    """Greedy: the best member, and each that does not make the mean worse (Wortsman et al., recipe 1)."""
    trial, taken = models[order[0]], order[:1]
    every = [model.get_weights() for model in models]
    best = _loss_first(target, _answers(trial, inputs), schema)
    for i in order[1:]:
        trial.set_weights(_mean([every[j] for j in [*taken, i]]))
        now = _loss_first(target, _answers(trial, inputs), schema)
        if now >= best:
            best, taken = now, [*taken, i]
    trial.set_weights(every[order[0]])
    return taken


def _loss_first(target: np.ndarray, outputs: np.ndarray, schema: Schema) -> tuple[float, float]:
    """Quality, and what decides where two are as good."""
    return _quality(target, outputs, schema), -_loss(target, outputs, schema)
