"""TensorFlow Serving's REST API, the Open Inference Protocol and Arrow bodies, on an application without sockets."""

import json
import struct

import numpy as np
import pyarrow as pa
import pytest
from heliograph.datasets.schema import Task
from heliograph.serve import arrow
from hypothesis import given, settings
from hypothesis import strategies as st

from .served import TABLE, TENSOR, Room

V1, V2 = "/v1/models/pets", "/v2/models/pets/infer"


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Room:
    room = Room(tmp_path_factory.mktemp("room"))
    room.add("pets", TENSOR, [[1, 0], [0, 1]])
    room.add("house", TABLE, [[2], [10]])
    room.follow()
    return room


def posted(room: Room, path: str, body: object) -> tuple[int, dict]:
    answer = room.ask("POST", path, json.dumps(body).encode())
    return answer.status, json.loads(answer.body)


def test_rows_columns_and_rows_by_name_are_answered(room):
    rows, found = [[1, 2], [3, 4.5]], [[1.0, 2.0], [3.0, 4.5]]
    assert posted(room, f"{V1}:predict", {"instances": rows}) == (200, {"predictions": found})
    assert posted(room, f"{V1}:predict", {"instances": [{"x": r} for r in rows]}) == (200, {"predictions": found})
    assert posted(room, f"{V1}:predict", {"inputs": rows, "signature_name": "serving_default"}) == (200, {"outputs": found})
    assert posted(room, f"{V1}:predict", {"inputs": {"x": rows}}) == (200, {"outputs": found})
    house = "/v1/models/house:predict"
    assert posted(room, house, {"instances": [{"size": 1, "age": 2}, {"size": 3}]}) == (200, {"predictions": [22.0, 6.0]})
    assert posted(room, house, {"inputs": {"size": [1, 3], "age": [2, None]}}) == (200, {"outputs": [22.0, 6.0]})
    assert posted(room, house, {"inputs": {"size": [1, 3]}}) == (200, {"outputs": [2.0, 6.0]})


def test_classify_and_regress_answer_as_tensorflow_serving_does(room):
    asked = {"examples": [{"x": [0.25, 0.75]}]}
    assert posted(room, f"{V1}:classify", asked) == (200, {"results": [[["dog", 0.75], ["cat", 0.25]]]})
    asked = {"context": {"age": 1}, "examples": [{"size": 1}, {"size": 2}]}
    assert posted(room, "/v1/models/house:regress", asked) == (200, {"results": [12.0, 14.0]})
    assert posted(room, f"{V1}:regress", {"examples": [{"x": [1, 2]}]})[0] == 400
    assert posted(room, "/v1/models/house:classify", {"examples": [{"size": 1}]})[0] == 400


def test_versions_labels_and_metadata_have_their_paths(room):
    status = json.loads(room.ask("GET", V1).body)["model_version_status"]
    assert status == [{"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}]
    assert json.loads(room.ask("GET", f"{V1}/versions/1").body)["model_version_status"] == status
    answer = room.ask("POST", f"{V1}/versions/1:predict", b'{"instances": [[1, 2]]}')
    assert (answer.status, answer.headers["model-version"]) == (200, "1")
    assert room.ask("POST", f"{V1}/labels/production:predict", b'{"instances": [[1, 2]]}').status == 200
    meta = json.loads(room.ask("GET", f"{V1}/metadata").body)
    assert meta["model_spec"] == {"name": "pets", "signature_name": "", "version": "1"}
    signature = meta["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["x"]["dtype"] == "DT_FLOAT"
    assert [d["size"] for d in signature["inputs"]["x"]["tensor_shape"]["dim"]] == ["-1", "2"]
    assert [d["size"] for d in signature["outputs"]["probabilities"]["tensor_shape"]["dim"]] == ["-1", "2"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models/nobody:predict", 404),
        (f"{V1}/versions/9:predict", 404),
        (f"{V1}/labels/canary:predict", 404),
        ("/v2/models/nobody/infer", 404),
        ("/v2/models/pets/versions/9/infer", 404),
        ("/v1/models/pets:divine", 404),
        ("/nothing", 404),
        (V1, 405),
        ("/v2", 405),
    ],
)
def test_unknown_models_versions_paths_and_methods_are_told_apart(room, path, status):
    answer = room.ask("POST", path, b'{"instances": [[1, 2]], "inputs": []}')
    assert answer.status == status
    assert json.loads(answer.body)["error"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"instances": [[1, 2]], "inputs": [[1, 2]]}, "exclude each other"),
        ({"inputs": {"x": [[1, 2]], "secret": [1]}}, "1 unknown features"),
        ({"inputs": {}}, "lacks `x`"),
        ({"inputs": {"x": []}}, "same number of rows"),
        ({"inputs": 3}, "must be an object"),
        ({"instances": [[1, 2]], "signature_name": "other"}, "the only signature"),
        ({"instances": [[1, True]]}, "row 0: `x` must hold finite numbers"),
        ({"instances": [[1, 2], [1, "secret"]]}, "row 1: `x` must hold finite numbers"),
        ({"instances": [[1, 2], [1]]}, "row 1: `x` has the shape [1]"),
        ({"instances": [[1, 1e39]]}, "too large for float32"),
        ({"instances": [[1, 2], None]}, "row 1: `x` must hold finite numbers"),
        ({"rows": [[1, 2]]}, '"instances"'),
    ],
)
def test_a_wrong_body_is_refused_with_a_reason_that_repeats_no_value(room, body, reason):
    status, answer = posted(room, f"{V1}:predict", body)
    assert status == 400
    assert reason in answer["error"]
    assert "secret" not in answer["error"]


def infer(room: Room, inputs: list, path: str = V2, **more) -> tuple[int, dict]:
    return posted(room, path, {"inputs": inputs, **more})


def test_the_open_inference_protocol_answers_in_json(room):
    x = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4]}
    output = {"name": "probabilities", "datatype": "FP32", "shape": [2, 2], "data": [1.0, 2.0, 3.0, 4.0]}
    expected = {"model_name": "pets", "model_version": "1", "id": "a", "outputs": [output]}
    assert infer(room, [x], id="a") == (200, expected)
    assert infer(room, [x | {"data": [[1, 2], [3, 4]]}])[1]["outputs"] == [output]
    size = {"name": "size", "shape": [2, 1], "datatype": "INT32", "data": [[1], [3]]}
    assert infer(room, [size], "/v2/models/house/infer")[1]["outputs"][0]["data"] == [2.0, 6.0]
    assert json.loads(room.ask("GET", "/v2").body)["extensions"][0] == "binary_tensor_data"
    assert json.loads(room.ask("GET", "/v2/models/pets").body)["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/pets/ready", "/v2/models/pets/versions/1/ready"):
        assert room.ask("GET", path).status == 200
    assert [m["name"] for m in json.loads(room.ask("POST", "/v2/repository/index").body)] == ["house", "pets"]


def test_tensors_may_follow_the_json_as_bytes(room):
    head = {"name": "x", "shape": [1, 2], "datatype": "FP16", "parameters": {"binary_data_size": 4}}
    asked = {"inputs": [head], "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}]}
    text = json.dumps(asked).encode()
    answer = room.ask("POST", V2, text + np.array([1, 2], "<f2").tobytes(), "application/octet-stream", len(text))
    assert answer.status == 200
    length = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert np.frombuffer(answer.body[length:], "<f4").tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "secret"}, "unknown name"),
        ({"datatype": "BYTES"}, "its datatype must be FP32"),
        ({"datatype": ["FP32"]}, "its datatype must be FP32"),
        ({"shape": [1, 3]}, "its shape must be [rows, 2]"),
        ({"shape": [-1, 2]}, "a list of whole numbers"),
        ({"shape": [True, 2]}, "a list of whole numbers"),
        ({"shape": [5, 2]}, "10 numbers"),
        ({"data": [1, "secret"]}, "2 numbers of FP32"),
        ({"data": [[1], [2, 3]]}, "ragged"),
        ({"data": [True, False]}, "2 numbers of FP32"),
        ({"data": [1, 1e39]}, "row 0: `x` holds NaN, infinity or a number too large"),
        ({"data": None}, '"data" must be a list'),
        ({"parameters": {"binary_data_size": 8}}, "does not fit the body"),
        ({"parameters": {"binary_data_size": -8}}, "does not fit the body"),
        ({"parameters": 3}, '"parameters" must be an object'),
    ],
)
def test_a_wrong_tensor_is_refused_with_a_reason_that_repeats_no_value(room, change, reason):
    x = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]} | change
    status, answer = infer(room, [x])
    assert status == 400
    assert reason in answer["error"]
    assert "secret" not in answer["error"]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120), st.integers(-1, 130), st.booleans())
def test_no_bytes_break_the_binary_extension(room, tail, length, sane):
    x = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    body = (json.dumps({"inputs": [x]}).encode() if sane else b"") + tail
    for kind, path, size in (("application/json", V2, length), (arrow.TYPE, f"{V1}:predict", None), ("", f"{V1}:predict", None)):
        assert room.ask("POST", path, body, kind, size).status in (200, 400, 415)


def stream(table: pa.Table, **options) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_arrow_tables_are_answered_and_checked(room):
    rows = pa.table({"x": pa.array([[1.0, 2.0], [4.0, 3.0]], pa.list_(pa.float32(), 2))})
    answer = room.ask("POST", f"{V1}:predict", stream(rows), arrow.TYPE)
    table = pa.ipc.open_stream(answer.body).read_all()
    assert table.column("prediction").to_pylist() == ["dog", "cat"]
    assert table.column("probabilities").combine_chunks().to_numpy_ndarray().tolist() == [[1, 2], [4, 3]]
    house = "/v1/models/house:predict"
    answer = room.ask("POST", house, stream(pa.table({"size": [1, 3]})), arrow.TYPE)
    assert pa.ipc.open_stream(answer.body).read_all().to_pydict() == {"prediction": [2.0, 6.0]}
    for table, reason in (
        (pa.table({"size": [1.0, None]}), "row 1: `size` is empty"),
        (pa.table({"size": ["1", "secret"]}), "row 1: `size` is not a number"),
        (pa.table({"age": [1]}), "lacks `size`"),
        (pa.table({"size": [1], "secret": [1]}), "1 unknown columns"),
        (pa.table({"size": pa.array([], pa.int64())}), "no row"),
    ):
        refused = room.ask("POST", house, stream(table), arrow.TYPE)
        assert refused.status == 400
        assert reason in json.loads(refused.body)["error"]
        assert b"secret" not in refused.body
    bomb = stream(pa.table({"size": np.zeros(100_000)}), compression="zstd")
    assert room.ask("POST", house, bomb, arrow.TYPE).status == 415
    assert room.ask("POST", house, stream(rows)[:50], arrow.TYPE).status == 400


def test_the_metrics_count_what_was_answered(room):
    before = room.stats.requests.copy()
    room.ask("POST", f"{V1}:predict", b'{"instances": [[1, 2]]}')
    page = room.ask("GET", "/metrics").body.decode()
    assert before == room.stats.requests  # requests are counted where they come in, by the front
    assert 'heliograph_stage_seconds_count{model="pets",stage="model",version="1"}' in page
    assert 'heliograph_load_seconds{model="pets",version="1"}' in page


def test_a_model_that_requires_sealed_requests_refuses_others(tmp_path):
    room = Room(tmp_path, encrypted="required")
    room.add("pets", TENSOR, [[1, 0], [0, 1]])
    room.follow()
    for path in (f"{V1}:predict", V2):
        answer = room.ask("POST", path, b"{}")
        assert answer.status == 403
        assert b"encapsulated requests only" in answer.body


def test_bytes_tensors_are_split_by_their_lengths():
    from heliograph.datasets.schema import Feature
    from heliograph.errors import RequestError
    from heliograph.serve.oip import _split

    items = [b"", b"a", b"bc" * 100]
    data = b"".join(struct.pack("<I", len(i)) + i for i in items)
    feature = Feature(name="t", kind="text")
    assert _split(memoryview(data), 3, feature) == items
    for broken, count in ((data[:-1], 3), (data, 2), (data + b"\0", 3), (struct.pack("<I", 1 << 31), 1)):
        with pytest.raises(RequestError):
            _split(memoryview(broken), count, feature)


def test_several_targets_are_answered_by_name(tmp_path):
    schema = TENSOR.model_copy(update={
        "task": "several", "target": "pet, weight", "classes": (),
        "tasks": (Task(name="pet", classes=("cat", "dog")), Task(name="weight")),
    })  # fmt: skip
    room = Room(tmp_path)
    room.add("zoo", schema, [[1, 0, 5], [0, 1, 7]])
    room.follow()
    rows = [[0.25, 0.75], [1, 0]]
    zoo = "/v1/models/zoo"
    found = [{"pet": [0.25, 0.75], "weight": 6.5}, {"pet": [1.0, 0.0], "weight": 5.0}]
    assert posted(room, f"{zoo}:predict", {"instances": rows}) == (200, {"predictions": found})
    by_name = {"pet": [[0.25, 0.75], [1.0, 0.0]], "weight": [6.5, 5.0]}
    assert posted(room, f"{zoo}:predict", {"inputs": rows}) == (200, {"outputs": by_name})
    for verb in ("classify", "regress"):
        status, answer = posted(room, f"{zoo}:{verb}", {"examples": [{"x": [1, 2]}]})
        assert (status, answer["error"]) == (400, "`zoo` answers pet, weight: ask it to :predict")
    signature = json.loads(room.ask("GET", f"{zoo}/metadata").body)["metadata"]["signature_def"]["signature_def"]
    outputs = signature["serving_default"]["outputs"]
    assert {n: [d["size"] for d in o["tensor_shape"]["dim"]] for n, o in outputs.items()} == {
        "pet": ["-1", "2"],
        "weight": ["-1"],
    }
    tensor = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [0.25, 0.75, 1, 0]}
    infer = "/v2/models/zoo/infer"
    status, answer = posted(room, infer, {"inputs": [tensor]})
    assert [(o["name"], o["shape"], o["data"]) for o in answer["outputs"]] == [
        ("pet", [2, 2], [0.25, 0.75, 1.0, 0.0]), ("weight", [2], [6.5, 5.0])
    ]  # fmt: skip
    some = [{"name": "weight", "parameters": {"binary_data": True}}, {"name": "pet", "parameters": {"classification": 1}}]
    answer = room.ask("POST", infer, json.dumps({"inputs": [tensor], "outputs": some}).encode())
    length = int(answer.headers["inference-header-content-length"])
    head = json.loads(answer.body[:length])
    assert [o["name"] for o in head["outputs"]] == ["weight", "pet"]
    assert np.frombuffer(answer.body[length:], "<f4").tolist() == [6.5, 5.0]
    assert head["outputs"][1]["data"] == ["0.750000:1:dog", "1.000000:0:cat"]
    status, answer = posted(room, infer, {"inputs": [tensor], "outputs": [{"name": "size"}]})
    assert (status, answer["error"]) == (400, "the model's outputs are `pet`, `weight`")
    assert [o["name"] for o in json.loads(room.ask("GET", "/v2/models/zoo").body)["outputs"]] == ["pet", "weight"]
    body = pa.BufferOutputStream()
    table = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(np.array(rows, np.float32))})
    with pa.ipc.new_stream(body, table.schema) as out:
        out.write_table(table)
    answer = room.ask("POST", f"{zoo}:predict", body.getvalue().to_pybytes(), arrow.TYPE)
    columns = pa.ipc.open_stream(answer.body).read_all()
    assert columns.column("pet prediction").to_pylist() == ["dog", "cat"]
    assert columns.column("weight prediction").to_pylist() == [6.5, 5.0]
    assert (
        b'"tasks": [{"name": "pet", "classes": ["cat", "dog"]}, {"name": "weight", "classes": []}]'
        in room.ask("GET", "/docs").body
    )
