"""A relay: hands sealed requests on, so that the endpoint does not learn who asks, and the relay not what (RFC 9458, section 2).

It takes encapsulated requests to a model's paths, and the question for a model's public keys. Of a request it hands on the path,
the body and its type, of an answer the status, the body, its type and what the client needs to trust keys and to wait:
no address, no cookie, no other header. It writes no log. Whoever runs it must not be who runs the endpoint.
"""

from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from ..errors import RequestError
from .application import SEALED, target_of
from .messages import TOO_LARGE, Answer, error_answer
from .ohttp import KEYS_TYPE, MAX_SEALED, REQUEST_TYPE, SIGNATURE_HEADER

HANDED_BACK = (SIGNATURE_HEADER, "cache-control", "retry-after")
PATIENCE = 60.0
"""Seconds that an endpoint may take."""


class Relay:
    """An ASGI application. to: the endpoint's URL; transport: httpx's, in tests."""

    def __init__(self, to: str, transport: Any = None):
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
        forgetful = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        self._http = httpx.AsyncClient(base_url=to, timeout=PATIENCE, limits=limits, transport=transport, cookies=forgetful)
        self._http.headers.clear()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            answer = await self._hand_on(scope, receive)
        except RequestError as error:
            answer = error_answer(error)
        headers = {"content-type": answer.type, "content-length": str(len(answer.body)), **answer.headers}
        listed = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": listed})
        await send({"type": "http.response.body", "body": answer.body})

    async def _hand_on(self, scope: Any, receive: Any) -> Answer:
        method, path = scope["method"], scope["raw_path"].decode("latin-1").partition("?")[0]
        kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        target = target_of(path)
        if target and method == "GET" and target.part == "ohttp-keys":
            body, sent = b"", {}
        elif target and method == "POST" and target.verb:
            if kind not in SEALED:
                raise RequestError(f"a relay takes encapsulated requests only (`Content-Type: {REQUEST_TYPE}`)", 415)
            body, sent = await self._body(receive), {"content-type": kind}
        else:
            raise RequestError(f"a relay knows a model's paths only: to infer, and its keys (`{KEYS_TYPE}`)", 404)
        try:
            found = await self._http.request(method, path, content=body, headers=sent)
        except httpx.TransportError:
            raise RequestError("the endpoint cannot be reached", 502) from None
        back = {name: found.headers[name] for name in HANDED_BACK if name in found.headers}
        return Answer(found.status_code, found.headers.get("content-type", "application/octet-stream"), found.content, back)

    @staticmethod
    async def _body(receive: Any) -> bytes:
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_SEALED:
                raise RequestError(TOO_LARGE, 413)
        return bytes(body)

    async def _live(self, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await self._http.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def run(to: str, host: str, port: int) -> None:
    """Relay until it is interrupted."""
    import uvicorn

    uvicorn.run(Relay(to), host=host, port=port, access_log=False, log_level="warning", server_header=False, date_header=False)
