"""A relay in between: the endpoint learns nothing of who asks, the relay nothing of what."""

import asyncio
import http.server
import signal
import socket
import threading
from typing import ClassVar

import httpx
import pytest
from heliograph.cluster.runtime import free_port
from heliograph.serve import ohttp
from heliograph.serve.application import Seen
from heliograph.serve.client import AsyncClient
from heliograph.serve.messages import Request
from heliograph.serve.relay import Relay

from .served import TENSOR, Room

PETS = "/v1/models/pets"


@pytest.fixture
def room(tmp_path):
    room = Room(tmp_path)
    room.add("pets", TENSOR, [[1, 0], [0, 1]])
    room.follow()
    return room


def relay(room: Room, seen: list[httpx.Request]) -> httpx.ASGITransport:
    async def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        kind = request.headers.get("content-type", "")
        asked = Request(request.method, request.url.raw_path.decode(), kind, request.content, None)
        answer = await room.application.answer(asked, Seen())
        headers = {"content-type": answer.type, "x-request-id": "7", "set-cookie": "a=b", **answer.headers}
        return httpx.Response(answer.status, content=answer.body, headers=headers)

    return httpx.ASGITransport(Relay("http://endpoint", httpx.MockTransport(handle)))  # pyright: ignore[reportArgumentType]


def test_a_sealed_prediction_goes_through_a_relay_and_keys_are_still_the_operators(room):
    seen: list[httpx.Request] = []

    async def ask():
        async with AsyncClient("http://relay", "pets", trust=room.keys.public_key(), token="hg_x") as client:
            client._http = httpx.AsyncClient(
                transport=relay(room, seen), headers={"cookie": "me=1", "x-forwarded-for": "10.0.0.9"}
            )
            return await client.predict([[1, 2]]), await client.schema()

    predictions, schema = asyncio.run(ask())
    assert predictions == [[1, 2]]
    assert schema["target"]
    assert [r.url.path for r in seen] == [f"{PETS}/ohttp-keys", f"{PETS}:predict", f"{PETS}:predict"]
    assert {name for r in seen for name in r.headers} <= {"host", "content-type", "content-length"}
    assert not any(b"instances" in r.content for r in seen)


@pytest.mark.parametrize(
    ("method", "path", "kind", "status"),
    [
        ("POST", f"{PETS}:predict", "application/json", 415),
        ("GET", PETS, "", 404),
        ("GET", "/metrics", "", 404),
        ("POST", "/v2/repository/index", ohttp.REQUEST_TYPE, 404),
        ("POST", f"{PETS}:predict/../../../metrics", ohttp.REQUEST_TYPE, 404),
        ("DELETE", f"{PETS}:predict", ohttp.REQUEST_TYPE, 404),
        ("POST", f"{PETS}:predict", ohttp.REQUEST_TYPE, 400),
        ("POST", f"{PETS}:predict?a=b", ohttp.CHUNKED_REQUEST_TYPE, 400),
        ("GET", "/v1/models/dogs/ohttp-keys", "", 404),
    ],
)
def test_a_relay_hands_on_sealed_requests_to_models_and_nothing_else(room, method, path, kind, status):
    seen: list[httpx.Request] = []

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=relay(room, seen)) as client:
            return await client.request(method, f"http://relay{path}", content=b"x", headers={"content-type": kind})

    answer = asyncio.run(ask())
    assert answer.status_code == status
    assert not {"x-request-id", "set-cookie"} & set(answer.headers)
    assert all("?" not in str(r.url) for r in seen)
    assert bool(seen) == (status == 400 or "dogs" in path)


def test_a_relay_without_an_endpoint_and_a_body_that_is_too_large_are_refused():
    async def ask(body: bytes, to: str) -> int:
        app = httpx.ASGITransport(Relay(to))  # pyright: ignore[reportArgumentType]
        async with httpx.AsyncClient(transport=app) as client:
            kind = {"content-type": ohttp.REQUEST_TYPE}
            return (await client.post(f"http://relay{PETS}:predict", content=body, headers=kind)).status_code

    to = f"http://127.0.0.1:{free_port()}"
    assert asyncio.run(ask(b"x", to)) == 502
    assert asyncio.run(ask(b"x" * (ohttp.MAX_SEALED + 1), to)) == 413


class Endpoint(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, dict[str, str], bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append((self.path, dict(self.headers), body))
        self.send_response(200)
        self.send_header("content-type", ohttp.RESPONSE_TYPE)
        self.send_header("content-length", "3")
        self.end_headers()
        self.wfile.write(b"yes")

    def log_message(self, *_) -> None: ...


def test_the_command_relays_and_ends_with_ctrl_c(command):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = free_port()
    relaying = command("relay", f"http://127.0.0.1:{server.server_port}", "--port", str(port))

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    relaying.wait_for(listens, "the relay listened", 60)
    headers = {"content-type": ohttp.REQUEST_TYPE, "x-forwarded-for": "10.0.0.9", "authorization": "Bearer hg_a"}
    answer = httpx.post(f"http://127.0.0.1:{port}{PETS}:predict", content=b"sealed", headers=headers)
    assert (answer.status_code, answer.content) == (200, b"yes")
    code, output = relaying.end(signal.SIGINT)
    server.shutdown()
    assert code == 0, output
    assert "10.0.0.9" not in output
    assert PETS not in output
    ((path, sent, body),) = Endpoint.seen
    assert (path, body) == (f"{PETS}:predict", b"sealed")
    assert {name.lower() for name in sent} == {"host", "content-type", "content-length"}
