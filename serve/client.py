"""The client: raw rows in, predictions out, sealed on the way. It needs neither Ray nor TensorFlow.

    with heliograph.Client("http://127.0.0.1:8000", "digits") as client:
        client.predict([image])

`AsyncClient` is the same with `async with` and `await`. What they do is written once, as generators that yield requests and
are sent answers; the two classes differ in who waits.

A request that found nobody, or an endpoint that has too much to do (503), is sent again, after a pause that doubles; a
prediction changes nothing, so that is safe. A budget (a tenth of a retry for each request, ten at most) keeps clients from
burying an endpoint that is down under repetitions.
"""

import asyncio
import base64
import json
import os
import random
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from ..errors import CapsuleError, EndpointError, KeyStoreError, RequestError, SignatureError
from . import bhttp, ohttp

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
TOKEN_VARIABLE = "HELIOGRAPH_TOKEN"  # noqa: S105  its name
TRY_AGAIN = (502, 503, 504)
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
"""Seconds."""
EARNED, MOST_SAVED = 0.1, 10.0
"""Retries that a request earns, and that can be saved up."""


@dataclass
class _Asked:
    method: str
    path: str
    body: bytes = b""
    type: str = JSON
    authorization: str = ""


@dataclass
class _Answered:
    status: int
    body: bytes
    headers: Any = field(default_factory=dict)

    @property
    def type(self) -> str:
        return self.headers.get("content-type", "")


Steps = Generator[_Asked | float, Any, Any]
"""Yields requests, and is sent an `httpx.Response` or what kept it from coming; and seconds to pause."""
UNREACHED = (httpx.TransportError, httpx.InvalidURL)


class _Talk:
    """What client and endpoint say to each other."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        version: int | None = None,
        encrypt: bool = True,
        trust: Path | str | None = None,
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 5,
    ):
        self.url, self.model, self.encrypt = url.rstrip("/"), model, encrypt
        self._version = version
        token = token or os.environ.get(TOKEN_VARIABLE, "")
        self._authorization = f"Bearer {token}" if token else ""
        self._place = f"/v1/models/{quote(model, safe='')}" + (f"/versions/{version}" if version is not None else "")
        self._trust = Path(trust) if trust else None
        if self._trust and not self._trust.is_file():
            raise KeyStoreError(f"{trust}: not found: name the public key of the endpoint's signer (RUN/keys/signing.pub)")
        self._timeout, self._retries, self._saved = timeout, retries, MOST_SAVED
        self._config: ohttp.KeyConfig | None = None
        self._config_until = 0.0

    def _predict(self, rows: Any) -> Steps:
        body = json.dumps({"instances": _plain(rows)}, allow_nan=False).encode()
        answer = yield from self._ask_model("POST", f"{self._place}:predict", body, JSON)
        return _opened(answer)["predictions"]

    def _explain(self, rows: Any) -> Steps:
        body = json.dumps({"instances": _plain(rows)}, allow_nan=False).encode()
        answer = yield from self._ask_model("POST", f"{self._place}:explain", body, JSON)
        return _opened(answer)["explanations"]

    def _drift(self) -> Steps:
        return _opened((yield from self._ask_model("GET", f"{self._place}/drift")))["features"]

    def _predict_table(self, table: Any) -> Steps:
        import pyarrow as pa

        answer = yield from self._ask_model("POST", f"{self._place}:predict", arrow_stream(table), ARROW)
        if answer.status != 200:
            _opened(answer)
        return pa.ipc.open_stream(answer.body).read_all()

    def _schema(self) -> Steps:
        answer = yield from self._ask_model("GET", f"{self._place}/metadata")
        return _opened(answer)["metadata"]["schema"]

    def _deploy(self, wanted: dict[str, Any]) -> Steps:
        answer = yield from self._ask_model("POST", f"{self._place}:deploy", json.dumps(wanted).encode())
        return _opened(answer)

    def _rollout(self) -> Steps:
        return _opened((yield from self._ask_model("GET", f"{self._place}/rollout")))

    def _ask_model(self, method: str, path: str, body: bytes = b"", kind: str = JSON) -> Steps:
        """Send one request; sealed, a key that the endpoint no longer has is fetched anew, once."""
        if not self.encrypt:
            return (yield from self._ask(_Asked(method, path, body, kind, self._authorization)))
        scheme, authority = urlsplit(self.url)[:2]
        fields = [(b"content-type", kind.encode()), (b"date", formatdate(usegmt=True).encode())]
        if self._authorization:
            fields.append((b"authorization", self._authorization.encode()))
        request = bhttp.Request(method.encode(), scheme.encode(), authority.encode(), path.encode(), fields, body)
        message = bhttp.padded(bhttp.encode_request(request))
        for fresh in (False, True):
            if fresh or self._config is None or time.monotonic() > self._config_until:
                yield from self._fetch_config()
            config = self._config
            assert config
            capsule, open_answer = ohttp.seal_request(message, config)
            answer = yield from self._ask(_Asked("POST", f"{self._place}:predict", capsule, ohttp.REQUEST_TYPE))
            if answer.type == ohttp.RESPONSE_TYPE:
                inner = bhttp.decode_response(open_answer(answer.body))
                if inner.status == 409 and not fresh:
                    continue  # its answer got lost, and it was sent again: it needs another seal
                return _Answered(inner.status, inner.content, {k.decode("latin-1"): v.decode("latin-1") for k, v in inner.fields})
            if b"#ohttp-key" not in answer.body:
                return answer
        raise CapsuleError("the endpoint cannot open requests sealed with the key that it publishes")

    def _fetch_config(self) -> Steps:
        answer = yield from self._ask(_Asked("GET", f"{self._place}/ohttp-keys"))
        if answer.status != 200:
            _opened(answer)
        if self._trust:
            signature = answer.headers.get(ohttp.SIGNATURE_HEADER, "")
            check_signature(self._trust, self.model, self._version, answer.body, signature)
        self._config = ohttp.decode_configs(answer.body)[0]
        age = answer.headers.get("cache-control", "").removeprefix("max-age=")
        self._config_until = time.monotonic() + (float(age) if age.isdigit() else 0.0)

    def _ask(self, asked: _Asked) -> Steps:
        """Send one request, again where that may help."""
        tried = 0
        found = yield asked
        while (pause := self._pause(tried, found)) is not None:
            yield pause
            tried += 1
            found = yield asked
        if isinstance(found, Exception):
            raise EndpointError(f"{self.url}: cannot be reached ({found or type(found).__name__}): is the endpoint running?")
        return _Answered(found.status_code, found.content, found.headers)

    def _pause(self, tried: int, found: httpx.Response | Exception) -> float | None:
        """Seconds to wait before the request is sent again; None where what was found stands."""
        if isinstance(found, httpx.Response):
            if found.status_code not in TRY_AGAIN:
                self._saved = min(MOST_SAVED, self._saved + EARNED)
                return None
        elif not isinstance(found, httpx.TransportError) or isinstance(found, httpx.UnsupportedProtocol):
            return None
        if tried >= self._retries or self._saved < 1:
            return None
        self._saved -= 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**tried) * random.uniform(0.5, 1.0)  # noqa: S311  no secret
        if isinstance(found, httpx.Response):
            asked = found.headers.get("retry-after", "")
            pause = max(pause, min(LONGEST_PAUSE, float(asked) if asked.isdigit() else 0.0))
        return pause


def _send(asked: _Asked, url: str) -> dict[str, Any]:
    headers = {"content-type": asked.type} | ({"authorization": asked.authorization} if asked.authorization else {})
    return {"method": asked.method, "url": url + asked.path, "content": asked.body, "headers": headers}


class Client(_Talk):
    """A connection to one model.

    url: of the endpoint, such as `http://127.0.0.1:8000`. version: of the model; without it the one in production answers.
    encrypt: send encapsulated requests (RFC 9458). trust: the file of the public key that the endpoint's key configuration
    must be signed by for this model's name; without it the first configuration that arrives is believed. token: for an
    endpoint that asks for one (default: HELIOGRAPH_TOKEN of the environment); it is sealed with the request. timeout: seconds,
    for each try. retries: of a request, at most.
    """

    def __init__(self, url: str, model: str, **options: Any):
        super().__init__(url, model, **options)
        self._http = httpx.Client(timeout=self._timeout)

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
        return self._run(self._predict(rows))

    def predict_table(self, table: Any) -> Any:
        """The same for many rows: a pyarrow table with a column a feature, to one with `prediction` and, of a
        classification, `probabilities`; no more than 16 MiB at once."""
        return self._run(self._predict_table(table))

    def explain(self, rows: Any) -> list[dict[str, Any]]:
        """Why each row (16 at most) is answered so: `output` (the class), `value` (its probability, or the number), `base` (that
        of the mean training row), and what each of the `features` added; `base` and these make `value`."""
        return self._run(self._explain(rows))

    def drift(self) -> list[dict[str, Any]]:
        """How the rows that were asked about differ from the training rows, the largest first: `name` (answers in brackets),
        `psi`, `ks`, `rows`, `moved`; nothing before there are 100 rows."""
        return self._run(self._drift())

    def schema(self) -> dict[str, Any]:
        """The model's schema: `features`, `classes`, `task`."""
        return self._run(self._schema())

    def deploy(self, **wanted: Any) -> dict[str, Any]:
        """Begin a rollout, as `heliograph deploy` does (version, percent, seconds, requests); `rollout` tells what became of it.

        Needs a token for `deploy`, or for `promote` where percent is 100."""
        return self._run(self._deploy(wanted))

    def rollout(self) -> dict[str, Any]:
        """The model's `aliases`, and its latest `rollout`."""
        return self._run(self._rollout())

    def _run(self, steps: Steps) -> Any:
        found: Any = None
        try:
            while True:
                step = steps.send(found)
                found = self._do(step)
        except StopIteration as end:
            return end.value

    def _do(self, step: _Asked | float) -> Any:
        if not isinstance(step, _Asked):
            time.sleep(step)
            return None
        try:
            return self._http.request(**_send(step, self.url))
        except UNREACHED as error:
            return error


class AsyncClient(_Talk):
    """`Client` with `async with` and `await`; many requests may be under way at once."""

    def __init__(self, url: str, model: str, **options: Any):
        super().__init__(url, model, **options)
        self._http = httpx.AsyncClient(timeout=self._timeout)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def predict(self, rows: Any) -> list[Any]:
        return await self._run(self._predict(rows))

    async def predict_table(self, table: Any) -> Any:
        return await self._run(self._predict_table(table))

    async def explain(self, rows: Any) -> list[dict[str, Any]]:
        return await self._run(self._explain(rows))

    async def drift(self) -> list[dict[str, Any]]:
        return await self._run(self._drift())

    async def schema(self) -> dict[str, Any]:
        return await self._run(self._schema())

    async def _run(self, steps: Steps) -> Any:
        found: Any = None
        try:
            while True:
                step = steps.send(found)
                found = await self._do(step)
        except StopIteration as end:
            return end.value

    async def _do(self, step: _Asked | float) -> Any:
        if not isinstance(step, _Asked):
            await asyncio.sleep(step)
            return None
        try:
            return await self._http.request(**_send(step, self.url))
        except UNREACHED as error:
            return error


def arrow_stream(table: Any) -> bytes:
    """A pyarrow table as an Arrow IPC stream."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


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


def signed_text(model: str, version: int | None, key_configs: bytes, expires: int) -> bytes:
    """What a key configuration's signature is over: it binds the keys to the model, its version and a time."""
    bound = f"heliograph key configuration\0{model}\0{version or ''}\0{expires}\0"
    return bound.encode() + key_configs


def check_signature(public_key: Path, model: str, version: int | None, key_configs: bytes, signature: str) -> None:
    """Raises SignatureError unless `signature` (the Unix time at which it expires, and base64 of ECDSA with SHA-256) is of
    `public_key` over keys, name, version and time, and has not expired."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    expires, _, signed = signature.partition(" ")
    try:
        key = serialization.load_pem_public_key(public_key.read_bytes())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("not an elliptic-curve key")
    except (OSError, ValueError) as error:
        raise SignatureError(f"{public_key}: is no public key to check signatures with ({error})") from None
    try:
        text = signed_text(model, version, key_configs, int(expires))
        key.verify(base64.b64decode(signed, validate=True), text, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        raise SignatureError(
            f"the key configuration of `{model}` is not signed by {os.fspath(public_key)}: do not send to it"
        ) from None
    if time.time() > int(expires):
        raise SignatureError(
            f"the key configuration of `{model}` has expired: somebody repeats an old one, or this machine's clock is wrong"
        )


def _plain(value: Any) -> Any:
    """Arrays as lists, at any depth."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _opened(answer: _Answered) -> Any:
    """The JSON object of an answer. Raises RequestError with the endpoint's reason."""
    try:
        value = json.loads(answer.body)
    except ValueError:
        value = {}
    if answer.status == 200 and isinstance(value, dict):
        return value
    reason = value.get("error") or value.get("title") if isinstance(value, dict) else None
    raise RequestError(f"the endpoint refused the request ({answer.status}): {reason or 'no reason given'}", answer.status)
