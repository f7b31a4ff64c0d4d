"""Preprocessing: fitted on the training split, applied by the same code in training and in the endpoint.

A step changes columns one by one. What it fits is plain JSON (`Fitted`), so a bundle can be read without trusting it, and
comes from statistics that merge: moments (Chan, Golub and LeVeque 1983), counts of values, and for quantiles a sample of
the training rows, drawn by the rows' hashes, which is all of them up to SAMPLE_ROWS.

Statistics of the columns as they are in the source come with the pass that reads it; moments are carried through the
affine steps by arithmetic. Only a statistic of what another fitted step made asks for one more pass (`Gather`).
"""

import functools
import io
import itertools
import math
import re
import types
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from ..errors import DataError, RequestError
from ..project import AnyStep, Data, DateParts, Hash, Impute, OneHot, Resize, Standardise, Tokenise
from .schema import Column, Columns, Feature, as_fed, hash64, listed

Json = dict[str, Any]
MOST_VALUES = 50_000
"""Distinct values that are counted; beyond, the rarest are forgotten."""
SAMPLE_ROWS = 200_000
FEW_VALUES = 50
"""Text of no more distinct values becomes one-hot by default, other short text is hashed."""
WORD = re.compile(r"\w+|[^\w\s]")


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

    def affine(self, shift: float, scale: float) -> "Moments":
        """Of `(x - shift) / scale`, scale > 0."""
        return Moments(
            count=self.count,
            mean=(self.mean - shift) / scale,
            squares=self.squares / scale**2,
            low=(self.low - shift) / scale,
            high=(self.high - shift) / scale,
        )

    @property
    def deviation(self) -> float:
        return (self.squares / self.count) ** 0.5


class Statistics(BaseModel):
    """What one column's rows are like; of two parts of them, `merge` makes that of both."""

    rows: int
    missing: int
    moments: Moments | None = None
    """Of what is there, where it is numbers."""
    counts: dict[str, int] | None = None
    """Rows of each value (or of each word), where it was asked for."""

    def merge(self, other: "Statistics") -> "Statistics":
        moments = self.moments.merge(other.moments) if self.moments and other.moments else self.moments or other.moments
        counts = None
        if self.counts is not None and other.counts is not None:
            counts = dict((Counter(self.counts) + Counter(other.counts)).most_common(MOST_VALUES))
        return Statistics(rows=self.rows + other.rows, missing=self.missing + other.missing, moments=moments, counts=counts)


def statistics(values: Column, need: str = "") -> Statistics:
    """need: "counts" or "words" to count them; text is counted anyway."""
    if need == "words" and not isinstance(values, np.ndarray):
        counted = Counter(word for text in values.to_pylist() if text for word in set(words(text)))
        return Statistics(rows=len(values), missing=values.null_count, counts=dict(counted.most_common(MOST_VALUES)))
    if not isinstance(values, np.ndarray):
        counts = None
        if pa.types.is_string(values.type):
            found = values.drop_null().value_counts()
            counts = dict(zip(found.field(0).to_pylist(), found.field(1).to_pylist(), strict=True))
        return Statistics(rows=len(values), missing=values.null_count, counts=counts)
    there = values[np.isfinite(values)] if values.ndim == 1 else values
    counts = None
    if need == "counts":
        found, times = np.unique(there, return_counts=True)
        counts = dict(zip(map(repr, found.tolist()), times.tolist(), strict=True))
    if not there.size:
        return Statistics(rows=len(values), missing=len(values) - len(there), counts=counts)
    wide = there.astype(np.float64, copy=False)
    mean = float(wide.mean())
    centred = (wide - mean).reshape(-1)
    moments = Moments(
        count=wide.size, mean=mean, squares=float(centred @ centred), low=float(there.min()), high=float(there.max())
    )
    return Statistics(rows=len(values), missing=len(values) - len(there), moments=moments, counts=counts)


def finite(values: np.ndarray) -> np.ndarray:
    """All numbers of a column that are there, as float64 `[n]`."""
    flat = values.astype(np.float64, copy=False).reshape(-1)
    return flat[np.isfinite(flat)]


def merged(parts: Iterable[dict[str, Statistics]]) -> dict[str, Statistics]:
    out: dict[str, Statistics] = {}
    for part in parts:
        for name, found in part.items():
            out[name] = out[name].merge(found) if name in out else found
    return out


# --- what each step does -------------------------------------------------------------------------------------------------


def words(text: str, lower: bool = True) -> list[str]:
    return WORD.findall(text.lower() if lower else text)


def _affine(values: np.ndarray, state: Json, _: Json) -> np.ndarray:
    kind = values.dtype.type if values.dtype != np.uint8 else np.float32
    return (values - kind(state["shift"])) / kind(state["scale"])


def _impute(values: Column, state: Json, _: Json) -> Column:
    if isinstance(values, np.ndarray):
        return np.where(np.isnan(values), state["value"], values)
    return values.fill_null(state["value"])


def _log(values: np.ndarray, _: Json, __: Json) -> np.ndarray:
    return (np.sign(values) * np.log1p(np.abs(values.astype(np.float64)))).astype(values.dtype)


def _clip(values: np.ndarray, state: Json, _: Json) -> np.ndarray:
    return np.clip(values, state["low"], state["high"])


def _bucketise(values: np.ndarray, state: Json, _: Json) -> np.ndarray:
    return np.searchsorted(np.array(state["edges"]), values, side="right").astype(np.float64)


def _places(values: Column, known: list[Any]) -> np.ndarray:
    """The place of each value among the known ones, in their order; -1 for any other."""
    if not known:
        return np.full(len(values), -1)
    if isinstance(values, np.ndarray):
        order = np.array(known, np.float64)
        found = np.searchsorted(order, values).clip(0, len(order) - 1)
        return np.where(order[found] == values, found, -1)
    return pc.fill_null(pc.index_in(values, pa.array(known, pa.string())), -1).to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]


def _hot(places: np.ndarray, count: int) -> np.ndarray:
    out = np.zeros((len(places), count), np.float32)
    known = np.flatnonzero(places >= 0)
    out[known, places[known]] = 1
    return out


def _one_hot(values: Column, state: Json, _: Json) -> np.ndarray:
    return _hot(_places(values, state["values"]), len(state["values"]))


def _ordinal(values: Column, state: Json, _: Json) -> np.ndarray:
    return (_places(values, state["values"]) + 1).astype(np.float64)


def _hash(values: Column, _: Json, settings: Json) -> np.ndarray:
    if isinstance(values, np.ndarray):
        values = pa.array([None if math.isnan(v) else repr(v) for v in values.tolist()], pa.string())
    found: Any = values.dictionary_encode()  # pyright: ignore[reportAttributeAccessIssue]
    buckets = [hash64(v.encode()) % settings["buckets"] for v in found.dictionary.to_pylist()]
    places = np.array([*buckets, -1])[found.indices.fill_null(len(buckets)).to_numpy(zero_copy_only=False)]
    return _hot(places, settings["buckets"])


def _date_parts(values: np.ndarray, _: Json, settings: Json) -> np.ndarray:
    moment = np.where(np.isfinite(values), values, 0.0)
    days = np.floor(moment / 86400)
    date = days.astype("datetime64[D]")
    month = (date.astype("datetime64[M]").astype(np.int64) % 12).astype(np.float64)
    turns = {
        "month": month / 12,
        "day": ((date - date.astype("datetime64[M]")).astype(np.int64)) / 31,
        "weekday": ((days + 3) % 7) / 7,
        "hour": (moment - days * 86400) / 86400,
        "minute": (moment % 3600) / 3600,
    }
    out = []
    for part in settings["parts"]:
        if part == "trend":
            out.append((moment / (365.2425 * 86400) - 30) / 25)
        else:
            out += [np.sin(2 * np.pi * turns[part]), np.cos(2 * np.pi * turns[part])]
    made = np.stack(out, axis=1)
    made[~np.isfinite(values)] = 0
    return made.astype(np.float32)


def _tokenise(values: pa.Array, state: Json, settings: Json) -> np.ndarray:
    ids = _numbered(tuple(state["words"]))
    out = np.zeros((len(values), settings["length"]), np.int32)
    for i, text in enumerate(values.to_pylist()):
        found = [ids.get(word, 1) for word in words(text or "", settings["lower"])[: settings["length"]]]
        out[i, : len(found)] = found
    return out


@functools.lru_cache(8)
def _numbered(known: tuple[str, ...]) -> dict[str, int]:
    return {word: i + 2 for i, word in enumerate(known)}


def _pad(values: pa.Array, _: Json, settings: Json) -> np.ndarray:
    out = np.full((len(values), settings["length"]), settings["value"], np.float32)
    for i, row in enumerate(values.to_pylist()):
        found = (row or [])[: settings["length"]]
        out[i, : len(found)] = found
    return out


def _resize(values: pa.Array, _: Json, settings: Json) -> np.ndarray:
    size = (settings["height"], settings["width"], settings["channels"])
    out = np.empty((len(values), *size), np.uint8)
    for i, content in enumerate(values):
        try:
            out[i] = decode(memoryview(content.as_buffer()), *size, settings["how"])
        except Exception:  # Pillow's formats raise what they like
            raise RequestError(f"row {i}: is not an image that can be decoded") from None
    return out


def decode(content: Any, height: int, width: int, channels: int, how: str) -> np.ndarray:
    """One encoded image to uint8 `[height, width, channels]`. Raises OSError for what is none."""
    from PIL import Image, ImageOps

    image = Image.open(io.BytesIO(content))
    mode = "RGB" if channels == 3 else "L"
    image.draft(mode, (2 * width, 2 * height))  # a JPEG can be decoded at an eighth, a quarter or half of its size, faster
    image = image.convert(mode)
    if image.size != (width, height):
        how_to = Image.Resampling.BILINEAR
        if how == "crop":
            image = ImageOps.fit(image, (width, height), how_to)
        elif how == "pad":
            image = ImageOps.pad(image, (width, height), how_to)
        else:
            image = image.resize((width, height), how_to)
    return np.asarray(image).reshape(height, width, channels)


def _normalise(values: np.ndarray, _: Json, settings: Json) -> np.ndarray:
    mean, deviation = (np.array(settings[n], np.float32) for n in ("mean", "deviation"))
    return (as_fed(values) - mean) / deviation


def _scale(shift: float, scale: float) -> Json:
    return {"shift": shift, "scale": scale or 1.0}


def _fit_impute(step: Any, stat: Any) -> Json:
    match step.by:
        case "constant":
            return {"value": step.value}
        case "mean":
            return {"value": stat.moments.mean}
        case "median":
            return {"value": float(np.quantile(stat, 0.5)) if len(stat) else 0.0}
    best: str = max(sorted(stat.counts), key=stat.counts.__getitem__, default="0")
    return {"value": float(best) if stat.moments else best}


def _fit_values(step: Any, stat: Statistics) -> Json:
    top = sorted(stat.counts or {}, key=lambda v: (-(stat.counts or {})[v], v))[: step.most]
    return {"values": sorted(top) if stat.moments is None else sorted(map(float, top))}


def _fit_words(step: Any, stat: Statistics) -> Json:
    counts = stat.counts or {}
    return {"words": sorted(counts, key=lambda w: (-counts[w], w))[: step.vocabulary - 2]}


def _fit_clip(step: Any, stat: Any) -> Json:
    if step.quantiles is None:
        return {"low": step.low, "high": step.high}
    low, high = map(float, np.quantile(stat, step.quantiles)) if len(stat) else (None, None)
    return {"low": low, "high": high}


def _fit_robust(_: Any, stat: np.ndarray) -> Json:
    low, middle, high = np.quantile(stat, [0.25, 0.5, 0.75]) if stat.size else (0.0, 0.0, 1.0)
    return _scale(float(middle), float(high - low))


def _fit_edges(step: Any, stat: Any) -> Json:
    if step.edges is not None:
        return {"edges": step.edges}
    inner = np.unique(np.quantile(stat, np.arange(1, step.buckets) / step.buckets)) if len(stat) else []
    return {"edges": [float(v) for v in inner]}


@dataclass(frozen=True)
class Does:
    """takes: kinds of columns that the step is for; listed: others that it takes when they are named. need: the statistic
    that it is fitted from. fit: (settings, statistic) -> its state. apply: (values, state, settings) -> values. makes: the
    kind of column that comes out (None: as it was)."""

    takes: tuple[str, ...]
    apply: Callable[[Any, Json, Json], Any]
    makes: str | None = None
    listed: tuple[str, ...] = ()
    need: Callable[[Any], str | None] = lambda _: None
    fit: Callable[[Any, Any], Json] = lambda *_: {}
    empty: bool = False
    """Whether it knows what to do with an empty cell."""


def _imputes_by(step: Impute) -> str | None:
    return {"mean": "moments", "median": "sample", "most_frequent": "counts", "constant": None}[step.by]


NUMBERS = ("number", "tensor")
STEPS: dict[str, Does] = {
    "impute": Does(("number",), _impute, listed=("text",), need=_imputes_by, fit=_fit_impute, empty=True),
    "standardise": Does(NUMBERS, _affine, need=lambda _: "moments", fit=lambda _, s: _scale(s.moments.mean, s.moments.deviation)),
    "min_max": Does(
        NUMBERS, _affine, need=lambda _: "moments", fit=lambda _, s: _scale(s.moments.low, s.moments.high - s.moments.low)
    ),
    "robust_scale": Does(NUMBERS, _affine, need=lambda _: "sample", fit=_fit_robust),
    "log": Does(NUMBERS, _log),
    "clip": Does(NUMBERS, _clip, need=lambda s: "sample" if s.quantiles else None, fit=_fit_clip),
    "bucketise": Does(("number",), _bucketise, need=lambda s: None if s.edges else "sample", fit=_fit_edges),
    "one_hot": Does(("text",), _one_hot, "vector", ("number",), lambda _: "counts", _fit_values, empty=True),
    "ordinal": Does(("text",), _ordinal, "number", ("number",), lambda _: "counts", _fit_values, empty=True),
    "hash": Does(("text",), _hash, "vector", ("number",), empty=True),
    "date_parts": Does(("time",), _date_parts, "vector", empty=True),
    "tokenise": Does(("text",), _tokenise, "ids", (), lambda _: "words", _fit_words, empty=True),
    "pad": Does(("list",), _pad, "tensor", empty=True),
    "resize": Does(("image",), _resize, "pixels"),
    "normalise": Does(("pixels",), _normalise, "tensor", ("tensor",)),
}


# --- the whole of them ---------------------------------------------------------------------------------------------------


class Fitted(BaseModel):
    """One step with what it learnt."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: str
    settings: Json = {}
    columns: dict[str, Json] = {}
    """What was fitted, by column."""

    def run(self, columns: Columns) -> None:
        if self.step == "function":
            columns[self.settings["name"]] = _called(self.settings, [columns[n] for n in self.columns])
            return
        apply = STEPS[self.step].apply
        for name, state in self.columns.items():
            if name in columns:
                columns[name] = apply(columns[name], state, self.settings)


class Preprocessing(BaseModel):
    """The fitted steps in the order of application, and which columns make which input of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int = 2
    steps: tuple[Fitted, ...] = ()
    inputs: dict[str, tuple[str, ...]] = {}

    @classmethod
    def read(cls, folder: Path) -> "Preprocessing":
        """Of what `prepare` made, or of a bundle that is not sealed."""
        return cls.model_validate_json((folder / "preprocess.json").read_bytes())

    def run(self, columns: Columns) -> Columns:
        """The steps alone."""
        out = dict(columns)
        for step in self.steps:
            step.run(out)
        return out

    def apply(self, columns: Columns) -> dict[str, np.ndarray]:
        """Features by name, to the model's inputs by name as shards keep them: float32, int32 ids, or the bytes of images.

        Raises RequestError for an image that cannot be decoded."""
        made = self.run(columns)
        out = {}
        for name, parts in self.inputs.items():
            if len(parts) == 1 and made[parts[0]].ndim > 1:
                values = made[parts[0]]
                out[name] = values if values.dtype in (np.uint8, np.int32) else values.astype(np.float32, copy=False)
            else:
                out[name] = _side_by_side([made[p] for p in parts])
        return out

    def vocabulary(self, name: str) -> int:
        """How many ids a column of words has: the padding, the unknown word, and those that training has seen. 0: no words."""
        return next((2 + len(step.columns[name]["words"]) for step in self.steps if "words" in step.columns.get(name, {})), 0)


def _side_by_side(columns: list[np.ndarray]) -> np.ndarray:
    """float32 `[rows, numbers]`."""
    widths = [1 if c.ndim == 1 else c.shape[1] for c in columns]
    out = np.empty((len(columns[0]), sum(widths)), np.float32)
    for column, width, end in zip(columns, widths, itertools.accumulate(widths), strict=True):
        out[:, end - width : end] = column.reshape(len(column), width)
    return out


Gather = Callable[[Preprocessing, dict[str, str]], dict[str, Any]]
"""(the steps so far, the statistic that each column needs) -> what it is, of the training rows as those steps leave them:
`Statistics`, or for "sample" an array of numbers."""


def check_steps(data: Data, features: tuple[Feature, ...], base: Path) -> None:
    """Raises DataError for a step that names no column of ours, or one of a kind that it cannot change."""
    if data.preprocess is not None:
        _inputs(data, _outline(data.preprocess, features, base)[1])


def optional(data: Data, features: tuple[Feature, ...]) -> tuple[Feature, ...]:
    """The features, marked where an empty cell is no mistake: the first step that changes the column knows what to do."""
    first: dict[str, AnyStep] = {}
    kinds = {f.name: str(f.kind) for f in features}
    for step in data.preprocess or []:
        for name in step.columns or [
            n for n, kind in kinds.items() if step.step != "function" and kind in STEPS[step.step].takes
        ]:
            first.setdefault(name, step)

    def may_be_empty(feature: Feature) -> bool:
        if data.preprocess is None:
            return feature.kind in ("number", "time", "text", "list")
        step = first.get(feature.name)
        return bool(step and step.step != "function" and STEPS[step.step].empty)

    return tuple(f.model_copy(update={"optional": may_be_empty(f)}) for f in features)


def suggested(features: tuple[Feature, ...], found: dict[str, Statistics]) -> list[AnyStep]:
    """What fits the kinds of the columns and what is in them."""
    by: dict[str, list[str]] = {}
    for f in features:
        stat = found[f.name]
        if f.kind == "number" and f.optional:
            by.setdefault("impute", []).append(f.name)
        if f.kind in ("number", "tensor"):
            by.setdefault("standardise", []).append(f.name)
        if f.kind == "text":
            counts = stat.counts or {}
            many = len(counts) > FEW_VALUES
            long = sum(len(v.split()) * n for v, n in counts.items()) > 3 * sum(counts.values())
            by.setdefault("one_hot" if not many else "tokenise" if long else "hash", []).append(f.name)
        if f.kind in ("time", "image", "list"):
            by.setdefault({"time": "date_parts", "image": "resize", "list": "pad"}[f.kind], []).append(f.name)
    makers: dict[str, Callable[[list[str]], AnyStep]] = {
        "impute": lambda c: Impute(step="impute", columns=c),
        "standardise": lambda c: Standardise(step="standardise", columns=c),
        "one_hot": lambda c: OneHot(step="one_hot", columns=c),
        "hash": lambda c: Hash(step="hash", columns=c),
        "tokenise": lambda c: Tokenise(step="tokenise", columns=c),
        "date_parts": lambda c: DateParts(step="date_parts", columns=c),
        "resize": lambda c: Resize(step="resize", columns=c, height=128, width=128),
    }
    if "pad" in by:
        raise DataError(f"column `{by['pad'][0]}` holds lists of several lengths: add a step `pad` to data.preprocess")
    return [make(by[name]) for name, make in makers.items() if name in by]


def fit(data: Data, features: tuple[Feature, ...], raw: dict[str, Statistics], gather: Gather, base: Path) -> Preprocessing:
    """raw: statistics of the training rows as the source has them. gather: asked for all others. Raises DataError."""
    steps = suggested(features, raw) if data.preprocess is None else data.preprocess
    plan, kinds = _outline(steps, features, base)
    known: dict[str, Statistics | None] = dict(raw)
    """Statistics of each column as the fitted steps leave it, where they are known."""
    samples: dict[str, np.ndarray] = {}
    done: list[Fitted] = []
    for number, (step, columns) in enumerate(plan):
        if step.step == "function":
            done.append(_function(step, base))
            known[step.name] = None
            continue
        does = STEPS[step.step]
        need = does.need(step)
        ask = _asked(plan[number:], known, samples)
        if any(name in ask for name in columns):
            for name, stat in gather(Preprocessing(steps=tuple(done)), ask).items():
                (known if isinstance(stat, Statistics) else samples)[name] = stat
        state = {}
        for name in columns:
            stat: Any = samples.get(name) if need == "sample" else known.get(name)
            if need == "moments" and not stat.moments:
                raise DataError(f"column `{name}` is empty in every training row: leave it out of data.features")
            state[name] = does.fit(step, stat)
            known[name] = _carried(step.step, known.get(name), state[name])
            samples.pop(name, None)
        settings = step.model_dump(exclude={"step", "columns"}, exclude_none=True)
        done.append(Fitted(step=step.step, settings=settings, columns=state))
    return Preprocessing(steps=tuple(done), inputs=_inputs(data, kinds))


def _asked(plan: "Plan", known: dict[str, Statistics | None], samples: dict[str, np.ndarray]) -> dict[str, str]:
    """What the steps of a plan must still be told about the columns as they are now: one pass finds it all."""
    ask: dict[str, str] = {}
    touched: set[str] = set()
    for step, columns in plan:
        need = STEPS[step.step].need(step) if step.step != "function" else None
        for name in columns if need else []:
            have = name in samples if need == "sample" else _knows(known.get(name), need or "")
            if name not in touched and not have:
                ask.setdefault(name, need or "")
        touched |= {step.name} if step.step == "function" else set(columns)
    return ask


def _knows(stat: Statistics | None, need: str) -> bool:
    return stat is not None and {"moments": stat.moments, "counts": stat.counts}.get(need) is not None


def _carried(step: str, stat: Statistics | None, state: Json) -> Statistics | None:
    """Statistics of what an affine step or a filled-up column becomes; None where a pass must tell."""
    if stat is None or stat.moments is None:
        return None
    if step in ("standardise", "min_max", "robust_scale"):
        moments = stat.moments.affine(state["shift"], state["scale"])
    elif step == "impute":
        filled = Moments(count=stat.missing, mean=state["value"], squares=0, low=state["value"], high=state["value"])
        moments = stat.moments.merge(filled) if stat.missing else stat.moments
    else:
        return None
    return Statistics(rows=stat.rows, missing=0, moments=moments)


Plan = list[tuple[AnyStep, list[str]]]


def _outline(steps: list[AnyStep], features: tuple[Feature, ...], base: Path) -> tuple[Plan, dict[str, str]]:
    """Each step with the columns that it changes, and the kinds of columns at the end. Raises DataError."""
    kinds: dict[str, str] = {f.name: f.kind for f in features}
    plan: Plan = []
    for i, step in enumerate(steps):
        where = f"data.preprocess[{i}]"
        for name in step.columns or []:
            if name not in kinds:
                raise DataError(f"{where}.columns: `{name}` is not a feature: they are {listed(list(kinds))}")
        if step.step == "function":
            _function(step, base)
            for name in step.columns if not step.keep else []:
                kinds.pop(name)
            kinds[step.name] = "number"
            plan.append((step, step.columns))
            continue
        does = STEPS[step.step]
        columns = step.columns or [n for n, kind in kinds.items() if kind in does.takes]
        for name in columns:
            if kinds[name] not in (*does.takes, *does.listed):
                takes = " or ".join((*does.takes, *does.listed))
                raise DataError(f"{where}: {step.step} is for {takes}, and `{name}` is {kinds[name]} here")
            kinds[name] = does.makes or kinds[name]
        plan.append((step, columns))
    for name, kind in kinds.items():
        advice = {"text": "one_hot, ordinal, hash or tokenise", "image": "resize", "list": "pad", "time": "date_parts"}.get(kind)
        if advice:
            raise DataError(f"data.preprocess: `{name}` is {kind} at its end, and a model reads numbers: add a step {advice}")
    return plan, kinds


def _inputs(data: Data, kinds: dict[str, str]) -> dict[str, tuple[str, ...]]:
    flat = ("number", "vector")
    if data.inputs is None:
        together = tuple(n for n, kind in kinds.items() if kind in flat)
        return ({"features": together} if together else {}) | {n: (n,) for n, kind in kinds.items() if kind not in flat}
    for name, parts in data.inputs.items():
        if not parts:
            raise DataError(f"data.inputs.{name}: names no column")
        for part in parts:
            if part not in kinds:
                raise DataError(f"data.inputs.{name}: `{part}` is not a feature: they are {listed(list(kinds))}")
            if len(parts) > 1 and kinds[part] not in flat:
                raise DataError(f"data.inputs.{name}: `{part}` is a {kinds[part]}, which is an input of its own")
    return {name: tuple(parts) for name, parts in data.inputs.items()}


# --- functions of the project --------------------------------------------------------------------------------------------


def _function(step: Any, base: Path) -> Fitted:
    """The step with the text of its file, which travels in the bundle. Raises DataError."""
    module, name = step.call.split(":")
    file = base / f"{module}.py"
    if not file.is_file():
        raise DataError(f"{file}: not found: data.preprocess names `{step.call}`")
    settings = {"name": step.name, "call": name, "code": file.read_text()}
    _compiled(settings["code"], name)
    return Fitted(step="function", settings=settings, columns={n: {} for n in step.columns})


@functools.lru_cache(8)
def _compiled(code: str, name: str) -> Callable[..., Any]:
    module = types.ModuleType("heliograph_function")
    try:
        # The project's own code, or that of a bundle whose signature was checked.
        exec(compile(code, f"{name} of data.preprocess", "exec"), module.__dict__)  # noqa: S102
    except Exception as error:
        raise DataError(f"data.preprocess: the file of `{name}` does not run: {type(error).__name__}: {error}") from None
    if not callable(found := getattr(module, name, None)):
        raise DataError(f"data.preprocess: its file has no function `{name}`")
    return found


def _called(settings: Json, columns: list[Column]) -> np.ndarray:
    given = [c if isinstance(c, np.ndarray) else np.array(c.to_pylist(), object) for c in columns]
    try:
        made = np.asarray(_compiled(settings["code"], settings["call"])(*given), np.float64)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data.preprocess: `{settings['call']}` failed: {type(error).__name__}: {error}") from None
    if made.shape != (len(columns[0]),):
        raise DataError(f"data.preprocess: `{settings['call']}` gave the shape {made.shape} for {len(columns[0])} rows")
    return made
