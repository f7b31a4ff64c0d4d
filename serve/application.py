"""What an endpoint answers: method, path, type and bytes in; status, type and bytes out.

    POST /v1/models/NAME[/versions/V|/labels/L]:predict|:classify|:regress     `tfserving`; Arrow; or sealed
    POST /v1/models/NAME[/versions/V|/labels/L]:explain                        the body of :predict; or sealed
    GET  /v1/models/NAME/drift                       how requests differ from the training rows
    GET  /v1/models/NAME[/versions/V|/labels/L][/metadata]
    POST /v1/models/NAME:deploy, GET /v1/models/NAME/rollout                   where `serve.access` is `tokens`
    GET  /v1/models/NAME[/versions/V]/ohttp-keys     the public key configuration, signed for this model's name
    POST /v2/models/NAME[/versions/V]/infer                                    `oip`; or sealed
    GET  /v2, /v2/health/live, /v2/health/ready, /v2/models/NAME[/versions/V][/ready]
    POST /v2/repository/index
    GET  /metrics, /openapi.json, /docs

A sealed request (`message/ohttp-req`, RFC 9458, or `message/ohttp-chunked-req`) goes to any path that infers; what is inside
is one request to the same model, to infer or to read its metadata. With `serve.access: tokens` each needs a token (`access`),
but for the public keys and the health checks. A reason names features and shapes, and never repeats what was sent.
"""

import asyncio
import functools
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from email.utils import formatdate, parsedate_to_datetime
from typing import Annotated
from urllib.parse import unquote

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..cluster.audit import Audit
from ..errors import CapsuleError, HeliographError, RegistryError, RequestError
from ..names import Verb
from . import arrow, bhttp, ohttp, oip, page, tfserving
from .access import Guard
from .messages import MAX_BODY, TOO_LARGE, Answer, Ask, Request, answered, error_answer, json_answer
from .metrics import CLOCK_SECONDS, Stats
from .models import Loaded, Models, NotLoaded
from .rollout import begin, forced_past

log = logging.getLogger("heliograph")
PROBLEM = "application/problem+json"
KEY_PROBLEM = orjson.dumps(
    {"type": "https://iana.org/assignments/http-problem-types#ohttp-key", "title": "the encapsulated request cannot be opened"}
)
SEALED = {ohttp.REQUEST_TYPE: ohttp.RESPONSE_TYPE, ohttp.CHUNKED_REQUEST_TYPE: ohttp.CHUNKED_RESPONSE_TYPE}
DATE_PROBLEM = orjson.dumps(
    {
        "type": "https://iana.org/assignments/http-problem-types#date",
        "title": f"a sealed request needs a date within {CLOCK_SECONDS:g} s of the endpoint's: is this machine's clock right?",
    }
)
NOT_SEALED = "this endpoint takes no encapsulated requests (serve.encrypted is off)"
REPEATED = "this sealed request was answered before: seal it anew"
WHICH = r"(?P<name>[^/:]{1,200})(?:/versions/(?P<version>\d{1,9})|/labels/(?P<label>[^/:]{1,200}))?"
VERBS = "predict|classify|regress|explain|deploy"
V1 = re.compile(rf"/v1/models/{WHICH}(?::(?P<verb>{VERBS})|/(?P<part>metadata|ohttp-keys|rollout|drift))?")
V2 = re.compile(rf"/v2/models/{WHICH}(?:/(?P<verb>infer)|/(?P<part>ready))?")
FIXED = {
    "/v2": "GET", "/v2/": "GET", "/v2/health/live": "GET", "/v2/health/ready": "GET", "/v2/repository/index": "POST",
    "/metrics": "GET", "/openapi.json": "GET", "/docs": "GET", "/": "GET",
}  # fmt: skip
PAGES, HTML = ("/docs", "/"), "text/html; charset=utf-8"


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


class Deployment(BaseModel):
    """What `:deploy` is asked for: see `rollout.begin`. version: the newest, where none is named."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Annotated[int, Field(ge=1)] | None = None
    percent: Annotated[float, Field(gt=0, le=100)] = 10.0
    seconds: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    requests: Annotated[int, Field(ge=1)] = 100
    force: bool = False
    """Also a version that did not reach what it had to: needs the verb `promote`."""


@dataclass
class Seen:
    """What the metrics and the log say of a request."""

    protocol: str = "-"
    model: str = "-"
    version: str = "-"
    rows: int = 0
    who: str = "-"
    """Whose token it had."""
    busy: float = 0.0
    """Seconds of the event loop that reading it and writing its answer took."""


class Application:
    """total: the counts of the whole endpoint. first: whether a sealed request is answered for the first time, by any replica."""

    def __init__(self, models: Models, total: Callable[[], Awaitable[Stats]], first: Callable[[bytes], Awaitable[bool]]):
        self.models, self.encrypted, self._total = models, models.options.encrypted, total
        self._first = first if models.options.replays == "refused" else None
        self.guard = Guard(models.keys, models.options.jwt) if models.options.access == "tokens" else None
        self.refused: Counter[tuple[int, str]] = Counter()
        """How many were not let in, by status and model, since they were last written to the audit log."""

    async def answer(self, request: Request, seen: Seen) -> Answer:
        """Never raises for what a client can send."""
        return await answered((self._sealed if request.type in SEALED else self._open)(request, seen))

    async def _open(self, request: Request, seen: Seen) -> Answer:
        target = target_of(request.path)
        if target is None:
            return await self._fixed(request, seen)
        seen.protocol = target.protocol
        if target.verb and self.encrypted == "required":
            raise RequestError(f"this model takes encapsulated requests only (`Content-Type: {ohttp.REQUEST_TYPE}`)", 403)
        return await self._of_model(request, target, seen)

    async def _of_model(self, request: Request, target: Target, seen: Seen) -> Answer:
        if request.method != target.method:
            raise RequestError(f"this path answers to {target.method}", 405)
        if target.verb == "deploy":
            return await self._deploy(request, target, seen)
        if target.part != "ohttp-keys":  # which are public
            verb = Verb.PREDICT if target.verb else Verb.METRICS if target.part == "drift" else Verb.READ
            self._let_in(request, verb, target.name, seen)
        return await (self._infer(request, target, seen) if target.verb else self._about(target))

    def _let_in(self, request: Request, verb: Verb, model: str | None, seen: Seen) -> None:
        if self.guard is None:
            return
        try:
            seen.who = self.guard.check(request.authorization, verb, model)
        except RequestError as error:
            self.refused[error.status, model if model in self.models.names else "-"] += 1
            raise

    async def _sealed(self, request: Request, seen: Seen) -> Answer:
        """What cannot be opened is answered in clear, and always alike; everything else inside the capsule."""
        if self.encrypted == "off":
            raise RequestError(NOT_SEALED, 415)
        target = target_of(request.path)
        stats, chunked = self.models.stats, request.type == ohttp.CHUNKED_REQUEST_TYPE
        began = time.perf_counter()
        seen.protocol = "ohttp"
        try:
            if request.method != "POST" or target is None or not target.verb:
                raise CapsuleError("an encapsulated request goes to a path of the model that infers")
            message, seal = self.models.door(target.name, target.version).open_request(request.body, chunked)
        except RequestError:
            return Answer(400, PROBLEM, KEY_PROBLEM)
        opened = time.perf_counter()
        answer = await answered(self._inside(message, ohttp.name_of(request.body), target, seen))
        done = time.perf_counter()
        fields = [(k.encode(), v.encode()) for k, v in (("content-type", answer.type), *answer.headers.items())]
        sealed = seal(bhttp.padded(bhttp.encode_response(bhttp.Response(answer.status, fields, answer.body))))
        key = (seen.model, seen.version)
        stats.observe("stage_seconds", (*key, "open"), opened - began)
        stats.observe("stage_seconds", (*key, "seal"), time.perf_counter() - done)
        return Answer(200, SEALED[request.type], sealed)

    async def _inside(self, message: bytes, name: bytes, outer: Target, seen: Seen) -> Answer:
        """name: what no other sealed request has."""
        inner = bhttp.decode_request(message)
        path = inner.path.decode("latin-1").partition("?")[0]
        target = target_of(path)
        if target is None or (target.name, target.version) != (outer.name, outer.version):
            raise RequestError("a request in a capsule goes to its own model and version", 404)
        if len(inner.content) > MAX_BODY:
            raise RequestError(TOO_LARGE, 413)
        method = inner.method.decode("latin-1")
        request = Request.read(method, path, functools.partial(bhttp.get, inner.fields), inner.content)
        if self._first and not _timely(bhttp.get(inner.fields, b"date")):
            return Answer(400, PROBLEM, DATE_PROBLEM, {"date": formatdate(usegmt=True)})
        answer = await self._of_model(request, target, seen)
        # Asked when there is an answer, and not before: a proxy repeats requests that a dying replica had begun.
        if self._first and not await self._first(name):
            raise RequestError(REPEATED, 409)
        return answer

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
        model.batcher.admit()
        began = time.perf_counter()
        ask = self._ask(request, target, model)
        seen.rows = ask.rows
        read = time.perf_counter()
        outputs, strange = model.judged(await model.batcher.submit(ask.columns, ask.rows))
        done = time.perf_counter()
        if target.verb == "explain":
            answer = json_answer(200, {"explanations": await asyncio.to_thread(model.explain, ask.columns, outputs)})
        else:
            answer = ask.render(outputs)
        answer.headers["model-version"] = model.key[1]
        if strange:
            answer.headers["unfamiliar-rows"] = ",".join(map(str, strange[:100]))
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
        return tfserving.ask("predict" if target.verb == "explain" else target.verb or "", request.body, model.identity)

    async def _deploy(self, request: Request, target: Target, seen: Seen) -> Answer:
        """Put a version into production: who may is asked to the token, what becomes of it to `rollout`."""
        if self.guard is None:
            raise RequestError("an endpoint takes deployments where serve.access is `tokens` only: use `heliograph deploy`", 403)
        try:
            wanted = Deployment.model_validate_json(request.body)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the body'}: {e['msg']}" for e in error.errors())
            raise RequestError(problems) from None
        self._let_in(request, Verb.PROMOTE if wanted.percent >= 100 or wanted.force else Verb.DEPLOY, target.name, seen)
        version = wanted.version or max(self.models.versions(target.name))
        try:
            state = await asyncio.to_thread(
                begin, self.models.registry, target.name, version, wanted.percent, wanted.seconds, wanted.requests, wanted.force
            )
        except RegistryError as error:
            raise RequestError(str(error), 409) from None
        audit = Audit(self.models.keys)
        forced = forced_past(self.models.registry, target.name, version) if wanted.force else {}
        what = f"{target.name}@{version}"
        await asyncio.to_thread(audit.write, "deploy", what, token=seen.who, percent=wanted.percent, **forced)
        return json_answer(200, state.model_dump())

    async def _about(self, target: Target) -> Answer:  # noqa: PLR0911
        if target.part == "ohttp-keys":
            if self.encrypted == "off":
                raise RequestError(NOT_SEALED, 404)
            configs, signature, seconds = self.models.door(target.name, target.version).offer()
            headers = {ohttp.SIGNATURE_HEADER: signature, "cache-control": f"max-age={seconds}"}
            return Answer(200, ohttp.KEYS_TYPE, configs, headers)
        versions = self.models.versions(target.name)
        if target.part == "drift":
            model = await self._pick(target)
            counts = (await self._total()).drift.get(model.key)
            return json_answer(200, {"features": [asdict(found) for found in counts.shifts()] if counts else []})
        if target.part == "rollout":
            return json_answer(200, (await asyncio.to_thread(self.models.registry.state, target.name)).model_dump())
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

    async def _fixed(self, request: Request, seen: Seen) -> Answer:  # noqa: PLR0911
        method = FIXED.get(request.path)
        if method is None:
            raise RequestError("no such path: GET /docs tells what there is", 404)
        if request.method != method:
            raise RequestError(f"this path answers to {method}", 405)
        try:
            if not request.path.startswith("/v2/health/"):
                self._let_in(request, Verb.METRICS if request.path == "/metrics" else Verb.READ, None, seen)
        except RequestError as error:
            if request.path not in PAGES or error.status == 429:
                raise
            refused = error_answer(error)
            return Answer(refused.status, HTML, page.html(None, self.encrypted), refused.headers)
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
                models = [self.models.pick(name) for name in self.models.names]
                if path == "/openapi.json":
                    return json_answer(200, page.openapi([m.identity for m in models], self.encrypted))
                shown = [(m.identity, m.reference) for m in models]
                return Answer(200, HTML, page.html(shown, self.encrypted))


def _timely(date: bytes | None) -> bool:
    """Whether an HTTP date is near enough to now."""
    try:
        return abs(parsedate_to_datetime((date or b"").decode("latin-1")).timestamp() - time.time()) <= CLOCK_SECONDS
    except (ValueError, OverflowError):
        return False
