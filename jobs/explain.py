"""Explain: why a model answers as it does, for all rows (global) and for one (local).

A local explanation shares out what separates a row's answer from the usual one among the row's columns: the pieces of the numbers
that the model reads, after preprocessing (of an image, its pixels or patches of them). Methods:

    expected_gradients    integrated gradients averaged over rows of the training split (Erion et al., Improving performance of
                          deep learning models with axiomatic attribution priors and expected gradients, 2021), at places that
                          are spread evenly instead of drawn, so a row's values do not depend on the rows beside it
    integrated_gradients  from the mean row (Sundararajan, Taly and Yan, 2017)
    permutation           Shapley values by paired random orders, from answers alone (Štrumbelj and Kononenko, 2014; Mitchell et
                          al., Sampling permutations for Shapley value estimation, 2022)
    shap, lime            the libraries of these names, where they are installed

Rows are divided among Ray's tasks where that is worth a task's start. Random orders are drawn by the row's own number.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..cluster.keys import KeyStore
from ..cluster.sealed import Seal, read
from ..cluster.storage import write_json
from ..datasets.preprocess import Preprocessing
from ..datasets.schema import Columns, Schema, as_fed
from ..errors import ProjectError
from ..project import FILE
from ..trust import Explain
from . import attention, explainers
from .engine import FILES, Engine, Forward, keras_model
from .evaluate import Sources, test_rows
from .export import sample

Inputs = dict[str, np.ndarray]
EXPLAINED = "explain.json"
ORDERS = 5
"""Of an endpoint's explanation, each also backwards."""
NODES, GOLDEN = 24, 0.6180339887498949
"""Points of the straight line between two rows; from one row alone, there are `MIDDLES`."""
MIDDLES = (np.arange(64) + 0.5) / 64
MOST_PLAYERS = 256
"""Into which an image or a list is cut at most."""
AT_ONCE = 1 << 15
"""Rows that a model is asked about at a time."""
BY_MODEL = ("shap_deep", "shap_gradient")
WORTH = 20_000_000
"""Answers times numbers of a row, from which on two tasks are quicker than one process."""


@dataclass(frozen=True)
class Player:
    """Numbers of one input that count as one: a column, a pixel, a patch. name: the column. place: of its middle, where it is a
    part of one."""

    name: str
    input: str
    mask: np.ndarray
    """bool, the shape of a row of the input."""
    place: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}[{','.join(map(str, self.place))}]" if self.place else self.name


def players(schema: Schema, preprocessing: Preprocessing, columns: Columns) -> list[Player]:
    """columns: raw rows, one at least, which show how many numbers each column becomes."""
    made = preprocessing.run({n: v[:1] for n, v in columns.items()})
    found = []
    for name, parts in preprocessing.inputs.items():
        shape = schema.inputs[name]
        if len(parts) == 1 and len(shape) >= 1 and made[parts[0]].ndim > 1 and not _hot(parts[0], schema):
            found += list(_patches(parts[0], name, shape))
            continue
        at = 0
        for part in parts:
            width = 1 if made[part].ndim == 1 else made[part].shape[1]
            mask = np.zeros(shape, bool)
            mask[at : at + width] = True
            found.append(Player(part, name, mask))
            at += width
    return found


def _hot(part: str, schema: Schema) -> bool:
    """Whether a column becomes several numbers that mean one value together."""
    return any(f.name == part and f.kind in ("text", "number", "time") for f in schema.features) and part not in schema.ids


def _patches(part: str, name: str, shape: tuple[int, ...]) -> Iterator[Player]:
    sides = shape[:2]
    step = 1
    while np.prod([-(-n // step) for n in sides]) > MOST_PLAYERS:
        step += 1
    for corner in np.ndindex(*(-(-n // step) for n in sides)):
        mask = np.zeros(shape, bool)
        mask[tuple(slice(i * step, (i + 1) * step) for i in corner)] = True
        found = tuple(min(n - 1, i * step + step // 2) for i, n in zip(corner, sides, strict=True))
        yield Player(part, name, mask, found)


def shapley(
    forward: Forward,
    row: Inputs,
    reference: Inputs,
    who: list[Player],
    output: int,
    orders: int,
    seed: int,
) -> np.ndarray:
    """`[players]`: Shapley values of one output of one row (`[1, …]` inputs), by `orders` random orders and each backwards. What
    a player does not bring is the reference's (`[1, …]`, or several rows whose mean answer counts). They add up to the row's
    answer less the reference's."""
    rng, many = np.random.default_rng([seed, 1]), len(next(iter(reference.values())))
    each = [rng.permutation(len(who)) for _ in range(orders)]
    each += [order[::-1] for order in each]
    total = np.zeros(len(who))
    for order in each:
        brought = np.zeros((len(who) + 1, len(who)), bool)
        for step, player in enumerate(order):
            brought[step + 1 :, player] = True
        answers = _coalitions(forward, row, reference, who, brought)[:, output].reshape(len(brought), many).mean(axis=1)
        total[order] += np.diff(answers)
    return total / len(each)


def _coalitions(forward: Forward, row: Inputs, reference: Inputs, who: list[Player], brought: np.ndarray) -> np.ndarray:
    """Answers where some players bring the row's numbers and the others the reference's: `[coalitions × references, outputs]`."""
    many = len(next(iter(reference.values())))
    mixed = {}
    for name, own in row.items():
        mine = [(i, player.mask) for i, player in enumerate(who) if player.input == name]
        index = np.zeros(own.shape[1:], np.int64)
        for i, mask in mine:
            index[mask] = i
        takes = brought[:, index]
        both = np.where(takes[:, None], own[None], reference[name][None])
        mixed[name] = both.reshape(len(brought) * many, *own.shape[1:]).astype(np.float32)
    return _asked(forward, mixed)


def _asked(forward: Forward, inputs: Inputs) -> np.ndarray:
    rows = len(next(iter(inputs.values())))
    return np.concatenate([forward({n: v[a : a + AT_ONCE] for n, v in inputs.items()}) for a in range(0, rows, AT_ONCE)])


def gradients(model: Any, rows: Inputs, background: Inputs, outputs: np.ndarray) -> Inputs:
    """Expected gradients of one output a row (`outputs`, its number): arrays as the inputs. One row of background, and they are
    integrated gradients from it."""
    import tensorflow as tf

    from .steps import fed

    many = len(next(iter(background.values())))
    # Each row of background has places of its own, so that together they see what is steep anywhere on the way.
    nodes = (np.arange(NODES) + (np.arange(1, many + 1)[:, None] * GOLDEN) % 1) / NODES if many > 1 else MIDDLES[None]
    along = tf.constant(nodes, tf.float32)

    @tf.function(autograph=False, reduce_retracing=True)
    def shares(own: Any, others: Any, which: Any) -> Any:
        count = tf.shape(which)[0]
        gaps = {n: v[:, None] - others[n][None] for n, v in own.items()}

        def between(n: str) -> Any:
            at = tf.reshape(along, [1, *nodes.shape, *(1,) * (len(own[n].shape) - 1)])
            return tf.reshape(others[n][None, :, None] + gaps[n][:, :, None] * at, [-1, *own[n].shape[1:]])

        points = {n: between(n) for n in own}
        with tf.GradientTape() as tape:
            tape.watch(points)
            answers = tf.cast(model(fed(points), training=False), tf.float32)
            said = tf.reduce_sum(tf.gather(answers, tf.repeat(which, nodes.size), batch_dims=1))
        found: Any = tape.gradient(said, points, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        out = {}
        for n, slope in found.items():
            shaped = tf.reshape(tf.convert_to_tensor(slope), [count, *nodes.shape, *own[n].shape[1:]])
            out[n] = tf.reduce_mean(tf.reduce_mean(shaped, axis=2) * gaps[n], axis=1)
        return out

    at_once = max(1, AT_ONCE // nodes.size)
    held = {n: tf.constant(v) for n, v in background.items()}
    made = []
    for first in range(0, len(outputs), at_once):
        some = slice(first, first + at_once)
        made.append(shares({n: tf.constant(v[some]) for n, v in rows.items()}, held, tf.constant(outputs[some])))
    return {n: np.concatenate([m[n].numpy() for m in made]) for n in rows}


def explained(engine: Engine, columns: Columns, rows: Inputs, outputs: np.ndarray, mean: dict[str, Any]) -> list[dict[str, Any]]:
    """What an endpoint answers: of each row, Shapley values from the mean training row on (Sundararajan and Najmi, The many
    Shapley values for model explanation, 2020): {output, base, value, features}; of a tensor, values in its shape, or in that of
    its patches."""
    who = players(engine.schema, engine.preprocessing, columns)
    reference = {n: np.asarray(v, np.float32)[None] for n, v in mean.items()}
    base, out = engine.forward(reference)[0], []
    for i, answer in enumerate(outputs):
        output = int(answer.argmax())
        row = {n: v[i : i + 1] for n, v in rows.items()}
        values = shapley(engine.forward, row, reference, who, output, ORDERS, 0)
        features: dict[str, Any] = {}
        for name in dict.fromkeys(p.name for p in who):
            own = [(p.place, v) for p, v in zip(who, values, strict=True) if p.name == name]
            grid = [len({place[axis] for place, _ in own}) for axis in range(len(own[0][0]))]
            features[name] = np.array([v for _, v in own]).reshape(grid).tolist()
        said = {"output": engine.schema.classes[output]} if engine.schema.classes else {}
        out.append({**said, "base": float(base[output]), "value": float(answer[output]), "features": features})
    return out


def by_player(values: Inputs, who: list[Player]) -> np.ndarray:
    """`[rows, players]`: sums over each player's numbers."""
    return np.stack([values[p.input][:, p.mask].sum(axis=1) for p in who], axis=1)


@dataclass(frozen=True)
class _Local:
    """What a task needs to explain some rows."""

    sources: Sources
    settings: Explain
    rows: Inputs
    background: Inputs
    outputs: np.ndarray
    who: list[Player]

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """`[rows, players]` of the rows with these numbers."""
        rows = {n: v[numbers] for n, v in self.rows.items()}
        outputs, method = self.outputs[numbers], self.settings.method
        if method in ("expected_gradients", "integrated_gradients"):
            model = _model(self.sources.trained, self.sources.sealing.folder)
            mean = {n: v.mean(axis=0, keepdims=True) for n, v in self.background.items()}
            from_ = self.background if method == "expected_gradients" else mean
            return by_player(gradients(model, rows, from_, outputs), self.who)
        engine = self.sources.engine()
        if method == "permutation":
            orders = self.settings.orders
            return np.stack([
                shapley(engine.forward, {n: v[i : i + 1] for n, v in rows.items()}, self.background, self.who, int(outputs[i]),
                        orders, int(numbers[i]))
                for i in range(len(numbers))
            ])  # fmt: skip
        return self._by_library(engine, rows, outputs, int(numbers[0]))

    def _by_library(self, engine: Engine, rows: Inputs, outputs: np.ndarray, seed: int) -> np.ndarray:
        ((name, own),) = rows.items()
        given = (name, own, self.background[name], outputs)
        if self.settings.method == "lime":
            if own.ndim < 3:
                return by_player({name: explainers.by_lime(engine.forward, *given, seed).reshape(own.shape)}, self.who)
            patches = np.argmax([p.mask if p.mask.ndim == 2 else p.mask.any(axis=-1) for p in self.who], axis=0)
            return explainers.by_lime_of_images(engine.forward, *given, patches, seed)
        needs = self.settings.method != "shap"
        model = _model(self.sources.trained, self.sources.sealing.folder) if needs else None
        return by_player({name: explainers.by_shap(self.settings.method, model, engine.forward, *given, seed)}, self.who)


@functools.lru_cache(maxsize=1)
def _model(trained: Path, sealing: Path) -> Any:
    return keras_model(trained, KeyStore(sealing))


def require_explainable(settings: Explain, schema: Schema) -> None:
    """Raises ProjectError for a method that does not fit the data, or is not installed."""
    where, words, chosen = f"{FILE}: explain", bool(schema.ids), settings.method
    if schema.tasks:
        raise ProjectError(f"{where}: a model of several targets is not explained yet: leave `explain` out")
    if chosen in (*BY_MODEL, "expected_gradients", "integrated_gradients") and words:
        raise ProjectError(f"{where}.method: `{chosen}` needs numbers, and an input holds words: write `permutation`")
    if chosen in (*BY_MODEL, "shap", "lime"):
        if len(schema.inputs) != 1 or words:
            raise ProjectError(f"{where}.method: `{chosen}` explains one input of numbers: write `permutation`")
        if chosen == "lime" and not schema.classes:
            raise ProjectError(f"{where}.method: `lime` explains classes here: write `permutation`")
        library = chosen.split("_")[0]
        if importlib.util.find_spec(library) is None:
            raise ProjectError(f"{where}.method: {library} is not installed: `pip install heliograph[explain]`")


def explain(sources: Sources, settings: Explain, folder: Path, update: Callable[..., None]) -> None:
    """Write `explain.json` (global: importance, dependence, surrogate, mean size of the local values) and `local.parquet`."""
    import pyarrow.parquet as pq

    engine = sources.engine()
    schema = engine.schema
    require_explainable(settings, schema)
    if settings.method == "auto":
        plain = bool(schema.ids) or not (sources.trained / FILES["keras"]).is_file()
        settings = settings.model_copy(update={"method": "permutation" if plain else "expected_gradients"})
    columns, target = test_rows(sources, settings.rows)
    outputs = engine.predict(columns)
    rows = {n: as_fed(v) for n, v in engine.preprocessing.apply(columns).items()}
    background, _ = sample(sources.prepared, sources.keys, "train", settings.background)
    who = players(schema, engine.preprocessing, columns)
    explained = outputs.argmax(axis=1) if schema.classes else np.zeros(len(outputs), np.int64)
    update(f"explaining {len(target):,} rows by {settings.method.replace('_', ' ')}")
    local = _local(_Local(sources, settings, rows, background, explained, who))
    base = _asked(engine.forward, background).mean(axis=0)
    gap = outputs[np.arange(len(outputs)), explained] - base[explained] - local.sum(axis=1)
    update("permuting columns")
    said = {
        "method": settings.method,
        "rows": len(target),
        "base": base.tolist(),
        "additivity_gap": float(np.abs(gap).max()),
        "mean_size": _mean_size(local, who),
        "importance": importance(engine, columns, target, outputs, settings.repeats),
        "dependence": [],
        "surrogate": surrogate(engine, sources, rows, settings.depth, who),
    }
    update("following single columns")
    said["dependence"] = dependence(engine, columns, said["importance"], settings.dependence)
    if any(p.place for p in who):
        said["map"] = _map(local, who)
    said |= _attention(sources, rows, folder)
    write_json(folder / EXPLAINED, said)
    names = [str(p) for p in who]
    table = {"prediction": pa.array([str(schema.classes[i]) for i in explained] if schema.classes else outputs[:, 0])}
    pq.write_table(pa.table(table | {n: pa.array(local[:, i]) for i, n in enumerate(names)}), folder / "local.parquet")


def _local(work: _Local) -> np.ndarray:
    """Here, or by tasks where that is worth it."""
    import ray

    rows = len(work.outputs)
    size = sum(int(np.prod(v.shape[1:])) for v in work.rows.values())
    asked = {"permutation": 2 * work.settings.orders * (len(work.who) + 1), "expected_gradients": NODES * 3}
    cost = rows * size * asked.get(work.settings.method, 100) * len(next(iter(work.background.values())))
    tasks = min(int(ray.cluster_resources().get("CPU", 1)), rows, max(1, cost // WORTH))
    gpus = min(1, int(ray.cluster_resources().get("GPU", 0)))
    numbers = np.array_split(np.arange(rows), tasks)
    task: Any = ray.remote(num_gpus=gpus, max_calls=1)(_Local.of)  # its process ends with it, or TensorFlow kept the GPU's memory
    held = ray.put(work)
    return np.concatenate(ray.get([task.remote(held, part) for part in numbers]))


def _attention(sources: Sources, rows: Inputs, folder: Path) -> dict[str, Any]:
    """Maps of the model's attention layers, if it has any, for the report; a file has them row by row."""
    import ray

    file = sources.trained / FILES["keras"]
    if not file.is_file() or not attention.has_attention(read(file, Seal.of(file.parent, sources.sealing))):
        return {}
    task: Any = ray.remote(num_cpus=0, max_calls=1)(_attended)
    weights: Any = ray.get(task.remote(sources, {n: v[: attention.MOST_ROWS] for n, v in rows.items()}))
    np.savez_compressed(folder / attention.FILE, allow_pickle=False, **weights)
    return {"attention": attention.maps(weights)}


def _attended(sources: Sources, rows: Inputs) -> dict[str, np.ndarray]:
    return attention.weights_of(_model(sources.trained, sources.sealing.folder), rows)


def _mean_size(local: np.ndarray, who: list[Player]) -> list[dict[str, Any]]:
    """Mean absolute value by column, the largest first."""
    names = list(dict.fromkeys(p.name for p in who))
    sums = {n: np.abs(local[:, [p.name == n for p in who]]).sum(axis=1).mean() for n in names}
    return [{"column": n, "value": float(v)} for n, v in sorted(sums.items(), key=lambda item: -item[1])]


def _map(local: np.ndarray, who: list[Player]) -> list[dict[str, Any]]:
    """Where in an image the answers come from: mean absolute value by place."""
    sizes = np.abs(local).mean(axis=0)
    return [{"place": list(p.place), "value": float(sizes[i])} for i, p in enumerate(who) if len(p.place) == 2]


def importance(engine: Engine, columns: Columns, target: np.ndarray, outputs: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """How much worse the model is when a column's values change places among the rows (Breiman, 2001; Fisher, Rudin and
    Dominici, 2019): the drop of accuracy or R², its mean and deviation over `repeats`, the largest first."""

    def quality(found: np.ndarray) -> float:
        if engine.schema.classes:
            return float((found.argmax(axis=1) == target).mean())
        return float(1 - np.square(found[:, 0] - target).sum() / max(np.square(target - target.mean()).sum(), 1e-300))

    whole, out = quality(outputs), []
    for number, name in enumerate(columns):
        drops = []
        for repeat in range(repeats):
            order = np.random.default_rng([repeat, number]).permutation(len(target))
            values = columns[name]
            mixed = values[order] if isinstance(values, np.ndarray) else values.take(pa.array(order))
            drops.append(whole - quality(engine.predict({**columns, name: mixed})))
        out.append({"column": name, "drop": float(np.mean(drops)), "deviation": float(np.std(drops))})
    return sorted(out, key=lambda line: -line["drop"])


def dependence(engine: Engine, columns: Columns, ranked: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Mean answers when a column of numbers has one value in all rows (Friedman, 2001), at its quantiles; of the most important
    ones."""
    numeric = [f.name for f in engine.schema.features if f.kind == "number"]
    out = []
    for name in [line["column"] for line in ranked if line["column"] in numeric][:most]:
        values = columns[name]
        grid = np.unique(np.nanquantile(values, np.linspace(0.02, 0.98, 20)))
        answers = [engine.predict({**columns, name: np.full_like(values, at)}).mean(axis=0) for at in grid]
        out.append({"column": name, "values": grid.tolist(), "answers": np.array(answers).tolist()})
    return out


def surrogate(engine: Engine, sources: Sources, rows: Inputs, depth: int, who: list[Player]) -> dict[str, Any]:
    """A small decision tree that answers as the model does, and how often it does so on rows that it has not seen. It learns from
    training rows and from such rows moved a little (0.3 deviations), all answered by the model."""
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, export_text

    names = [str(p) for p in who]

    def flat(inputs: Inputs) -> np.ndarray:
        return np.stack([inputs[p.input][:, p.mask].mean(axis=1) for p in who], axis=1)

    own, _ = sample(sources.prepared, sources.keys, "train", 5000)
    rng = np.random.default_rng(0)
    words = set(engine.schema.ids)
    moved = [own] + [
        {n: v if n in words else (v + rng.normal(0, 0.3, v.shape) * v.std(axis=0)).astype(np.float32) for n, v in own.items()}
        for _ in range(5)
    ]
    every = {n: np.concatenate([m[n] for m in moved]) for n in own}
    answers, here = _asked(engine.forward, every), _asked(engine.forward, rows)
    if engine.schema.classes:
        tree: Any = DecisionTreeClassifier(max_depth=depth, random_state=0).fit(flat(every), answers.argmax(axis=1))
        fidelity = float((tree.predict(flat(rows)) == here.argmax(axis=1)).mean())
    else:
        tree = DecisionTreeRegressor(max_depth=depth, random_state=0).fit(flat(every), answers[:, 0])
        fidelity = float(tree.score(flat(rows), here[:, 0]))
    classes = [str(engine.schema.classes[c]) for c in tree.classes_] if engine.schema.classes else None
    text = export_text(tree, feature_names=names, class_names=classes, max_depth=depth)
    return {"depth": depth, "fidelity": fidelity, "measured_by": "agreement" if classes else "r2", "tree": text}
