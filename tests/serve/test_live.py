"""A live endpoint: clients that others wrote, what goes wrong on the wire, rollouts, retries, files."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from email.utils import formatdate

import httpx
import numpy as np
import psutil
import pytest
import schemathesis
from heliograph.cluster.keys import request_key
from heliograph.cluster.runtime import free_port
from heliograph.datasets.schema import Task
from heliograph.errors import EndpointError, RequestError, RolledBack
from heliograph.project import Serve
from heliograph.serve import bhttp, bulk, ohttp
from heliograph.serve.client import AsyncClient, Client
from heliograph.serve.endpoint import Endpoint
from heliograph.serve.rollout import begin, follow
from hypothesis import HealthCheck, given, settings
from tritonclient import http as triton

from .served import TABLE, TENSOR, Room

GOOD = b'{"instances": [[1, 1]]}'
NAN = [[float("nan"), 0], [0, 1]]


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Room:
    room = Room(tmp_path_factory.mktemp("live"))
    room.add("pets", TENSOR, [[1, 0], [0, 1]])
    room.add("house", TABLE, [[2], [10]])
    several = {
        "task": "several",
        "target": "price, kind",
        "tasks": (Task(name="price"), Task(name="kind", classes=("big", "old"))),
    }
    room.add("lots", TABLE.model_copy(update=several), [[2, 1, 0], [10, 0, 1]])
    return room


@pytest.fixture(scope="module")
def url(room, served) -> Iterator[str]:
    options = Serve(port=free_port(), replicas=2, replays="refused")
    with served(Endpoint("pets", room.registry, room.keys, options, room.folder / "serve.log")) as url:
        yield url


def predict(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/models/pets:predict", content=GOOD, headers={"content-type": "application/json"})


@pytest.mark.parametrize("binary", [False, True])
def test_tritons_client_is_answered(url, binary):
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("pets", "1")
        assert client.get_model_metadata("pets")["outputs"][0]["datatype"] == "FP32"
        assert {m["name"] for m in client.get_model_repository_index()} == {"pets", "house", "lots"}
        x = triton.InferInput("x", [2, 2], "FP32")
        x.set_data_from_numpy(np.array([[1, 2], [3, 4]], np.float32), binary_data=binary)
        output = triton.InferRequestedOutput("probabilities", binary_data=binary)
        found = client.infer("pets", [x], outputs=[output], request_id="7", request_compression_algorithm="gzip")
        assert found.as_numpy("probabilities").tolist() == [[1, 2], [3, 4]]
        assert found.get_response()["id"] == "7"
        best = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=1)
        top = client.infer("pets", [x], outputs=[best]).as_numpy("probabilities").ravel()
        assert [str(t.decode() if isinstance(t, bytes) else t).split(":")[1:] for t in top] == [["1", "dog"]] * 2


def test_a_fuzzer_finds_no_5xx_in_the_whole_openapi_document(url):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")

    seen = []
    for operation in schema.get_all_operations():
        api = operation.ok()

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=api.as_strategy())
        def run(case):
            answer = case.call(base_url=url)
            assert answer.status_code < 500, (case.path, answer.status_code, answer.text)
            seen.append(answer.status_code)

        run()
    assert seen.count(200) > 20


def test_a_body_of_100_mb_is_refused_and_the_endpoint_lives(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as wire:
        wire.sendall(b"POST /v1/models/pets:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n" + b" " * 100_000)
        assert wire.recv(200).split(b"\r\n")[0].split()[1] == b"413"
    assert predict(url).status_code == 200


def test_a_slow_body_is_given_up_and_holds_nobody_else(url, monkeypatch):
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /v1/models/pets:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    slow = [socket.create_connection((host, int(port)), timeout=30) for _ in range(50)]
    try:
        for wire in slow:
            wire.sendall(head)
        for _ in range(20):
            assert predict(url).status_code == 200
        assert slow[0].recv(200).split(b"\r\n")[0].split()[1] == b"408"
    finally:
        for wire in slow:
            wire.close()


def test_a_head_request_is_answered_though_no_body_follows(url):
    with httpx.Client(timeout=10) as client:
        assert client.head(f"{url}/docs").status_code == 405
        assert client.get(f"{url}/docs").status_code == 200  # on the same connection


def test_a_sealed_request_is_answered_once_by_all_replicas_together(url):
    (key,) = ohttp.decode_configs(httpx.get(f"{url}/v1/models/pets/ohttp-keys").content)
    fields = [(b"date", formatdate(usegmt=True).encode())]
    inner = bhttp.encode_request(bhttp.Request(b"POST", b"http", b"x", b"/v1/models/pets:predict", fields, GOOD))
    capsule, open_answer = ohttp.seal_request(inner, key)
    statuses = []
    for _ in range(12):  # each on a connection of its own, which either replica may get
        answer = httpx.post(f"{url}/v1/models/pets:predict", content=capsule, headers={"content-type": ohttp.REQUEST_TYPE})
        statuses.append(bhttp.decode_response(open_answer(answer.content)).status)
    assert sorted(statuses) == [200] + [409] * 11
    assert statuses[0] == 200


def test_keys_are_rotated_while_clients_ask(url, room):
    with Client(url, "pets", retries=0) as old:
        for _ in range(5):
            room.keys.rotate(request_key("pets"))
            for _ in range(5):
                with Client(url, "pets", retries=0, trust=room.keys.public_key()) as new:
                    assert new.predict([[1, 2]]) == old.predict([[1, 2]]) == [[1, 2]]


def test_a_request_id_comes_back_and_the_log_has_it_but_no_input(url, room):
    answer = httpx.post(
        f"{url}/v1/models/pets:predict", content=b'{"instances": [[1, 734.25]]}', headers={"x-request-id": "me-1"}
    )
    assert answer.headers["x-request-id"] == "me-1"
    end = time.monotonic() + 10
    log = room.folder / "serve.log"
    while b'"me-1"' not in (text := log.read_bytes() if log.exists() else b""):
        assert time.monotonic() < end
        time.sleep(0.1)
    line = next(json.loads(each) for each in text.splitlines() if b'"me-1"' in each)
    assert (line["status"], line["model"], line["version"], line["rows"]) == (200, "pets", "1", 1)
    assert b"734.25" not in text


def test_the_metrics_are_the_sum_over_the_replicas(url):
    def count() -> float:
        page = httpx.get(f"{url}/metrics").text
        wanted = 'heliograph_requests_total{code="200",model="house",protocol="tfserving",version="1"} '
        return next((float(line.removeprefix(wanted)) for line in page.splitlines() if line.startswith(wanted)), 0)

    before = count()
    for _ in range(40):
        assert httpx.post(f"{url}/v1/models/house:predict", content=b'{"instances": [{"size": 1}]}').status_code == 200
    end = time.monotonic() + 10
    while count() != before + 40:
        assert time.monotonic() < end, (before, count())
        time.sleep(0.2)


def test_the_page_and_the_client_without_waiting(url, room):
    assert '"name": "pets", "version": 1' in httpx.get(f"{url}/docs").text

    async def work() -> list:
        async with AsyncClient(url, "pets", trust=room.keys.public_key()) as client:
            return await asyncio.gather(*[client.predict([[n, 0]]) for n in range(20)])

    assert asyncio.run(work()) == [[[float(n), 0.0]] for n in range(20)]


def replicas() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::ServeReplica:pets" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_killed_replica_loses_no_request(url):
    before = {p.pid for p in replicas()}
    assert len(before) == 2
    end = time.monotonic() + 60
    killed, answered = False, 0
    with Client(url, "pets") as client:
        while time.monotonic() < end:
            assert client.predict([[1, 2]]) == [[1.0, 2.0]]
            answered += 1
            if answered == 100:
                os.kill(min(before), signal.SIGKILL)
                killed = True
            if killed and len(now := {p.pid for p in replicas()} - {min(before)}) == 2 and now != before and answered > 300:
                break
    assert len({p.pid for p in replicas()}) == 2


def test_the_client_tries_again_but_not_for_ever_and_not_what_was_refused(url, monkeypatch):
    with Client(f"http://127.0.0.1:{free_port()}", "pets", encrypt=False, retries=2) as client:
        began = time.monotonic()
        with pytest.raises(EndpointError, match="is the endpoint running"):
            client.predict([[1, 2]])
        assert time.monotonic() - began < 5
    asked = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return (
            httpx.Response(503, headers={"retry-after": "0"})
            if len(asked) < 3
            else httpx.Response(200, json={"predictions": [1]})
        )

    client = Client("http://x", "pets", encrypt=False)
    client._http = httpx.Client(transport=httpx.MockTransport(handle))
    assert client.predict([1]) == [1]
    assert len(asked) == 3
    client._saved = 0.0
    asked.clear()
    with pytest.raises(RequestError, match="503"):
        client.predict([1])
    assert len(asked) == 1


def test_a_file_is_predicted_row_by_row_and_goes_on_where_it_stopped(url, room, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("size,age,other\n" + "".join(f"{i},{i % 7},x\n" for i in range(1000)))
    out = tmp_path / "out.csv"
    with Client(url, "house", trust=room.keys.public_key()) as client:
        bulk.predict(client, rows, out, 64)
        whole = out.read_bytes()
        found = [float(line) for line in whole.decode().splitlines()[1:]]
        assert found == [2.0 * i + 10 * (i % 7) for i in range(1000)]
        out.write_bytes(whole[:2000])
        bulk.predict(client, rows, out, 100)
        assert out.read_bytes() == whole
        rows.write_text("size,age\n1,2\nmany,3\n")
        with pytest.raises(RequestError, match=r"rows 0 to 1 \(from 0\).*row 1: `size` is not a number"):
            bulk.predict(client, rows, tmp_path / "other.csv", 64)


def test_a_file_is_predicted_by_a_model_of_several_targets(url, room, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("size,age\n3,1\n1,5\n")
    (tmp_path / "rows.json").write_text('[{"size": 3, "age": 1}, {"size": 1, "age": 5}]')
    out = tmp_path / "out.csv"
    with Client(url, "lots", trust=room.keys.public_key()) as client:
        for rows in ("rows.csv", "rows.json"):
            bulk.predict(client, tmp_path / rows, out, 64)
            assert out.read_text() == (
                "price prediction,kind prediction,kind p(big),kind p(old)\n16.0,big,3.0,1.0\n52.0,old,1.0,5.0\n"
            )
            out.unlink()
        capsys.readouterr()
        bulk.predict(client, tmp_path / "rows.json", None, 64)
        assert capsys.readouterr().out == "16\tbig\t3.0000\n52\told\t5.0000\n"
        bulk.predict(client, tmp_path / "rows.csv", tmp_path / "out.jsonl", 64)
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first == {"price prediction": 16.0, "kind prediction": "big", "kind probabilities": [3.0, 1.0]}


def asked_until(url: str, happened, timeout: float = 60) -> list[httpx.Response]:
    answers, end = [], time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end
        answers.append(predict(url))
    return answers


def test_a_new_version_that_proves_itself_is_promoted_without_a_failed_request(url, room):
    version = room.add("pets", TENSOR, [[2, 0], [0, 2]])
    begin(room.registry, "pets", version, percent=50, seconds=2, requests=30)
    answers = asked_until(url, lambda: not room.registry.state("pets").rollout.active)
    assert room.registry.state("pets").rollout.verdict.startswith("promoted")
    assert {a.status_code for a in answers} == {200}
    for answer in answers:  # each from one version
        assert answer.json()["predictions"] == [[float(answer.headers["model-version"])] * 2]
    assert {a.headers["model-version"] for a in answers} == {"1", "2"}
    asked_until(url, lambda: {predict(url).headers["model-version"] for _ in range(20)} == {"2"})


def test_a_new_version_that_fails_is_rolled_back(url, room):
    version = room.add("pets", TENSOR, NAN)
    state = begin(room.registry, "pets", version, percent=30, seconds=60, requests=1000)
    answers = asked_until(url, lambda: not room.registry.state("pets").rollout.active)
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 500}
    assert codes.count(500) < 200
    with pytest.raises(RolledBack, match=r"rolled back: .* requests failed"):
        follow(lambda: room.registry.state("pets"), "pets", state, True, print)
    time.sleep(1.5)
    assert {predict(url).headers["model-version"] for _ in range(30)} == {"2"}


def test_a_new_version_that_was_tampered_with_is_rolled_back_before_it_answers(url, room):
    version = room.add("pets", TENSOR, [[3, 0], [0, 3]])
    file = room.registry.bundle("pets", version) / "model.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    begin(room.registry, "pets", version, percent=50, seconds=1, requests=1)
    answers = asked_until(url, lambda: not room.registry.state("pets").rollout.active)
    assert "cannot be loaded" in room.registry.state("pets").rollout.verdict
    assert {(a.status_code, a.headers["model-version"]) for a in answers} == {(200, "2")}
