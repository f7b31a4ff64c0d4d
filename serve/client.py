"""The client: raw rows in, predictions out, sealed on the way. It needs neither Ray nor TensorFlow.

with heliograph.Client("http://127.0.0.1:8000", "digits") as client:
    client.predict([image])
"""

import base64
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from ..errors import CapsuleError, EndpointError, RequestError, SignatureError
from . import bhttp, ohttp

JSON = "application/json"


class Client:
    """A connection to one model.

    url: of the endpoint, such as `http://127.0.0.1:8000`. encrypt: send encapsulated requests (RFC 9458).
    trust: the file of the public key that the endpoint's key configuration must be signed by for this model's name;
    without it the first configuration that arrives is believed. timeout: seconds, for each request.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        encrypt: bool = True,
        trust: Path | str | None = None,
        timeout: float = 30.0,
    ):
        self.url, self.model, self.encrypt = url.rstrip("/"), model, encrypt
        self._trust = Path(trust) if trust else None
        self._http = httpx.Client(timeout=timeout)
        self._config: ohttp.KeyConfig | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def predict(self, rows: Any) -> list[Any]:
        """One prediction for each row: a probability for each class, or a value.

        rows: a list (or array) of raw rows as the source has them; a row is `{feature: value}`, or the value alone where
        the model has one feature. Raises RequestError when the endpoint refuses the rows, EndpointError when it cannot
        be reached, CapsuleError when an answer cannot be opened.
        """
        body = json.dumps({"instances": _plain(rows)}, allow_nan=False).encode()
        path = f"/v1/models/{self.model}:predict"
        status, content = self._sealed(path, body) if self.encrypt else self._send("POST", path, body, JSON)
        return _opened(status, content)["predictions"]

    def schema(self) -> dict[str, Any]:
        """The model's schema: `features`, `classes`, `task`."""
        return _opened(*self._send("GET", f"/v1/models/{self.model}/metadata"))["metadata"]["schema"]

    def _sealed(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Send one encapsulated request; a key that the endpoint no longer has is fetched anew, once."""
        scheme, authority = urlsplit(self.url)[:2]
        fields = [(b"content-type", JSON.encode())]
        message = bhttp.encode_request(bhttp.Request(b"POST", scheme.encode(), authority.encode(), path.encode(), fields, body))
        for fresh in (False, True):
            if self._config is None or fresh:
                self._config = self._fetch_config()
            capsule, open_answer = ohttp.seal_request(message, self._config)
            answer = self._request("POST", path, capsule, ohttp.REQUEST_TYPE)
            if answer.headers.get("content-type") == ohttp.RESPONSE_TYPE:
                inner = bhttp.decode_response(open_answer(answer.content))
                return inner.status, inner.content
            if b"#ohttp-key" not in answer.content:
                return answer.status_code, answer.content
        raise CapsuleError("the endpoint cannot open requests sealed with the key that it publishes")

    def _fetch_config(self) -> ohttp.KeyConfig:
        answer = self._request("GET", f"/v1/models/{self.model}/ohttp-keys")
        if answer.status_code != 200:
            _opened(answer.status_code, answer.content)
        if self._trust:
            check_signature(self._trust, self.model, answer.content, answer.headers.get(ohttp.SIGNATURE_HEADER, ""))
        return ohttp.decode_configs(answer.content)[0]

    def _send(self, method: str, path: str, body: bytes = b"", content_type: str = JSON) -> tuple[int, bytes]:
        answer = self._request(method, path, body, content_type)
        return answer.status_code, answer.content

    def _request(self, method: str, path: str, body: bytes = b"", content_type: str = JSON) -> httpx.Response:
        try:
            return self._http.request(method, self.url + path, content=body, headers={"content-type": content_type})
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise EndpointError(f"{self.url}: cannot be reached ({error}): is the endpoint running?") from None


def read_rows(file: Path) -> list[Any]:
    """Rows from a JSON file (`-`: standard input): a list, or `{"instances": [...]}`. Raises RequestError."""
    import sys

    try:
        found = json.loads(sys.stdin.read() if str(file) == "-" else file.read_text())
    except OSError as error:
        raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RequestError(f"{file}: is not JSON: {error}") from None
    rows = found.get("instances") if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise RequestError(f'{file}: a list of rows is needed, or {{"instances": [...]}}')
    return rows


def signed_text(model: str, key_configs: bytes) -> bytes:
    """What a key configuration's signature is over: it binds the keys to the model's name."""
    return b"heliograph key configuration\0" + model.encode() + b"\0" + key_configs


def check_signature(public_key: Path, model: str, key_configs: bytes, signature: str) -> None:
    """Raises SignatureError unless `signature` (base64, ECDSA with SHA-256) is of `public_key` over keys and name."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(public_key.read_bytes())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("not an elliptic-curve key")
    except (OSError, ValueError) as error:
        raise SignatureError(f"{public_key}: is no public key to check signatures with ({error})") from None
    try:
        key.verify(base64.b64decode(signature, validate=True), signed_text(model, key_configs), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        raise SignatureError(
            f"the key configuration of `{model}` is not signed by {os.fspath(public_key)}: do not send to it"
        ) from None


def _plain(value: Any) -> Any:
    """Arrays as lists, at any depth."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _opened(status: int, content: bytes) -> Any:
    try:
        value = json.loads(content)
    except ValueError:
        value = {}
    if status == 200 and isinstance(value, dict):
        return value
    reason = value.get("error") or value.get("title") if isinstance(value, dict) else None
    raise RequestError(f"the endpoint refused the request ({status}): {reason or 'no reason given'}", status)
