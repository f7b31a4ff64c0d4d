"""What an endpoint answers, as a pure function: method, path, type and bytes in; status, type and bytes out.

    POST /v1/models/NAME:predict      TensorFlow Serving's JSON, or an encapsulated request (`message/ohttp-req`)
    GET  /v1/models/NAME              status, as TensorFlow Serving gives it
    GET  /v1/models/NAME/metadata     the schema
    GET  /v1/models/NAME/ohttp-keys   the public key configuration, signed for this model's name

A reason names features and shapes, and never repeats what was sent.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from ..datasets.schema import parse_instances
from ..errors import CapsuleError, RequestError
from ..jobs.engine import Engine
from . import bhttp, ohttp

MAX_BODY = 16 << 20
JSON = "application/json"
PROBLEM = "application/problem+json"
KEY_PROBLEM = orjson.dumps(
    {"type": "https://iana.org/assignments/http-problem-types#ohttp-key", "title": "the encapsulated request cannot be opened"}
)


@dataclass
class Answer:
    status: int
    type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Application:
    """One model behind its paths."""

    name: str
    engine: Engine
    gateway: ohttp.Gateway
    key_configs: bytes
    key_signature: str
    encrypted: Literal["accepted", "required"]

    def answer(self, method: str, path: str, content_type: str, body: bytes) -> Answer:
        """Answer one HTTP request. Never raises for what a client can send."""
        if content_type.partition(";")[0].strip().lower() == ohttp.REQUEST_TYPE:
            return self._answer_sealed(method, path, body)
        try:
            return self._route(method, path, body, in_clear=True)
        except RequestError as error:
            return _error(error.status, str(error))

    def _answer_sealed(self, method: str, path: str, capsule: bytes) -> Answer:
        """What cannot be opened is answered in clear, and always alike; everything else inside the capsule."""
        try:
            if method != "POST" or path != f"/v1/models/{self.name}:predict":
                raise CapsuleError("an encapsulated request goes to the model's :predict")
            message, seal = self.gateway.open_request(capsule)
        except CapsuleError:
            return Answer(400, PROBLEM, KEY_PROBLEM)
        try:
            request = bhttp.decode_request(message)
            inner = self._route(request.method.decode("latin-1"), request.path.decode("latin-1"), request.content, in_clear=False)
        except RequestError as error:
            inner = _error(error.status, str(error))
        fields = [(b"content-type", inner.type.encode())]
        sealed = seal(bhttp.encode_response(bhttp.Response(inner.status, fields, inner.body)))
        return Answer(200, ohttp.RESPONSE_TYPE, sealed)

    def _route(self, method: str, path: str, body: bytes, in_clear: bool) -> Answer:
        model = f"/v1/models/{self.name}"
        match method, path.partition("?")[0]:
            case "POST", p if p == f"{model}:predict":
                if in_clear and self.encrypted == "required":
                    raise RequestError(f"this model takes encapsulated requests only (`Content-Type: {ohttp.REQUEST_TYPE}`)", 403)
                return _json(200, {"predictions": self._predict(body)})
            case "GET", p if p == model:
                status = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
                return _json(200, {"model_version_status": [status]})
            case "GET", p if p == f"{model}/metadata":
                schema = self.engine.schema.model_dump(mode="json")
                return _json(200, {"model_spec": {"name": self.name}, "metadata": {"schema": schema}})
            case "GET", p if p == f"{model}/ohttp-keys":
                return Answer(200, ohttp.KEYS_TYPE, self.key_configs, {ohttp.SIGNATURE_HEADER: self.key_signature})
            case _, p if p in (model, f"{model}:predict", f"{model}/metadata", f"{model}/ohttp-keys"):
                raise RequestError("this path does not answer to that method", 405)
        raise RequestError(f"no such path: this endpoint serves {model}:predict", 404)

    def _predict(self, body: bytes) -> list[Any]:
        try:
            asked = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise RequestError("the body is not JSON (RFC 8259)") from None
        if not isinstance(asked, dict) or "instances" not in asked:
            raise RequestError('the body must be an object with "instances": a list of rows')
        outputs = self.engine.predict(parse_instances(asked["instances"], self.engine.schema))
        return outputs.tolist() if self.engine.schema.classes else outputs[:, 0].tolist()


def _json(status: int, value: Any) -> Answer:
    return Answer(status, JSON, orjson.dumps(value))


def _error(status: int, reason: str) -> Answer:
    return _json(status, {"error": reason})
