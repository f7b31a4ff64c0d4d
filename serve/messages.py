"""What the protocols share: a request's bytes, an answer's bytes, and what lies between them.

Every protocol is a pure function of bytes: `Request` and the schema in, `Ask` out (rows for the model, and how its outputs
become the answer). No socket and no model is needed to test one.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from ..datasets.schema import Columns, Feature, Schema
from ..errors import RequestError

log = logging.getLogger("heliograph")
JSON = "application/json"
MAX_BODY = 16 << 20
TOO_LARGE = f"the body is larger than {MAX_BODY >> 20} MiB"
LENGTH_HEADER = "inference-header-content-length"


@dataclass
class Request:
    method: str
    path: str
    """Without the query."""
    type: str = ""
    """The media type of the body, in lower case, without parameters."""
    body: bytes = b""
    json_length: int | None = None
    """Bytes of the body that are JSON, where tensors follow it (`Inference-Header-Content-Length`)."""
    authorization: str = ""

    @classmethod
    def read(cls, method: str, path: str, header: Callable[[bytes], bytes | None], body: bytes) -> "Request":
        """header: a header's value by its lower-case name. Raises RequestError."""
        kind = (header(b"content-type") or b"").decode("latin-1").partition(";")[0].strip().lower()
        length = header(LENGTH_HEADER.encode())
        if length is not None and not (length.isdigit() and len(length) < 10):
            raise RequestError(f"{LENGTH_HEADER} must be a number")
        authorization = (header(b"authorization") or b"").decode("latin-1")
        return cls(method, path, kind, body, None if length is None else int(length), authorization)


@dataclass
class Answer:
    status: int
    type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Identity:
    """Which model a request is for, and what the model reads and answers."""

    name: str
    version: int
    schema: Schema

    @property
    def outputs(self) -> dict[str, tuple[Schema, slice]]:
        """By name, the schema of an output alone and where it stands among the model's: of several targets, each by its own."""
        parts = self.schema.parts
        if self.schema.tasks:
            return {alone.target: (alone, of) for alone, of in parts}
        return {"probabilities" if self.schema.classes else "values": parts[0]}


def output_shape(alone: Schema) -> list[int]:
    """-1 for the rows."""
    return [-1, len(alone.classes)] if alone.classes else [-1]


def input_shape(feature: Feature) -> list[int]:
    """Of a tensor that holds a feature; -1 for what differs from request to request."""
    return [-1, *feature.shape, *([-1] if feature.kind == "list" else [])]


@dataclass
class Ask:
    """Rows for a model. render: the outputs `[rows, schema.outputs]` to the answer."""

    columns: Columns
    rows: int
    render: Callable[[np.ndarray], Answer]


def json_answer(status: int, value: Any, headers: dict[str, str] | None = None) -> Answer:
    """Arrays may be in it: float32 is written with the digits that it has."""
    return Answer(status, JSON, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), headers or {})


def error_answer(error: RequestError) -> Answer:
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["www-authenticate"] = 'Bearer realm="heliograph"'
    return json_answer(error.status, {"error": str(error)}, headers)


async def answered(work: Awaitable[Answer]) -> Answer:
    """Its answer, or the one that says why there is none."""
    try:
        return await work
    except RequestError as error:
        return error_answer(error)
    except Exception:
        log.exception("a request failed")
        return json_answer(500, {"error": "the endpoint failed: its log says why"})


def json_object(body: bytes | memoryview) -> dict[str, Any]:
    """Raises RequestError."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise RequestError("the body is not JSON (RFC 8259)") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


def has_booleans(body: bytes) -> bool:
    """Whether a JSON text may hold `true` or `false`: an array of numbers would take them for 1 and 0."""
    return b"true" in body or b"false" in body


def scores(outputs: np.ndarray, schema: Schema) -> np.ndarray:
    """`[rows, classes]`, or `[rows]` of a regression; contiguous, as `json_answer` needs it."""
    return np.ascontiguousarray(outputs if schema.classes else outputs[:, 0])


def by_target(outputs: np.ndarray, schema: Schema) -> dict[str, np.ndarray]:
    """`scores` of each of several targets."""
    return {alone.target: scores(outputs[:, of], alone) for alone, of in schema.parts}


def top(outputs: np.ndarray, schema: Schema, count: int) -> list[list[tuple[str, float, int]]]:
    """For each row its most probable classes: (label, probability, index), best first."""
    best = np.argsort(-outputs, axis=1, kind="stable")[:, :count]
    return [[(str(schema.classes[i]), float(row[i]), int(i)) for i in chosen] for row, chosen in zip(outputs, best, strict=True)]
