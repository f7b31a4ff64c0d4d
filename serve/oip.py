"""The Open Inference Protocol, version 2, over REST, with the binary tensor extension.

    POST /v2/models/NAME[/versions/V]/infer

A request is JSON; with `Inference-Header-Content-Length` only that many bytes are, and the tensors follow, little-endian and
in the order of the inputs that say `binary_data_size`. A tensor an input, one named like each feature of the schema:

    number, time   any number type `[rows]` or `[rows, 1]`        text    BYTES `[rows]`
    tensor         any number type `[rows, *shape]`               image   BYTES `[rows]`; as JSON, base64
    list           any number type `[rows, length]`

The answer has one output, `probabilities` FP32 `[rows, classes]` or `values` FP32 `[rows]`. Sources: the protocol's
`rest_predict_v2.yaml`; Triton's `extension_binary_data.md` and `extension_classification.md`.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from ..datasets.schema import Columns, Feature, column_from_array, column_from_bytes, listed
from ..errors import RequestError
from .messages import (
    LENGTH_HEADER,
    Answer,
    Ask,
    Identity,
    Request,
    input_shape,
    json_answer,
    json_object,
    output_shape,
    scores,
    top,
)

DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
PLATFORM = "heliograph"
NATIVE = {"number": "FP64", "time": "FP64", "list": "FP64", "tensor": "FP32", "text": "BYTES", "image": "BYTES"}


def ask(request: Request, model: Identity) -> Ask:
    """Raises RequestError, whose text never repeats what was sent."""
    length = len(request.body) if request.json_length is None else request.json_length
    if not 0 <= length <= len(request.body):
        raise RequestError(f"{LENGTH_HEADER} is {length}, the body has {len(request.body)} bytes")
    view = memoryview(request.body)
    asked = json_object(view[:length])
    columns, rows = _columns(asked, view[length:], model)
    answer_id = asked.get("id", "")
    if not isinstance(answer_id, str):
        raise RequestError('"id" must be text')
    wanted = _wanted(asked, model)

    def render(outputs: np.ndarray) -> Answer:
        return _render(outputs, model, answer_id, wanted)

    return Ask(columns, rows, render)


def _columns(asked: dict[str, Any], tail: memoryview, model: Identity) -> tuple[Columns, int]:
    inputs = asked.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(i, dict) and isinstance(i.get("name"), str) for i in inputs):
        raise RequestError('"inputs" must be a list of tensors with a name each')
    features = {f.name: f for f in model.schema.features}
    found: Columns = {}
    at = 0
    for given in inputs:
        feature = features.get(given["name"])
        if feature is None:
            raise RequestError(f"an input has an unknown name; the features are {listed(list(features))}")
        if feature.name in found:
            raise RequestError(f"input `{feature.name}` is given twice")
        size = _parameters(given).get("binary_data_size")
        if size is None:
            found[feature.name] = _from_json(given, feature)
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 0 or at + size > len(tail):
            raise RequestError(f"input `{feature.name}`: its binary_data_size does not fit the body")
        found[feature.name] = _from_binary(given, tail[at : at + size], feature)
        at += size
    if at != len(tail):
        raise RequestError(f"{len(tail) - at} bytes of the body belong to no input")
    counts = {len(c) for c in found.values()}
    missing = [f for f in features.values() if f.name not in found]
    if required := [f.name for f in missing if not f.optional]:
        raise RequestError(f"the inputs lack {listed(required)}; the features are {listed(list(features))}")
    if len(counts) != 1 or counts == {0}:
        raise RequestError("the inputs must have the same number of rows, at least one")
    (rows,) = counts
    for feature in missing:
        found[feature.name] = feature.empty(rows)
    return {name: found[name] for name in features}, rows


def _parameters(given: dict[str, Any]) -> dict[str, Any]:
    found = given.get("parameters", {})
    if not isinstance(found, dict):
        raise RequestError('"parameters" must be an object')
    return found


def _header(given: dict[str, Any], feature: Feature) -> tuple[str, tuple[int, ...]]:
    """The datatype and shape of an input."""
    kind, shape = given.get("datatype"), given.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 31 for n in shape):
        raise RequestError(f"input `{feature.name}`: its shape must be a list of whole numbers")
    numbers = feature.kind not in ("text", "image")
    if not isinstance(kind, str) or not (kind in DTYPES if numbers else kind == "BYTES"):
        wanted = f"{NATIVE[feature.kind]} or another number type" if numbers else "BYTES"
        raise RequestError(f"input `{feature.name}`: its datatype must be {wanted}")
    if feature.kind in ("number", "time", "text", "image") and len(shape) == 2 and shape[1] == 1:
        shape = shape[:1]
    depth = {"tensor": 1 + len(feature.shape), "list": 2}.get(feature.kind, 1)
    if len(shape) != depth or (feature.kind == "tensor" and tuple(shape[1:]) != feature.shape):
        right = ["rows", *map(str, feature.shape), *(["length"] if feature.kind == "list" else [])]
        raise RequestError(f"input `{feature.name}`: its shape must be [{', '.join(right)}]")
    return kind, tuple(shape)


def _from_binary(given: dict[str, Any], data: memoryview, feature: Feature) -> Any:
    kind, shape = _header(given, feature)
    if kind == "BYTES":
        return column_from_bytes(_split(data, shape[0], feature), feature)
    dtype = np.dtype(DTYPES[kind])
    if math.prod(shape) * dtype.itemsize != len(data):
        raise RequestError(f"input `{feature.name}`: {list(shape)} of {kind} are not {len(data)} bytes")
    return column_from_array(np.frombuffer(data, dtype).reshape(shape), feature)


def _split(data: memoryview, count: int, feature: Feature) -> list[bytes]:
    """Items of a BYTES tensor: each behind its length, 4 bytes."""
    found, at = [], 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        found.append(bytes(data[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(data) or len(found) != count:
        raise RequestError(f"input `{feature.name}`: its bytes are not {count} items, each behind its length")
    return found


def _from_json(given: dict[str, Any], feature: Feature) -> Any:
    kind, shape = _header(given, feature)
    data = given.get("data")
    if not isinstance(data, list):
        raise RequestError(f'input `{feature.name}`: "data" must be a list')
    if kind == "BYTES":
        flat: list[Any] = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in data]
        if len(flat) != shape[0] or not all(isinstance(v, str) for v in flat):
            raise RequestError(f'input `{feature.name}`: "data" must be {shape[0]} texts')
        return column_from_bytes([v.encode() for v in flat], feature, base64_images=True)
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError):
        raise RequestError(f'input `{feature.name}`: "data" is ragged') from None
    if array.dtype.kind not in "biuf" or array.size != math.prod(shape) or (array.dtype.kind == "b") != (kind == "BOOL"):
        raise RequestError(f'input `{feature.name}`: "data" must be {math.prod(shape)} numbers of {kind}')
    return column_from_array(array.reshape(shape), feature)


@dataclass(frozen=True)
class _Wanted:
    """An output that is asked for. classes: how many of them as text; 0 for all as numbers."""

    name: str
    binary: bool
    classes: int


def _wanted(asked: dict[str, Any], model: Identity) -> list[_Wanted]:
    default = _parameters(asked).get("binary_data_output", False)
    outputs = asked.get("outputs") or [{"name": name} for name in model.outputs]
    if not isinstance(outputs, list) or not all(isinstance(o, dict) for o in outputs):
        raise RequestError('"outputs" must be a list of objects')
    names = [o.get("name") for o in outputs]
    if any(not isinstance(name, str) or name not in model.outputs for name in names) or len(set(names)) < len(names):
        known = ", ".join(f"`{name}`" for name in model.outputs)
        raise RequestError(
            f"the model has one output, {known}" if len(model.outputs) == 1 else f"the model's outputs are {known}"
        )
    return [_asked_for(output, default, model) for output in outputs]


def _asked_for(output: dict[str, Any], default: Any, model: Identity) -> _Wanted:
    parameters, (alone, _) = _parameters(output), model.outputs[output["name"]]
    classes = parameters.get("classification", 0)
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0 or (classes and not alone.classes):
        raise RequestError("classification must be a number of classes, of a model that has some")
    return _Wanted(output["name"], bool(parameters.get("binary_data", default)), classes)


def _render(outputs: np.ndarray, model: Identity, answer_id: str, wanted: list[_Wanted]) -> Answer:
    head: dict[str, Any] = {"model_name": model.name, "model_version": str(model.version)}
    if answer_id:
        head["id"] = answer_id
    found = [_tensor(outputs, model, each) for each in wanted]
    head["outputs"] = [output for output, _ in found]
    if not any(each.binary for each in wanted):
        return json_answer(200, head)
    text = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    body = text + b"".join(raw for _, raw in found)
    return Answer(200, "application/octet-stream", body, {LENGTH_HEADER: str(len(text))})


def _tensor(outputs: np.ndarray, model: Identity, wanted: _Wanted) -> tuple[dict[str, Any], bytes]:
    """(what the JSON says of an output, its bytes where it is binary)."""
    alone, of = model.outputs[wanted.name]
    outputs = outputs[:, of]
    if wanted.classes:
        texts = [f"{score:f}:{i}:{label}" for row in top(outputs, alone, wanted.classes) for label, score, i in row]
        kind, shape = "BYTES", [len(outputs), len(texts) // len(outputs)]
        raw = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts) if wanted.binary else b""
        plain: Any = texts
    else:
        found = scores(outputs, alone)
        kind, shape = "FP32", list(found.shape)
        raw = found.astype("<f4", copy=False).tobytes() if wanted.binary else b""
        plain = found.reshape(-1)
    output: dict[str, Any] = {"name": wanted.name, "datatype": kind, "shape": shape}
    return output | ({"parameters": {"binary_data_size": len(raw)}} if wanted.binary else {"data": plain}), raw


def server() -> Answer:
    from .. import __version__

    extensions = ["binary_tensor_data", "classification", "model_repository"]
    return json_answer(200, {"name": PLATFORM, "version": __version__, "extensions": extensions})


def metadata(model: Identity, versions: list[int]) -> Answer:
    inputs = [{"name": f.name, "datatype": NATIVE[f.kind], "shape": input_shape(f)} for f in model.schema.features]
    outputs = [{"name": name, "datatype": "FP32", "shape": output_shape(alone)} for name, (alone, _) in model.outputs.items()]
    found = {"name": model.name, "versions": [str(v) for v in versions], "platform": PLATFORM}
    return json_answer(200, found | {"inputs": inputs, "outputs": outputs})


def index(states: dict[str, dict[int, str]], body: bytes) -> Answer:
    """`repository/index`. states: by name and version."""
    ready_only = bool(json_object(body).get("ready")) if body else False
    listed_states = [
        {"name": name, "version": str(version), "state": "READY" if state == "AVAILABLE" else "UNAVAILABLE", "reason": ""}
        for name, versions in sorted(states.items())
        for version, state in sorted(versions.items())
    ]
    return json_answer(200, [s for s in listed_states if s["state"] == "READY" or not ready_only])
