"""What an endpoint says of itself: its OpenAPI document, and a page at `/docs` on which a person can try it.

The page holds everything that it needs; nothing is loaded from elsewhere.
"""

import functools
import json
from pathlib import Path
from typing import Any

from .. import __version__
from ..datasets.schema import Feature
from ..jobs.guard import Reference
from .messages import Identity

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string", "description": "What was found, where, and what to do."}},
}


def openapi(models: list[Identity], encrypted: str) -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, Any] = {
        "/v2": _get("The server", {"type": "object"}),
        "/v2/health/live": _get("Whether the process lives", {"type": "object"}),
        "/v2/health/ready": _get("Whether every model can answer", {"type": "object"}, (503,)),
        "/v2/repository/index": {
            "post": _operation(
                "Models and versions", {"type": "array", "items": {"type": "object"}}, body={"type": "object"}, optional=True
            )
        },
        "/metrics": _get("Prometheus metrics", {"type": "string"}, kind="text/plain"),
    }
    for model in models:
        base = f"/v1/models/{model.name}"
        paths[base] = _get("The state of each version", {"type": "object", "required": ["model_version_status"]})
        paths[f"{base}/metadata"] = _get(
            "The signature and the schema", {"type": "object", "required": ["model_spec", "metadata"]}
        )
        paths[f"{base}/ohttp-keys"] = _get("Keys for sealed requests (RFC 9458), signed", None, kind="application/ohttp-keys")
        paths[f"{base}/rollout"] = _get(
            "Aliases, and what became of the latest rollout", {"type": "object", "required": ["aliases"]}
        )
        paths[f"/v2/models/{model.name}"] = _get(
            "Inputs and outputs", {"type": "object", "required": ["name", "inputs", "outputs"]}
        )
        paths[f"/v2/models/{model.name}/ready"] = _get("Whether it can answer", {"type": "object"}, (503,))
        row, verb = _row(model), "classify" if model.schema.classes else "regress"
        verbs = [] if model.schema.tasks else [(f"{base}:{verb}", "examples", _examples(model), "results")]
        rows = {"type": "array", "minItems": 1, "items": row}
        refused = (403,) if encrypted == "required" else ()
        for path, key, given, found in (
            (f"{base}:predict", "instances", rows, "predictions"),
            *verbs,
        ):
            body = {
                "type": "object",
                "required": [key],
                "properties": {key: given, "signature_name": {"const": "serving_default"}},
            }
            answer = {"type": "object", "required": [found], "properties": {found: {"type": "array"}}}
            paths[path] = {"post": _operation(f"{found.capitalize()} for rows", answer, body=body, more=refused)}
        tensor = {
            "type": "object",
            "required": ["name", "shape", "datatype", "data"],
            "properties": {
                "name": {"enum": [f.name for f in model.schema.features]},
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                "datatype": {"type": "string"},
                "data": {"type": "array"},
            },
        }
        body = {
            "type": "object",
            "required": ["inputs"],
            "properties": {"inputs": {"type": "array", "minItems": 1, "items": tensor}},
        }
        answer = {"type": "object", "required": ["model_name", "model_version", "outputs"]}
        paths[f"/v2/models/{model.name}/infer"] = {"post": _operation("Open Inference Protocol", answer, body=body, more=refused)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "heliograph",
            "version": __version__,
            "description": "Predictions of " + ", ".join(m.name for m in models),
        },
        "paths": paths,
    }


def _get(text: str, schema: dict[str, Any] | None, more: tuple[int, ...] = (), kind: str = "application/json") -> dict[str, Any]:
    return {"get": _operation(text, schema, more=more, kind=kind)}


def _operation(
    text: str,
    schema: dict[str, Any] | None,
    body: dict[str, Any] | None = None,
    optional: bool = False,
    more: tuple[int, ...] = (),
    kind: str = "application/json",
) -> dict[str, Any]:
    codes = (*more, *((400, 408, 413, 415) if body else ()), 503)
    found: dict[str, Any] = {
        "summary": text,
        "responses": {
            "200": {"description": "done", "content": {kind: {"schema": schema} if schema else {}}},
            **{
                str(c): {
                    "description": "refused",
                    "content": {"application/json": {"schema": {"type": "object"} if c == 503 else ERROR}},
                }
                for c in codes
            },
        },
    }
    if body:
        found["requestBody"] = {"required": not optional, "content": {"application/json": {"schema": body}}}
    return found


def _row(model: Identity) -> dict[str, Any]:
    alone = [_value(f) for f in model.schema.features] if len(model.schema.features) == 1 else []
    return {"anyOf": [_object(model), *alone]}


def _object(model: Identity) -> dict[str, Any]:
    features = model.schema.features
    return {
        "type": "object",
        "required": [f.name for f in features if not f.optional],
        "additionalProperties": False,
        "properties": {f.name: _value(f) for f in features},
    }


def _value(feature: Feature) -> dict[str, Any]:
    number = {"type": "number", "minimum": -1e30, "maximum": 1e30}
    kinds: dict[str, dict[str, Any]] = {
        "number": number,
        "time": {"type": "string", "format": "date-time"},
        "text": {"type": "string"},
        "list": {"type": "array", "items": number},
        "image": {"type": "object", "required": ["b64"], "properties": {"b64": {"type": "string", "contentEncoding": "base64"}}},
    }
    found = kinds.get(feature.kind, number)
    for n in reversed(feature.shape):
        found = {"type": "array", "minItems": n, "maxItems": n, "items": found}
    return {"anyOf": [found, {"type": "null"}]} if feature.optional else found


def _examples(model: Identity) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": _object(model)}


STATIC = Path(__file__).parent / "static"
KEPT_VALUES = 50


@functools.cache
def _page() -> str:
    """The page without its models: a file of everything, with nothing to load from elsewhere."""
    text = (STATIC / "page.html").read_text()
    for name, file in (("@HPKE@", "hpke.js"), ("@PLAYGROUND@", "playground.js")):
        text = text.replace(name, (STATIC / file).read_text())
    return text


def html(models: list[tuple[Identity, Reference | None]] | None, encrypted: str) -> bytes:
    """The page on which a person tries the models, each with what is known of its training rows.

    models: None where the asker must say first who they are: the page then asks for a token."""
    told = json.dumps(None if models is None else [_told(model, known, encrypted) for model, known in models])
    return _page().replace("@MODELS@", told.replace("<", "\\u003c")).encode()


def _told(model: Identity, known: Reference | None, encrypted: str) -> dict[str, Any]:
    schema, of = model.schema, {d.name: d for d in known.features} if known else {}
    features = []
    for feature in schema.features:
        low, mean, high = known.ranges.get(feature.name, (None, None, None)) if known else (None, None, None)
        values = of[feature.name].values[:KEPT_VALUES] if feature.name in of and feature.kind == "text" else ()
        features.append({
            "name": feature.name, "kind": feature.kind, "shape": feature.shape, "optional": feature.optional,
            "low": low, "mean": mean, "high": high, "values": values if len(values) < KEPT_VALUES else (),
        })  # fmt: skip
    tasks = [{"name": t.name, "classes": t.classes} for t in schema.tasks]
    return {
        "name": model.name, "version": model.version, "target": schema.target, "classes": schema.classes, "tasks": tasks,
        "features": features, "encrypted": encrypted,
    }  # fmt: skip
