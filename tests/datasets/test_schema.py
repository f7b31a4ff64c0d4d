"""What a request must look like, and what it is told when it does not."""

import numpy as np
import pyarrow as pa
import pytest
from heliograph.datasets.schema import Feature, Schema, arrays, infer, parse_instances
from heliograph.errors import DataError, RequestError
from heliograph.project import Data

IMAGE = Schema(task="classification", target="y", classes=(0, 1), features=(Feature(name="image", shape=(2, 2)),))
TABLE = Schema(task="regression", target="y", features=(Feature(name="age", shape=()), Feature(name="curve", shape=(3,))))


def test_inputs_are_one_vector_of_numbers_and_a_tensor_each():
    assert IMAGE.inputs == {"image": (2, 2)}
    assert IMAGE.input_shape == (2, 2)
    assert TABLE.inputs == {"features": (1,), "curve": (3,)}
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
        ([{"age": 5, "curve": [1, 2, 3], "secret": 1}], TABLE, "row 0: has 1 unknown features"),
    ],
)
def test_a_wrong_row_is_refused_with_a_reason_that_repeats_no_value(instances, schema, reason):
    with pytest.raises(RequestError) as caught:
        parse_instances(instances, schema)
    assert reason in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.status == 400


def inferred(target: pa.Array, **options) -> Schema:
    table = pa.table({"x": pa.array(np.arange(len(target), dtype=np.float64)), "y": target})
    return infer(table, table.column("y"), Data(source="s", target="y", **options), "s")


def test_the_task_follows_from_the_target():
    assert inferred(pa.array(["b", "a", "b"])).classes == ("a", "b")
    assert inferred(pa.array([2.0, 1.0])).classes == (1, 2)
    assert inferred(pa.array([0.5, 1.0])).task == "regression"
    assert inferred(pa.array(list(range(200)))).task == "regression"
    assert inferred(pa.array(list(range(200))), task="classification").outputs == 200
    assert inferred(pa.array([1, 2]), task="regression").outputs == 1


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (pa.array([1, 1]), "one class only"),
        (pa.array([1, None]), "empty in 1 rows"),
        (pa.array([1.0, float("nan")]), "NaN or infinity"),
    ],
)
def test_an_unusable_target_is_refused(target, reason):
    with pytest.raises(DataError, match=reason):
        inferred(target)


def test_empty_cells_and_uneven_lists_are_refused_with_the_column():
    with pytest.raises(DataError, match="column `age`: empty, NaN or infinite in 1 rows"):
        arrays(pa.table({"age": pa.array([1.0, None]), "curve": pa.array([[1, 2, 3]] * 2)}), TABLE)
    with pytest.raises(DataError, match=r"column `curve`: not every row has the shape \[3\]"):
        arrays(pa.table({"age": pa.array([1.0, 2.0]), "curve": pa.array([[1, 2, 3], [1, 2]])}), TABLE)
