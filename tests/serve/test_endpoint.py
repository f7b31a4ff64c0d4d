"""The digits bundle behind real HTTP: what it answers, what it refuses, and what somebody in between sees."""

import base64
import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from heliograph import Client
from heliograph.cluster.keys import KeyStore
from heliograph.cluster.runtime import free_port
from heliograph.errors import PortInUse, RequestError, SignatureError
from heliograph.jobs.engine import Engine
from heliograph.jobs.registry import Registry
from heliograph.project import Serve
from heliograph.serve import bhttp, ohttp
from heliograph.serve.door import Door
from heliograph.serve.endpoint import Endpoint, check_port, start

PREDICT = "/v1/models/digits:predict"


@pytest.fixture(scope="module")
def endpoint(digits, tmp_path_factory) -> Endpoint:
    run = digits / "runs" / "default"
    models = Registry(tmp_path_factory.mktemp("registry"))
    models.add("digits", run / "bundle")
    return Endpoint("digits", models, KeyStore(run / "keys"), Serve(port=free_port()))


@pytest.fixture(scope="module")
def url(endpoint, cluster, served) -> Iterator[str]:
    with served(endpoint) as url:
        yield url


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    from sklearn import datasets

    return datasets.load_digits().images[:5]


def test_sealed_and_plain_answers_equal_the_local_model(url, endpoint, images):
    bundle = endpoint.registry.bundle("digits", 1)
    own = Engine(bundle, bundle).predict({"image": images.astype("f4")})
    for encrypt in (True, False):
        with Client(url, "digits", encrypt=encrypt, trust=endpoint.keys.public_key()) as client:
            assert np.abs(np.asarray(client.predict(images)) - own).max() <= 1e-5
            assert np.abs(np.asarray(client.predict([{"image": images[0]}])) - own[:1]).max() <= 1e-5


def test_an_answer_is_explained_sealed_and_plain_and_adds_up(url, endpoint, images):
    for encrypt in (True, False):
        with Client(url, "digits", encrypt=encrypt, trust=endpoint.keys.public_key()) as client:
            first, second = client.explain(images[:2])
            assert first["output"] == int(np.argmax(client.predict(images[:1])[0]))
            added = np.asarray(first["features"]["image"])
            assert added.shape == (8, 8)
            assert first["base"] + added.sum() == pytest.approx(first["value"], abs=1e-4)
            assert second["features"] != first["features"]
            with pytest.raises(RequestError, match="16 at most are explained at once"):
                client.explain(np.repeat(images, 4, axis=0))


def test_requests_that_moved_away_from_training_are_told_and_counted(url, endpoint):
    from sklearn import datasets

    every = datasets.load_digits().images[:400]
    with Client(url, "digits", trust=endpoint.keys.public_key()) as client:
        client.predict(every)
        time.sleep(1)
        assert not next(f for f in client.drift() if f["name"] == "image")["moved"]
        for _ in range(4):
            client.predict(16 - every)  # inverted
        time.sleep(1)
        found = {f["name"]: f for f in client.drift()}
    assert found["image"]["moved"]
    assert found["image"]["rows"] >= 2000
    page = httpx.get(f"{url}/metrics").text
    assert re.search(r'heliograph_drift_psi\{feature="image",model="digits",version="1"\} [1-9]', page)


def test_the_paths_of_tensorflow_serving_answer(url):
    status = httpx.get(f"{url}/v1/models/digits").json()
    assert status["model_version_status"][0]["state"] == "AVAILABLE"
    assert httpx.get(f"{url}/v1/models/digits/metadata").json()["metadata"]["schema"]["classes"] == list(range(10))
    assert httpx.get(f"{url}/v1/models/other").status_code == 404
    assert httpx.get(f"{url}{PREDICT}").status_code == 405


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"[1]", "the body must be a JSON object"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'{"instances": [' + b"[" * 900 + b"]" * 900 + b"]}", "row 0: `image` must hold finite numbers"),
        (b'{"instances": []}', "at least one row"),
        (b'{"instances": [[[1, 2]]]}', "row 0: `image` has the shape [1, 2]; its shape is [8, 8]"),
        (b'{"instances": [{"image": "4111-1111"}]}', "row 0: `image` must hold finite numbers"),
        (b'{"instances": [[[NaN]]]}', "the body is not JSON"),
    ],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_a_wrong_body_is_refused_with_400_and_a_reason_that_leaks_nothing(url, body, reason, sealed):
    if sealed:
        (config,) = ohttp.decode_configs(httpx.get(f"{url}/v1/models/digits/ohttp-keys").content)
        message = bhttp.encode_request(bhttp.Request(b"POST", b"http", b"x", PREDICT.encode(), [], body))
        capsule, open_answer = ohttp.seal_request(message, config)
        outer = httpx.post(f"{url}{PREDICT}", content=capsule, headers={"content-type": ohttp.REQUEST_TYPE})
        assert outer.status_code == 200
        inner = bhttp.decode_response(open_answer(outer.content))
        status, content = inner.status, inner.content
    else:
        answer = httpx.post(f"{url}{PREDICT}", content=body)
        status, content = answer.status_code, answer.content
    assert status == 400
    assert reason in json.loads(content)["error"]
    assert b"4111" not in content


def test_what_cannot_be_opened_gets_one_answer_whatever_the_cause(url):
    (config,) = ohttp.decode_configs(httpx.get(f"{url}/v1/models/digits/ohttp-keys").content)
    capsule, _ = ohttp.seal_request(b"x" * 100, config)
    stranger, _ = ohttp.seal_request(b"x" * 100, ohttp.KeyConfig(1, ohttp.public_key(bytes(range(32)))))
    wrong_id = bytes([9]) + capsule[1:]
    answers = set()
    for body in (capsule[:-1], capsule[:50], b"", capsule[:-1] + b"\0", stranger, wrong_id):
        answer = httpx.post(f"{url}{PREDICT}", content=body, headers={"content-type": ohttp.REQUEST_TYPE})
        answers.add((answer.status_code, answer.headers["content-type"], answer.content))
    ((status, kind, content),) = answers
    assert status == 400
    assert kind == "application/problem+json"
    assert json.loads(content)["type"] == "https://iana.org/assignments/http-problem-types#ohttp-key"


def test_a_request_inside_a_capsule_for_another_path_is_refused_inside(url):
    (config,) = ohttp.decode_configs(httpx.get(f"{url}/v1/models/digits/ohttp-keys").content)
    message = bhttp.encode_request(bhttp.Request(b"POST", b"http", b"x", b"/v1/models/other:predict", [], b"{}"))
    capsule, open_answer = ohttp.seal_request(message, config)
    outer = httpx.post(f"{url}{PREDICT}", content=capsule, headers={"content-type": ohttp.REQUEST_TYPE})
    assert bhttp.decode_response(open_answer(outer.content)).status == 404


@pytest.mark.skipif(not shutil.which("npm"), reason="Node.js is not installed: apt-get install nodejs npm")
def test_a_client_in_javascript_that_others_wrote_is_answered(url, images, tmp_path):
    shutil.copytree(Path(__file__).parent / "javascript", tmp_path / "client")
    run = functools.partial(subprocess.run, cwd=tmp_path / "client", check=True, capture_output=True, text=True, timeout=120)
    run(["npm", "ci", "--silent", "--no-audit", "--no-fund"])
    with Client(url, "digits") as client:
        own = client.predict(images[:2])
    for rows, status in ((images[:2].tolist(), 200), ([[1, 2]], 400)):
        said = run(["node", "client.mjs", url, "digits", json.dumps({"instances": rows})]).stdout
        answers = [json.loads(line) for line in said.splitlines()]
        assert [a["aead"] for a in answers] == [1, 2]
        assert all((a["outer"], a["status"]) == (200, status) for a in answers)
        if status == 200:
            assert all(np.allclose(a["body"]["predictions"], own, atol=1e-6) for a in answers)


def test_a_body_that_is_too_large_is_refused_with_413(url):
    parts = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(parts[0], int(parts[1]), timeout=30)
    connection.request("POST", PREDICT, body=b" " * (17 << 20))
    answer = connection.getresponse()
    assert answer.status == 413
    assert b"larger than 16 MiB" in answer.read()
    connection.close()


def test_the_client_says_why_it_was_refused(url):
    with Client(url, "digits") as client, pytest.raises(RequestError, match="`image` has the shape") as caught:
        client.predict([[1, 2]])
    assert caught.value.status == 400
    with Client(url, "nothing") as client, pytest.raises(RequestError, match="no such model") as caught:
        client.predict([[1, 2]])
    assert caught.value.status == 404


def test_keys_that_another_operator_signed_are_not_used(url, tmp_path, images):
    stranger = KeyStore(tmp_path / "stranger")
    stranger.signing_key()
    with Client(url, "digits", trust=stranger.public_key()) as client, pytest.raises(SignatureError, match="is not signed by"):
        client.predict(images)


class Recorder:
    """A proxy between client and endpoint that keeps every byte of both directions."""

    def __init__(self, port: int):
        self.target, self.seen = port, bytearray()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", self.target))
            for source, sink in ((client, upstream), (upstream, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            self.seen += data
            sink.sendall(data)


def encodings(numbers: np.ndarray) -> list[bytes]:
    """The ways in which a client could have sent these numbers: text of several forms, binary of several types, base64."""
    listed = numbers.tolist()
    flat = numbers.ravel()
    texts = [json.dumps(listed), json.dumps(listed, separators=(",", ":")), " ".join(map(str, flat)), ",".join(map(str, flat))]
    texts += [",".join(f"{x:g}" for x in flat), " ".join(f"{x:g}" for x in flat)]
    binary = [flat.astype(kind).tobytes() for kind in ("<f4", ">f4", "<f8", ">f8", "<i4", "<i8", "u1", "<f2")]
    plain = [t.encode() for t in texts] + binary
    # Base64 hides where in three bytes a value starts: cut to the part that is the same for every start.
    # What is left of short ones would be met by chance in so much text.
    encoded = [base64.b64encode(p[start : start + len(p) // 3 * 3 - 3]) for p in plain for start in range(3)]
    return plain + [text for text in encoded if len(text) >= 8]


@pytest.mark.parametrize("encrypt", [True, False])
def test_somebody_in_between_sees_neither_input_nor_answer(url, images, encrypt):
    recorder = Recorder(int(url.rsplit(":", 1)[1]))
    secret = np.round(images[0] + np.arange(64).reshape(8, 8) / 64, 3)
    with Client(recorder.url, "digits", encrypt=encrypt) as client:
        answer = np.asarray(client.predict([secret])[0])
    recorder.server.close()
    time.sleep(0.1)
    seen = bytes(recorder.seen)
    assert PREDICT.encode() in seen
    rows = [secret[i] for i in range(8)]
    inputs = [needle for row in rows for needle in encodings(row)]
    answers = encodings(answer) + [repr(float(p)).encode() for p in answer if p > 1e-3]
    found_input = any(needle in seen for needle in inputs)
    found_answer = any(needle in seen for needle in answers)
    # The same search finds both in a request that is not sealed: it can fail.
    assert (found_input, found_answer) == (not encrypt, not encrypt)
    assert (b"instances" in seen) == (not encrypt)
    assert (b"predictions" in seen) == (not encrypt)


def test_everything_listens_on_loopback_only(url):
    addresses = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        addresses |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {ip.removeprefix("::ffff:") for ip in addresses} == {"127.0.0.1"}


def test_a_port_in_use_is_refused(endpoint, url):
    with pytest.raises(PortInUse, match="is in use"):
        check_port(endpoint.options)


def test_a_bundle_with_a_changed_byte_is_not_served(endpoint, cluster, tmp_path):
    from dataclasses import replace

    changed = Registry(tmp_path)
    changed.add("digits", endpoint.registry.bundle("digits", 1))
    file = changed.bundle("digits", 1) / "model.onnx"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    damaged = replace(endpoint, registry=changed, options=Serve(port=free_port()))
    with pytest.raises(SignatureError, match="was changed"):
        start(damaged, cluster)


def written_places() -> Iterator[tuple[str, bytes]]:
    """All that Ray keeps of what passes through it: its session's files, its object store, its key-value store, and the
    command lines and environments of its processes."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    for file in session.rglob("*"):
        if file.is_file() and not file.is_symlink():
            yield str(file), file.read_bytes()
    for space in (None, b"serve", b"fun", b"job", b"session", b"train"):
        for key in _internal_kv_list(b"", namespace=space):
            yield f"key-value store, {key}", key + (_internal_kv_get(key, namespace=space) or b"")
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            for what in ("environ", "cmdline"):
                yield f"{process.name()}, {what}", Path(f"/proc/{process.pid}/{what}").read_bytes()
            for place in Path(f"/proc/{process.pid}/fd").iterdir():
                if str(place.readlink()).startswith("/dev/shm/"):
                    yield f"object store of {process.name()}", allocated(place)


def allocated(file: Path) -> bytes:
    """What was written to a sparse file."""
    found, at = [], 0
    with file.open("rb", buffering=0) as source:
        size = source.seek(0, os.SEEK_END)
        while at < size:
            try:
                begin = os.lseek(source.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole
                break
            at = os.lseek(source.fileno(), begin, os.SEEK_HOLE)
            found.append(os.pread(source.fileno(), at - begin, begin))
    return b"".join(found)


def test_neither_keys_nor_inputs_are_anywhere_that_ray_writes(url, endpoint):
    import ray

    secret = np.round(np.random.default_rng().uniform(1, 250, (8, 8)), 3)  # nobody else has sent it
    with Client(url, "digits") as client:
        client.predict([secret])
    key = endpoint.keys.secret("digits-hpke-1")
    derived = Door(endpoint.keys, "digits", None, 60)._private[1]
    needles = [form for k in (key, derived) for form in (k, k.hex().encode(), base64.b64encode(k))]
    needles += [needle for row in secret for needle in encodings(row)]
    planted = os.urandom(32)
    held = ray.put(np.frombuffer(planted * 10_000, np.uint8))
    file = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "planted.log"
    file.write_bytes(b"key: " + planted.hex().encode())
    found, hiding = set(), set()
    for name, content in written_places():
        found |= {name for needle in needles if needle in content}
        hiding |= {name for needle in (planted, planted.hex().encode()) if needle in content}
    file.unlink()
    del held
    assert not found
    assert any(name.startswith("object store") for name in hiding)
    assert str(file) in hiding


def test_a_replica_leaves_no_core_file(url):
    named = [p for p in psutil.Process().children(recursive=True) if "ServeReplica" in " ".join(p.cmdline())]
    assert named
    for process in named:
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(r"Max core file size\s+0\s+0", limits)
