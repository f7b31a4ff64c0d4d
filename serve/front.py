"""A replica's HTTP side: an ASGI application that Ray Serve's own port of the replica runs.

Ray Serve wraps each request of a replica in some forty steps (its metadata, its tracing, its queue, Starlette's request and
response), which take longer than a small model does. Here they are left out: the application takes the place of Serve's
own behind Serve's HTTP server, counts what is in flight where Serve counts it, so that autoscaling and draining see it,
and leaves Serve's health check to Serve. Measured in `bench/serve.py`.
"""

import asyncio
import gzip
import importlib
import io
import itertools
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from ..errors import Overloaded, RequestError
from .application import SEALED, Application, Seen
from .messages import MAX_BODY, TOO_LARGE, Answer, Request, answered
from .metrics import Stats
from .ohttp import MAX_SEALED

SLOW_SECONDS = 10.0
"""What a body may take on its way."""
OVERHEAD_SECONDS = 1e-4
"""Of a request, apart from reading it, running it and writing the answer."""
FEWEST_IN_FLIGHT = 16
FULL = 0.5
"""Share of its time that the event loop computes, from which on a replica counts as full."""
IDLE = 0.05
"""And up to which it counts as idle: nobody asks."""


class Front:
    """latency: seconds that a request may take; more than can be answered within it are refused."""

    def __init__(self, application: Application, stats: Stats, latency: float, access_log: Path | None):
        self.application, self.stats, self.latency = application, stats, latency
        self._cost = 0.001
        """Seconds of this process that a request takes, on average."""
        self._ids = itertools.count()
        self._id = secrets.token_hex(6)
        self._log = access_log
        self._lines: list[dict[str, Any]] = []
        self._count: Callable[[int], None] = lambda delta: None
        self._spent = 0.0
        """Seconds of all requests since `load` was asked."""
        self._looked = time.perf_counter(), 0.0

    async def respond(self, method: str, path: str, headers: dict[bytes, bytes], receive: Any) -> Answer:
        """headers: by lower-case names. receive: ASGI's. Never raises for what a client can send."""
        began = time.perf_counter()
        seen = Seen()
        stats = self.stats
        stats.in_flight += 1
        self._count(1)
        try:
            answer = await answered(self._answer(method, path, headers, receive, seen))
        finally:
            stats.in_flight -= 1
            self._count(-1)
        seconds = time.perf_counter() - began
        self._spent += seconds
        if seen.busy:
            self._cost += 0.02 * (OVERHEAD_SECONDS + seen.busy - self._cost)
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:128] or f"{self._id}-{next(self._ids):x}"
        answer.headers["x-request-id"] = request_id
        stats.request(seen.model, seen.version, seen.protocol, str(answer.status), seconds)
        if self._log:
            line = {"time": time.time(), "id": request_id, "status": answer.status, "ms": round(1000 * seconds, 3)}
            line |= {"protocol": seen.protocol, "model": seen.model, "version": seen.version, "rows": seen.rows, "who": seen.who}
            self._lines.append(line)
        return answer

    def load(self, target: float) -> float:
        """Requests in flight on average since this was last asked, and at least `target` where the event loop is full.

        To be asked by the event loop's own thread. A count of what is in flight at some moment sees none of the requests that
        are answered without a pause, however many they are.
        """
        now, busy = time.perf_counter(), time.thread_time()
        (then, before), self._looked = self._looked, (now, busy)
        spent, self._spent = self._spent, 0.0
        elapsed = max(now - then, 1e-3)
        share = (busy - before) / elapsed
        return max(spent / elapsed, target * share / FULL if share > IDLE else 0.0)

    def write_log(self) -> None:
        """Append what was answered since, a JSON object a line; no input and no answer is in it."""
        lines, self._lines = self._lines, []
        if lines and self._log:
            with self._log.open("ab") as file:
                file.write(b"".join(orjson.dumps(line) + b"\n" for line in lines))

    async def _answer(self, method: str, path: str, headers: dict[bytes, bytes], receive: Any, seen: Seen) -> Answer:
        return await self.application.answer(await self._read(method, path, headers, receive), seen)

    async def _read(self, method: str, path: str, headers: dict[bytes, bytes], receive: Any) -> Request:
        length, most = headers.get(b"content-length", b"0"), MAX_BODY
        if headers.get(b"content-type", b"").decode("latin-1") in SEALED:
            most = MAX_SEALED
        if method not in ("GET", "HEAD"):
            self._admit()
        if length.isdigit() and int(length) > most:
            raise RequestError(TOO_LARGE, 413)
        message = await receive()
        body = message.get("body", b"")
        if message.get("more_body"):
            body = await self._rest(body, receive, most)
        if encoding := headers.get(b"content-encoding"):
            body = _inflated(body, encoding)
        return Request.read(method, path, headers.get, body)

    def _admit(self) -> None:
        """Raises Overloaded where what is in flight will take longer than a request may."""
        if self.stats.in_flight > max(FEWEST_IN_FLIGHT, self.latency / self._cost):
            raise Overloaded

    @staticmethod
    async def _rest(first: bytes, receive: Any, most: int) -> bytes:
        body = bytearray(first)
        try:
            async with asyncio.timeout(SLOW_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError("the client left", 499)
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise RequestError(TOO_LARGE, 413)
        except TimeoutError:
            raise RequestError(f"the body took longer than {SLOW_SECONDS:g} s", 408) from None
        return bytes(body)

    def take_over(self, target: float) -> None:
        """Stand before Ray Serve in this replica's HTTP server, which starts after the replica's constructor: as its
        outermost middleware, so that what Serve wraps around its own application is passed by too. And tell Serve's
        autoscaling of our `load`, whose target is given."""
        from starlette.middleware import Middleware

        replica: Any = importlib.import_module("ray.serve._private.replica")
        start = replica.start_asgi_http_server

        def started(serve: Any, options: Any, **more: Any) -> Any:
            manager = serve.__self__._metrics_manager
            self._count = _counter(manager)
            add = manager._metrics_store.add_metrics_point
            manager._metrics_store.add_metrics_point = lambda point, at: add(dict.fromkeys(point, self.load(target)), at)
            return start(serve, options.model_copy(update={"middlewares": [Middleware(self.before)]}), **more)

        replica.start_asgi_http_server = started

    def before(self, serve: Any) -> Any:
        """The ASGI application that leaves Serve's health checks to `serve`, an ASGI application too."""

        async def application(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["path"].startswith("/-/"):
                await serve(scope, receive, send)
                return
            answer = await self.respond(scope["method"], scope["path"], dict(scope["headers"]), receive)
            headers = [
                (b"content-type", answer.type.encode()),
                (b"content-length", str(len(answer.body)).encode()),
                *((name.encode(), value.encode("latin-1")) for name, value in answer.headers.items()),
            ]
            if scope["method"] != "HEAD":  # which has no body for its head to wait for
                cycle = send.__self__  # uvicorn's, for this is the outermost middleware
                cycle.transport = _Joined(cycle.transport)
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": answer.body})

        return application


class _Joined:
    """A transport that sends a response's head with its body: uvicorn writes them apart, each a call of the system and a
    packet."""

    def __init__(self, transport: Any):
        self._transport, self._head = transport, b""

    def write(self, data: bytes) -> None:
        if self._head:
            self._transport.write(self._head + data)
        self._head = b"" if self._head else data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _counter(metrics: Any) -> Callable[[int], None]:
    """Counts a request in flight where Serve's autoscaling and draining look."""
    from ray.serve._private.common import RequestMetadata, RequestProtocol

    counted = RequestMetadata("", "", _request_protocol=RequestProtocol.HTTP, is_direct_ingress=True)
    return lambda delta: metrics._change_num_ongoing_requests(counted, delta)


def _inflated(body: bytes, encoding: bytes) -> bytes:
    if encoding.strip().lower() not in (b"gzip", b"identity"):
        raise RequestError("the only content-encoding is gzip", 415)
    if encoding.strip().lower() == b"identity":
        return body
    try:
        found = gzip.GzipFile(fileobj=io.BytesIO(body)).read(MAX_BODY + 1)
    except (OSError, EOFError, ValueError):
        raise RequestError("the body is not gzip") from None
    if len(found) > MAX_BODY:
        raise RequestError(TOO_LARGE, 413)
    return found
