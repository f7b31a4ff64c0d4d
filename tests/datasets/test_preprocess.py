"""Fitting in blocks equals fitting at once, and training and serving agree to the bit."""

import io
import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from heliograph.datasets.preprocess import Preprocessing, Statistics, decode, fit, merged, statistics
from heliograph.datasets.schema import Bad, Feature, Schema, parse_instances, to_instances, typed
from heliograph.errors import DataError, RequestError
from heliograph.project import Data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

ROWS = 10_000
FEATURES = (
    Feature(name="a"),
    Feature(name="hole", optional=True),
    Feature(name="kind", kind="text", optional=True),
    Feature(name="note", kind="text"),
    Feature(name="when", kind="time", optional=True),
    Feature(name="grid", kind="tensor", shape=(2, 2)),
    Feature(name="bag", kind="list"),
    Feature(name="photo", kind="image"),
)
SCHEMA = Schema(task="regression", target="y", features=FEATURES)
WHAT_IS_LEFT = [
    {"step": "one_hot", "columns": ["kind"]},
    {"step": "tokenise", "columns": ["note"], "length": 3},
    {"step": "date_parts"},
    {"step": "pad", "length": 2},
    {"step": "resize", "height": 4, "width": 4},
    {"step": "impute", "columns": ["hole"]},
]
EACH_STEP = [
    {"step": "impute", "columns": ["hole"], "by": "median"},
    {"step": "impute", "columns": ["hole"], "by": "most_frequent"},
    {"step": "impute", "columns": ["kind"], "by": "constant", "value": "none"},
    {"step": "standardise", "columns": ["a", "grid"]},
    {"step": "min_max", "columns": ["a", "grid"]},
    {"step": "robust_scale", "columns": ["a", "grid"]},
    {"step": "log", "columns": ["a", "grid"]},
    {"step": "clip", "columns": ["a", "grid"], "quantiles": [0.1, 0.9]},
    {"step": "bucketise", "columns": ["a"], "buckets": 7},
    {"step": "one_hot", "columns": ["a"], "most": 5},
    {"step": "ordinal", "columns": ["kind"]},
    {"step": "hash", "columns": ["note"], "buckets": 16},
    {"step": "hash", "columns": ["a"], "buckets": 16},
    {"step": "tokenise", "columns": ["note"], "length": 5, "vocabulary": 8, "lower": False},
    {"step": "date_parts", "parts": ["trend", "month", "day", "weekday", "hour", "minute"]},
    {"step": "pad", "length": 3, "value": -1.0},
    {"step": "resize", "height": 3, "width": 5, "channels": 1, "how": "crop"},
    {"step": "resize", "height": 3, "width": 5, "how": "pad"},
    {"step": "function", "call": "own:ratio", "name": "ratio", "columns": ["a", "hole"]},
]


def image(seed: int, form: str = "png") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def some(rows: int, seed: int = 0) -> pa.Table:
    draw = np.random.default_rng(seed)
    photos = [image(i, form) for i, form in enumerate(("png", "jpeg", "bmp"))]
    holes = draw.normal(size=rows)
    words = np.array(["Red", "green", "blue", "été", "x-ray"])
    return pa.table(
        {
            "a": draw.normal(50, 900, rows).round(1) * 10.0 ** draw.integers(-12, 12, rows),
            "hole": pa.array([None if i % 3 == 0 else v for i, v in enumerate(holes.tolist())]),
            "kind": pa.array([None if i % 5 == 0 else "uvw"[i % 3] for i in range(rows)]),
            "note": pa.array([" ".join(words[draw.integers(0, 5, i % 6)]) for i in range(rows)]),
            "when": pa.array([None if i % 7 == 0 else int(draw.integers(-(10**9), 2 * 10**9)) for i in range(rows)]),
            "grid": pa.FixedShapeTensorArray.from_numpy_ndarray(draw.normal(size=(rows, 2, 2)).astype("f4")),
            "bag": pa.array([draw.normal(size=i % 4).tolist() for i in range(rows)]),
            "photo": pa.array([photos[i % 3] for i in range(rows)]),
        }
    )


def columns_of(table: pa.Table, features=FEATURES) -> dict:
    bad = Bad(len(table))
    columns = typed(table, features, bad)
    assert bad.reasons == {}
    return columns


def fitted(columns: dict, steps: list[dict], base, features=FEATURES, cuts=()) -> Preprocessing:
    """Fit on blocks, as the cluster would."""
    rows = len(next(iter(columns.values())))
    edges = [0, *sorted(set(cuts)), rows]
    blocks = [{n: v[a:b] for n, v in columns.items()} for a, b in itertools.pairwise(edges)]

    def gather(so_far: Preprocessing, needs: dict[str, str]) -> dict:
        made = [so_far.run(block) for block in blocks]
        found = {}
        for name, need in needs.items():
            if need == "sample":
                flat = np.concatenate([np.asarray(m[name], float).reshape(-1) for m in made])
                found[name] = flat[np.isfinite(flat)]
            else:
                found[name] = merged([{name: statistics(m[name], need)} for m in made])[name]
        return found

    raw = merged({n: statistics(v) for n, v in block.items()} for block in blocks)
    data = Data.model_validate({"source": "s", "target": "y", "preprocess": steps})
    return fit(data, features, raw, gather, base)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "own.py").write_text(
        "import numpy as np\n\n\ndef ratio(a, b):\n    return np.nan_to_num(np.tanh(a) / (1 + b * b))\n"
    )
    return folder


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return some(ROWS)


TAKES = {"date_parts": ["when"], "pad": ["bag"], "resize": ["photo"]}


@pytest.mark.parametrize("step", EACH_STEP, ids=lambda step: f"{step['step']}-{'-'.join(step.get('columns', []))}")
@given(seed=st.integers(0, 2**32))
@settings(max_examples=3, deadline=None)
def test_training_and_serving_agree_to_the_bit(table, base, step, seed):
    """Ten thousand rows at once as `prepare` has them, and as JSON in requests of any size."""
    names = step.get("columns") or TAKES[step["step"]]
    schema = SCHEMA.model_copy(update={"features": tuple(f for f in FEATURES if f.name in names)})
    columns = columns_of(table.select(names), schema.features)
    rest = [{"step": "one_hot"}] if step["step"] == "impute" and names == ["kind"] else []
    state = Preprocessing.model_validate_json(fitted(columns, [step, *rest], base, schema.features).model_dump_json())
    trained = state.apply(columns)
    draw, first = np.random.default_rng(seed), 0
    while first < ROWS:
        rows = slice(first, first + int(draw.choice([1, 2, 3, 7, 64, 1000])))
        piece = {n: v[rows] for n, v in columns.items()}
        asked = json.loads(json.dumps(to_instances(piece, schema)))
        answered = state.apply(parse_instances(asked, schema))
        assert answered.keys() == trained.keys()
        for name, values in answered.items():
            assert values.dtype == trained[name].dtype
            assert values.tobytes() == trained[name][rows].tobytes(), name
        first = rows.stop


@given(st.lists(st.integers(1, 99), max_size=5), st.sampled_from(["standardise", "min_max", "robust_scale"]))
@settings(max_examples=25, deadline=None)
def test_fitting_in_blocks_equals_fitting_at_once(base, cuts, kind):
    features = (Feature(name="a"), Feature(name="grid", kind="tensor", shape=(2, 2)))
    columns = columns_of(some(100).select(["a", "grid"]), features)
    whole = fitted(columns, [{"step": kind}], base, features)
    pieces = fitted(columns, [{"step": kind}], base, features, cuts)
    for name in columns:
        for number in ("shift", "scale"):
            assert pieces.steps[0].columns[name][number] == pytest.approx(whole.steps[0].columns[name][number], rel=1e-9)


def test_steps_agree_with_scikit_learn(base):
    from sklearn import preprocessing
    from sklearn.impute import SimpleImputer

    features = (Feature(name="a"), Feature(name="hole", optional=True), Feature(name="kind", kind="text", optional=True))
    table = some(500).select(["a", "hole", "kind"])
    columns = columns_of(table, features)
    filled = SimpleImputer().fit_transform(columns["hole"][:, None])[:, 0]
    for kind, theirs in (
        ("standardise", preprocessing.StandardScaler()),
        ("min_max", preprocessing.MinMaxScaler()),
        ("robust_scale", preprocessing.RobustScaler()),
    ):
        steps = [{"step": "impute", "columns": ["hole"]}, {"step": kind}, {"step": "ordinal"}]
        ours = fitted(columns, steps, base, features).apply(columns)["features"]
        expected = theirs.fit_transform(np.stack([columns["a"], filled], 1))
        assert ours[:, :2] == pytest.approx(expected.astype("f4"), rel=1e-5, abs=1e-6)
    order = preprocessing.OrdinalEncoder().fit([[v] for v in table["kind"].drop_null().to_pylist()])
    known = [i for i, v in enumerate(table["kind"].to_pylist()) if v is not None]
    expected = order.transform([[table["kind"][i].as_py()] for i in known])[:, 0] + 1
    assert (ours[known, 2] == expected).all()
    assert (np.delete(ours[:, 2], known) == 0).all()


def test_moments_are_carried_through_affine_steps_without_another_pass(base):
    """What arithmetic knows is not read again: gather is not called."""
    features = (Feature(name="hole", optional=True),)
    columns = columns_of(some(300).select(["hole"]), features)

    def nobody_asks(*_):
        raise AssertionError("a pass that is not needed")

    steps = [{"step": "impute"}, {"step": "standardise"}, {"step": "min_max"}]
    data = Data.model_validate({"source": "s", "target": "y", "preprocess": steps})
    out = fit(data, features, {"hole": statistics(columns["hole"])}, nobody_asks, base).apply(columns)["features"]
    assert (out.min(), out.max()) == pytest.approx((0, 1), abs=1e-6)
    assert np.isfinite(out).all()


def test_a_log_before_a_scale_is_fitted_on_what_the_log_made(base):
    features = (Feature(name="a"),)
    columns = columns_of(some(400).select(["a"]), features)
    out = fitted(columns, [{"step": "log"}, {"step": "standardise"}], base, features).apply(columns)["features"]
    expected = np.sign(columns["a"]) * np.log1p(np.abs(columns["a"]))
    assert out[:, 0] == pytest.approx((expected - expected.mean()) / expected.std(), rel=1e-5, abs=1e-5)


def test_inputs_are_numbers_together_and_everything_else_alone(base):
    columns = columns_of(some(50))
    steps = [*WHAT_IS_LEFT, {"step": "standardise"}]
    inputs = fitted(columns, steps, base).apply(columns)
    shapes = {name: (values.shape[1:], str(values.dtype)) for name, values in inputs.items()}
    assert shapes == {
        "features": ((2 + 3 + 7,), "float32"),
        "note": ((3,), "int32"),
        "grid": ((2, 2), "float32"),
        "bag": ((2,), "float32"),
        "photo": ((4, 4, 3), "uint8"),
    }


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([{"step": "standardise", "columns": ["b"]}], r"data.preprocess\[0\].columns: `b` is not a feature: they are `a`"),
        ([{"step": "one_hot", "columns": ["when"]}], "one_hot is for text or number, and `when` is time here"),
        ([{"step": "standardise"}], "`kind` is text at its end, and a model reads numbers: add a step one_hot"),
        ([{"step": "function", "call": "own:nothing", "name": "n", "columns": ["a"]}], "has no function `nothing`"),
        ([{"step": "function", "call": "gone:f", "name": "n", "columns": ["a"]}], "gone.py: not found"),
    ],
)
def test_a_step_that_cannot_be_is_one_line(base, steps, reason):
    with pytest.raises(DataError, match=reason) as caught:
        fitted(columns_of(some(20)), steps, base)
    assert len(str(caught.value).splitlines()) == 1


def test_a_request_may_leave_out_what_training_could_fill_up():
    schema = SCHEMA.model_copy(update={"features": FEATURES[:3]})
    columns = parse_instances([{"a": 1}, {"a": 2, "hole": None, "kind": None}], schema)
    assert np.isnan(columns["hole"]).all()
    assert columns["kind"].to_pylist() == [None, None]
    with pytest.raises(RequestError, match="row 0: lacks `a`"):
        parse_instances([{"hole": 1}], schema)
    with pytest.raises(RequestError, match="`a` must be a finite number"):
        parse_instances([{"a": None}], schema)


def test_times_are_utc_whatever_they_are_written_as():
    schema = SCHEMA.model_copy(update={"features": (FEATURES[4],)})
    same = ["2024-02-03T04:05:06", "2024-02-03 05:05:06+01:00", "2024-02-03T04:05:06Z", 1706933106]
    assert parse_instances([{"when": w} for w in same], schema)["when"].tolist() == [1706933106.0] * 4


def test_an_image_that_cannot_be_decoded_is_refused_without_its_bytes():
    schema = SCHEMA.model_copy(update={"features": (FEATURES[7],)})
    state = fitted({"photo": pa.array([image(0)])}, [{"step": "resize", "height": 2, "width": 2}], None, schema.features)
    with pytest.raises(RequestError, match="row 0: is not an image"):
        state.apply(parse_instances([{"photo": {"b64": "c2VjcmV0"}}], schema))
    with pytest.raises(RequestError, match="`photo` must be an encoded image"):
        parse_instances([{"photo": {"b64": "%%"}}], schema)


def test_images_are_stretched_cropped_or_padded():
    half = np.zeros((10, 20, 3), np.uint8)
    half[:, 10:] = 255
    out = io.BytesIO()
    Image.fromarray(half).save(out, "png")
    stretched, cropped, padded = (decode(out.getvalue(), 4, 4, 1, how)[..., 0] for how in ("stretch", "crop", "pad"))
    assert stretched[:, 0].max() == 0
    assert stretched[:, 3].min() == 255
    assert cropped[:, 0].max() == 0
    assert padded[0].max() == 0
    assert padded[3].max() == 0
    assert padded[1, 3] == 255


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 59))
@settings(max_examples=50, deadline=None)
def test_statistics_merge(values, cut):
    whole = np.array(values)
    parts = [p for p in (whole[:cut], whole[cut:]) if len(p)]
    both = merged({"x": statistics(p, "counts")} for p in parts)["x"]
    assert both.rows == len(values)
    assert both.moments is not None
    assert both.moments.mean == pytest.approx(whole.mean(), abs=1e-6)
    assert math.sqrt(both.moments.squares / len(values)) == pytest.approx(whole.std(), abs=1e-5)
    assert sum((both.counts or {}).values()) == len(values)
    assert Statistics.model_validate_json(both.model_dump_json()) == both
