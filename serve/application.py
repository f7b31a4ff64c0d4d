"""What an endpoint answers: method, path, type and bytes in; status, type and bytes out.

    POST /v1/models/NAME[/versions/V|/labels/L]:predict|:classify|:regress     `tfserving`; Arrow; or sealed
    GET  /v1/models/NAME[/versions/V|/labels/L][/metadata]
    GET  /v1/models/NAME/ohttp-keys        the public key configuration, signed for this model's name
    POST /v2/models/NAME[/versions/V]/infer                                    `oip`; or sealed
    GET  /v2, /v2/health/live, /v2/health/ready, /v2/models/NAME[/versions/V][/ready]
    POST /v2/repository/index
    GET  /metrics, /openapi.json, /docs

A sealed request (`message/ohttp-req`, RFC 9458) goes to any path that infers; what is inside is one such request to the
same model. A reason names features and shapes, and never repeats what was sent.
"""

import functools
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import unquote

import orjson

from ..errors import CapsuleError, HeliographError, RequestError
from . import arrow, bhttp, ohttp, oip, page, tfserving
from .messages import Answer, Ask, Request, answered, json_answer
from .metrics import Stats
from .models import Loaded, Models, NotLoaded

log = logging.getLogger("heliograph")
PROBLEM = "application/problem+json"
KEY_PROBLEM = orjson.dumps(
    {"type": "https://iana.org/assignments/http-problem-types#ohttp-key", "title": "the encapsulated request cannot be opened"}
)
WHICH = r"(?P<name>[^/:]{1,200})(?:/versions/(?P<version>\d{1,9})|/labels/(?P<label>[^/:]{1,200}))?"
V1 = re.compile(rf"/v1/models/{WHICH}(?::(?P<verb>predict|classify|regress)|/(?P<part>metadata|ohttp-keys))?")
V2 = re.compile(rf"/v2/models/{WHICH}(?:/(?P<verb>infer)|/(?P<part>ready))?")
FIXED = {
    "/v2": "GET", "/v2/": "GET", "/v2/health/live": "GET", "/v2/health/ready": "GET", "/v2/repository/index": "POST",
    "/metrics": "GET", "/openapi.json": "GET", "/docs": "GET", "/": "GET",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    protocol: str
    name: str
    version: int | None
    label: str | None
    verb: str | None
    part: str | None

    @property
    def method(self) -> str:
        return "POST" if self.verb else "GET"


@functools.lru_cache(1024)
def target_of(path: str) -> Target | None:
    """What of a model a path names, if it names one."""
    for protocol, pattern in (("tfserving", V1), ("oip", V2)):
        if found := pattern.fullmatch(path):
            part = found.groupdict()
            version = int(part["version"]) if part["version"] else None
            label = unquote(part["label"]) if part["label"] else None
            return Target(protocol, unquote(part["name"]), version, label, part["verb"], part["part"])
    return None


@dataclass
class Seen:
    """What the metrics and the log say of a request."""

    protocol: str = "-"
    model: str = "-"
    version: str = "-"
    rows: int = 0
    busy: float = 0.0
    """Seconds of the event loop that reading it and writing its answer took."""


class Application:
    """required: whether requests in clear are refused. total: the counts of the whole endpoint."""

    def __init__(self, models: Models, required: bool, total: Callable[[], Awaitable[Stats]]):
        self.models, self.required, self._total = models, required, total

    async def answer(self, request: Request, seen: Seen) -> Answer:
        """Never raises for what a client can send."""
        return await answered((self._sealed if request.type == ohttp.REQUEST_TYPE else self._open)(request, seen))

    async def _open(self, request: Request, seen: Seen) -> Answer:
        target = target_of(request.path)
        if target is None:
            return await self._fixed(request)
        seen.protocol = target.protocol
        if request.method != target.method:
            raise RequestError(f"this path answers to {target.method}", 405)
        if not target.verb:
            return await self._about(target)
        if self.required:
            raise RequestError(f"this model takes encapsulated requests only (`Content-Type: {ohttp.REQUEST_TYPE}`)", 403)
        return await self._infer(request, target, seen)

    async def _sealed(self, request: Request, seen: Seen) -> Answer:
        """What cannot be opened is answered in clear, and always alike; everything else inside the capsule."""
        target = target_of(request.path)
        stats = self.models.stats
        began = time.perf_counter()
        seen.protocol = "ohttp"
        try:
            if request.method != "POST" or target is None or not target.verb:
                raise CapsuleError("an encapsulated request goes to a path of the model that infers")
            message, seal = self.models.door(target.name).gateway.open_request(request.body)
        except RequestError:
            return Answer(400, PROBLEM, KEY_PROBLEM)
        opened = time.perf_counter()
        answer = await answered(self._inside(message, target.name, seen))
        done = time.perf_counter()
        fields = [(k.encode(), v.encode()) for k, v in (("content-type", answer.type), *answer.headers.items())]
        sealed = seal(bhttp.encode_response(bhttp.Response(answer.status, fields, answer.body)))
        key = (seen.model, seen.version)
        stats.observe("stage_seconds", (*key, "open"), opened - began)
        stats.observe("stage_seconds", (*key, "seal"), time.perf_counter() - done)
        return Answer(200, ohttp.RESPONSE_TYPE, sealed)

    async def _inside(self, message: bytes, name: str, seen: Seen) -> Answer:
        inner = bhttp.decode_request(message)
        path = inner.path.decode("latin-1").partition("?")[0]
        target = target_of(path)
        if target is None or not target.verb or target.name != name:
            raise RequestError("a request in a capsule goes to its own model, on a path that infers", 404)
        if inner.method != b"POST":
            raise RequestError("this path answers to POST", 405)
        request = Request.read("POST", path, functools.partial(bhttp.get, inner.fields), inner.content)
        return await self._infer(request, target, seen)

    async def _pick(self, target: Target) -> Loaded:
        for _ in range(3):  # what is loaded for one request may be let go for another
            try:
                return self.models.pick(target.name, target.version, target.label)
            except NotLoaded as missing:
                try:
                    await self.models.load(missing.place)
                except HeliographError as error:
                    log.error("%s@%d cannot be loaded: %s", *missing.place, error)
                    raise RequestError(
                        f"`{target.name}`: this version cannot be loaded: the endpoint's log says why", 503
                    ) from None
        raise RequestError("too many models are asked for at once", 503)

    async def _infer(self, request: Request, target: Target, seen: Seen) -> Answer:
        model = await self._pick(target)
        seen.model, seen.version = model.key
        began = time.perf_counter()
        ask = self._ask(request, target, model)
        seen.rows = ask.rows
        read = time.perf_counter()
        outputs = await model.batcher.submit(ask.columns, ask.rows)
        done = time.perf_counter()
        answer = ask.render(outputs)
        answer.headers["model-version"] = model.key[1]
        reading, writing = read - began, time.perf_counter() - done
        seen.busy = reading + writing
        self.models.stats.observe("stage_seconds", (*model.key, "read"), reading)
        self.models.stats.observe("stage_seconds", (*model.key, "write"), writing)
        return answer

    @staticmethod
    def _ask(request: Request, target: Target, model: Loaded) -> Ask:
        if target.protocol == "oip":
            return oip.ask(request, model.identity)
        if request.type == arrow.TYPE:
            if target.verb != "predict":
                raise RequestError("an Arrow body goes to :predict", 415)
            return arrow.ask(request.body, model.identity)
        return tfserving.ask(target.verb or "", request.body, model.identity)

    async def _about(self, target: Target) -> Answer:
        if target.part == "ohttp-keys":
            door = self.models.door(target.name)
            return Answer(200, ohttp.KEYS_TYPE, door.configs, {ohttp.SIGNATURE_HEADER: door.signature})
        versions = self.models.versions(target.name)
        if target.part == "ready":
            place_ready = versions.get(target.version) == "AVAILABLE" if target.version else self.models.ready
            return json_answer(200 if place_ready else 503, {"name": target.name, "ready": place_ready})
        if target.part is None and target.protocol == "tfserving":
            chosen = versions
            if target.version is not None or target.label is not None:
                model = await self._pick(target)
                chosen = {model.identity.version: "AVAILABLE"}
            return tfserving.status(chosen)
        model = await self._pick(target)
        if target.protocol == "oip":
            return oip.metadata(model.identity, list(versions))
        return tfserving.metadata(model.identity)

    async def _fixed(self, request: Request) -> Answer:  # noqa: PLR0911
        method = FIXED.get(request.path)
        if method is None:
            raise RequestError("no such path: GET /docs tells what there is", 404)
        if request.method != method:
            raise RequestError(f"this path answers to {method}", 405)
        match request.path:
            case "/v2" | "/v2/":
                return oip.server()
            case "/v2/health/live":
                return json_answer(200, {"live": True})
            case "/v2/health/ready":
                return json_answer(200 if self.models.ready else 503, {"ready": self.models.ready})
            case "/v2/repository/index":
                return oip.index({name: self.models.versions(name) for name in self.models.names}, request.body)
            case "/metrics":
                return Answer(200, "text/plain; version=0.0.4; charset=utf-8", (await self._total()).page())
            case path:
                models = [self.models.pick(name).identity for name in self.models.names]
                if path == "/openapi.json":
                    return json_answer(200, page.openapi(models, self.required))
                return Answer(200, "text/html; charset=utf-8", page.html(models, self.required))
