"""What a request must look like, and what it is told when it does not."""

import numpy as np
import pyarrow as pa
import pytest
from heliograph.datasets.schema import Bad, Feature, Labels, Schema, infer, number_target, parse_instances, targets, typed
from heliograph.errors import DataError, RequestError
from heliograph.project import Data

IMAGE = Schema(
    task="classification",
    target="y",
    classes=(0, 1),
    features=(Feature(name="image", kind="tensor", shape=(2, 2)),),
    inputs={"image": (2, 2)},
)
TABLE = Schema(
    task="regression",
    target="y",
    features=(Feature(name="age"), Feature(name="curve", kind="tensor", shape=(3,))),
    inputs={"features": (1,), "curve": (3,)},
)


def test_a_model_of_several_inputs_has_no_single_shape():
    assert IMAGE.input_shape == (2, 2)
    with pytest.raises(ValueError, match="2 inputs"):
        _ = TABLE.input_shape


def test_a_row_is_an_object_or_the_value_alone():
    named = parse_instances([{"image": [[1, 2], [3, 4]]}], IMAGE)
    bare = parse_instances([[[1, 2], [3, 4]]], IMAGE)
    assert np.array_equal(named["image"], bare["image"])
    assert bare["image"].dtype == np.float32
    assert bare["image"].shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("instances", "schema", "reason"),
    [
        (None, IMAGE, "must be a list of at least one row"),
        ([], IMAGE, "must be a list of at least one row"),
        ([[1, 2]], IMAGE, "row 0: `image` has the shape [2]; its shape is [2, 2]"),
        ([[[1, 2], [3]]], IMAGE, "row 0: `image` is ragged"),
        ([[[1, 2], [3, "secret"]]], IMAGE, "row 0: `image` must hold finite numbers"),
        ([[[1, 2], [3, None]]], IMAGE, "row 0: `image` must hold finite numbers"),
        ([[[1, 2], [3, True]]], IMAGE, "row 0: `image` must hold finite numbers"),
        ([[[1, 2], [3, float("nan")]]], IMAGE, "row 0: `image` must hold finite numbers"),
        ([[[1, 2], [3, 1e39]]], IMAGE, "row 0: `image` holds a number too large for float32"),
        ([[[[[[1]]]]]], IMAGE, "row 0: `image` must hold finite numbers in the shape [2, 2]"),
        ([{"image": [[1, 2], [3, 4]]}, 7], IMAGE, "row 1: `image` has the shape []"),
        ([5], TABLE, "row 0: must be an object with `age`, `curve`"),
        ([{"age": 5}], TABLE, "row 0: lacks `curve`"),
        ([{"age": "secret", "curve": [1, 2, 3]}], TABLE, "row 0: `age` must be a finite number"),
        ([{"age": float("inf"), "curve": [1, 2, 3]}], TABLE, "row 0: `age` must be a finite number"),
        ([{"age": 1e39, "curve": [1, 2, 3]}], TABLE, "row 0: `age` must be a finite number that float32 can hold"),
        ([{"age": 5, "curve": [1, 2, 3], "secret": 1}], TABLE, "row 0: has 1 unknown features"),
    ],
)
def test_a_wrong_row_is_refused_with_a_reason_that_repeats_no_value(instances, schema, reason):
    with pytest.raises(RequestError) as caught:
        parse_instances(instances, schema)
    assert reason in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.status == 400


def classes(target: pa.Array, **options) -> tuple:
    data = Data(source="s", target="y", **options)
    labels, column = Labels(), pa.chunked_array([target])
    labels.add(targets(column, data, number_target(column, data), Bad(len(target))))
    return labels.classes(data, "s")


def test_the_task_follows_from_the_target():
    assert classes(pa.array(["b", "a", "b"])) == ("a", "b")
    assert classes(pa.array([2.0, 1.0])) == (1, 2)
    assert classes(pa.array([True, False])) == (0, 1)
    assert classes(pa.array([0.5, 1.0])) == ()
    assert classes(pa.array(list(range(200)))) == ()
    assert len(classes(pa.array(list(range(200))), task="classification")) == 200
    assert classes(pa.array([1, 2]), task="regression") == ()


@pytest.mark.parametrize(
    ("target", "options", "reason"),
    [
        (pa.array([1, 1]), {}, "one value only"),
        (pa.array([None], pa.float64()), {}, "is empty in every row"),
        (pa.array([1.5, 2.0]), {"task": "classification"}, "has fractions"),
        (pa.array([[1], [2]]), {}, "numbers or text can be predicted"),
    ],
)
def test_an_unusable_target_is_refused(target, options, reason):
    with pytest.raises(DataError, match=reason):
        classes(target, **options)


def test_types_say_what_columns_hold():
    table = pa.table(
        {
            "n": [1, 2], "t": ["a", "b"], "d": pa.array([0, 1], pa.date32()), "b": [True, False], "i": [b"x", b"y"],
            "v": [[1.0, 2.0], [3.0, 4.0]], "r": [[1], [2, 3]], "m": [[[1, 2], [3, 4]]] * 2, "y": [0, 1],
        }
    )  # fmt: skip
    found = {f.name: (f.kind, f.shape) for f in infer(table, Data(source="s", target="y"), "s")}
    assert found == {
        "n": ("number", ()), "t": ("text", ()), "d": ("time", ()), "b": ("number", ()), "i": ("image", ()),
        "v": ("tensor", (2,)), "r": ("list", ()), "m": ("tensor", (2, 2)),
    }  # fmt: skip
    named = infer(table, Data(source="s", target="y", features=["n"], types={"n": "text"}), "s")
    assert named[0].kind == "text"


def test_what_does_not_fit_its_kind_is_noted_by_row_with_the_column():
    features = (
        Feature(name="n"),
        Feature(name="o", optional=True),
        Feature(name="m", kind="tensor", shape=(2,)),
        Feature(name="w", kind="time"),
    )  # fmt: skip
    table = pa.table(
        {
            "n": ["1", "x", "3", None, "inf"],
            "o": [1.0, None, float("nan"), 4.0, 1e39],
            "m": [[1, 2], [1, 2], [1], [1, 2], [1, 2]],
            "w": ["2024-01-01", "2024-01-01", "2024-01-01", "2024-01-01", "soon"],
        }
    )
    bad = Bad(5)
    columns = typed(table, features, bad)
    assert bad.reasons == {
        1: ("n", "not a number"),
        2: ("m", "not numbers in the shape [2]"),
        3: ("n", "empty"),
        4: ("n", "infinite"),
    }
    assert typed(table.slice(4), features[1:2], alone := Bad(1))
    assert alone.reasons == {0: ("o", "too large for float32")}
    assert columns["n"][0] == 1.0
    assert np.isnan(columns["o"][[1, 2]]).all()
    assert columns["w"][0] == 1704067200.0
