"""TensorFlow Serving's REST API: bodies in, bodies out.

    POST …:predict    {"instances": [row, …]}  → {"predictions": [...]}     a row an item
                      {"inputs": {feature: [...]}} → {"outputs": [...]}     a column an item
    POST …:classify   {"examples": [row, …], "context": {…}} → {"results": [[[label, score], …], …]}
    POST …:regress    {"examples": [row, …]} → {"results": [value, …]}

A row is `{feature: value}`, or the value alone where the model has one feature; bytes are `{"b64": "…"}`.
Source: the project's `api_rest.md`, and `json_tensor.cc` where that is silent.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..datasets.schema import parse_columns, parse_instances
from ..errors import RequestError
from .messages import (
    Answer,
    Ask,
    Identity,
    by_target,
    has_booleans,
    input_shape,
    json_answer,
    json_object,
    output_shape,
    scores,
    top,
)

SIGNATURE = "serving_default"
VERBS = ("predict", "classify", "regress")
TYPES = {"number": "DT_DOUBLE", "time": "DT_DOUBLE", "tensor": "DT_FLOAT", "list": "DT_DOUBLE", "text": "DT_STRING"}


def ask(verb: str, body: bytes, model: Identity) -> Ask:
    """Raises RequestError, whose text never repeats what was sent."""
    return {"predict": _predict, "classify": _classify, "regress": _regress}[verb](body, model)


def _predict(body: bytes, model: Identity) -> Ask:
    asked = _object(body)
    exact = has_booleans(body)
    if "instances" in asked and "inputs" in asked:
        raise RequestError('"instances" (rows) and "inputs" (columns) exclude each other')
    if "instances" in asked:
        columns = parse_instances(asked["instances"], model.schema, exact)
        return _rows(columns, model, "predictions")
    if "inputs" in asked:
        columns = parse_columns(asked["inputs"], model.schema, exact)
        return _rows(columns, model, "outputs")
    raise RequestError('the body must be an object with "instances": a list of rows, or "inputs": columns')


def _rows(columns: dict[str, Any], model: Identity, key: str) -> Ask:
    def render(outputs: np.ndarray) -> Answer:
        if not model.schema.tasks:
            return json_answer(200, {key: scores(outputs, model.schema)})
        found = by_target(outputs, model.schema)
        rows = [{name: values[i] for name, values in found.items()} for i in range(len(outputs))]
        return json_answer(200, {key: found if key == "outputs" else rows})

    return Ask(columns, len(next(iter(columns.values()))), render)


def _examples(body: bytes, model: Identity, results: Callable[[np.ndarray], Any]) -> Ask:
    """results: of the outputs."""
    asked = _object(body)
    examples, context = asked.get("examples"), asked.get("context", {})
    if not isinstance(examples, list) or not isinstance(context, dict) or not all(isinstance(e, dict) for e in examples):
        raise RequestError('the body must be an object with "examples": a list of {feature: value}')
    columns = parse_instances([{**context, **e} for e in examples], model.schema, has_booleans(body))
    return Ask(columns, len(examples), lambda outputs: json_answer(200, {"results": results(outputs)}))


def _classify(body: bytes, model: Identity) -> Ask:
    _require_one_target(model)
    if not model.schema.classes:
        raise RequestError(f"`{model.name}` is a regression: ask it to :regress or :predict")
    count = len(model.schema.classes)

    def results(outputs: np.ndarray) -> Any:
        return [[[label, score] for label, score, _ in row] for row in top(outputs, model.schema, count)]

    return _examples(body, model, results)


def _require_one_target(model: Identity) -> None:
    if model.schema.tasks:
        raise RequestError(f"`{model.name}` answers {model.schema.target}: ask it to :predict")


def _regress(body: bytes, model: Identity) -> Ask:
    _require_one_target(model)
    if model.schema.classes:
        raise RequestError(f"`{model.name}` is a classification: ask it to :classify or :predict")
    return _examples(body, model, lambda outputs: scores(outputs, model.schema))


def _object(body: bytes) -> dict[str, Any]:
    asked = json_object(body)
    name = asked.get("signature_name", SIGNATURE)
    if name not in ("", SIGNATURE):
        raise RequestError(f'the only signature is "{SIGNATURE}"')
    return asked


def status(states: dict[int, str]) -> Answer:
    """states: AVAILABLE, LOADING, … by version."""
    fine = {"error_code": "OK", "error_message": ""}
    listed = [{"version": str(v), "state": s, "status": fine} for v, s in sorted(states.items(), reverse=True)]
    return json_answer(200, {"model_version_status": listed})


def metadata(model: Identity) -> Answer:
    """The signature as TensorFlow Serving has it; beside it our schema, which says more."""
    features = {f.name: _tensor(f.name, TYPES.get(f.kind, "DT_STRING"), input_shape(f)) for f in model.schema.features}
    outputs = {name: _tensor(name, "DT_FLOAT", output_shape(alone)) for name, (alone, _) in model.outputs.items()}
    signature = {"inputs": features, "outputs": outputs, "method_name": "tensorflow/serving/predict"}
    spec = {"name": model.name, "signature_name": "", "version": str(model.version)}
    found = {"signature_def": {"signature_def": {SIGNATURE: signature}}, "schema": model.schema.model_dump(mode="json")}
    return json_answer(200, {"model_spec": spec, "metadata": found})


def _tensor(name: str, kind: str, shape: list[int]) -> dict[str, Any]:
    dims = [{"size": str(n), "name": ""} for n in shape]
    return {"dtype": kind, "tensor_shape": {"dim": dims, "unknown_rank": False}, "name": f"{SIGNATURE}_{name}:0"}
