"""An endpoint with a certificate: who may come near it, what is renewed, and what HAProxy lets through."""

import datetime
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from heliograph.cluster.keys import KeyStore
from heliograph.cluster.runtime import free_port
from heliograph.cluster.tls import endpoint_pem
from heliograph.errors import EndpointError, KeyStoreError
from heliograph.names import Verb
from heliograph.project import Serve
from heliograph.serve.access import Tokens
from heliograph.serve.client import Client
from heliograph.serve.endpoint import Endpoint, check_port

from .served import TENSOR, Room

HOST = "127.0.0.2"
"""On the loopback device, and yet not what is served without a certificate."""
BODY = b'{"instances": [[1, 2]]}'


def certify(folder: Path, days: int = 30, write: tuple[str, ...] = ("tls.key", "tls.crt")) -> int:
    """Put a certificate for HOST that signs itself into a key store, and its key; its serial number."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "endpoint")])
    now = datetime.datetime.now(datetime.UTC)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60)).not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(alternative, critical=False).sign(private, hashes.SHA256())
    )  # fmt: skip
    plain = serialization.NoEncryption()
    pems = {
        "tls.key": private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain),
        "tls.crt": certificate.public_bytes(serialization.Encoding.PEM),
    }
    for file in write:
        (folder / file).write_bytes(pems[file])
        (folder / file).chmod(0o600)
    return certificate.serial_number


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Room:
    room = Room(tmp_path_factory.mktemp("tls"))
    room.add("pets", TENSOR, [[1, 0], [0, 1]])
    certify(room.keys.folder)
    return room


@pytest.fixture(scope="module")
def token(room) -> str:
    return Tokens(room.keys).add("alice", [], [Verb.PREDICT], None, None)


@pytest.fixture(scope="module")
def url(room, served) -> Iterator[str]:
    options = Serve(host=HOST, port=free_port(), tls=True, access="tokens")
    with served(Endpoint("pets", room.registry, room.keys, options)) as url:
        assert url == f"https://{HOST}:{options.port}"
        yield url


@pytest.fixture
def trusted(room, monkeypatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(room.keys.folder / "tls.crt"))


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def connected(url: str, version: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if version:
        context.maximum_version = version
    return context.wrap_socket(socket.create_connection((HOST, port_of(url)), timeout=5))


def serial(url: str) -> int:
    with connected(url) as talk:
        return x509.load_der_x509_certificate(talk.getpeercert(binary_form=True) or b"").serial_number


@pytest.mark.parametrize("encrypt", [True, False])
def test_a_client_that_trusts_the_certificate_is_answered(url, room, token, trusted, encrypt):
    with Client(url, "pets", token=token, encrypt=encrypt, trust=room.keys.public_key()) as client:
        assert client.predict([[1, 2]]) == [[1, 2]]


def test_nothing_is_answered_in_clear_or_at_another_address(url, room, token):
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https", "http") + "/v2/health/live")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port_of(url)), timeout=5)
    with pytest.raises(EndpointError, match="CERTIFICATE_VERIFY_FAILED"), Client(url, "pets", token=token, retries=0) as client:
        client.predict([[1, 2]])
    with pytest.raises(ssl.SSLError):
        connected(url, ssl.TLSVersion.TLSv1_1)


def test_a_renewed_certificate_is_shown_and_no_connection_is_lost(url, room, token):
    def ask(client: httpx.Client) -> int:
        answer = client.post(f"{url}/v1/models/pets:predict", content=BODY, headers={"authorization": f"Bearer {token}"})
        return answer.status_code

    shown, folder = serial(url), room.keys.folder
    with httpx.Client(verify=False) as client:
        assert ask(client) == 200
        kept = [(folder / name).read_bytes() for name in ("tls.key", "tls.crt")]
        certify(folder, write=("tls.crt",))  # half of a new pair
        time.sleep(2.5)
        assert serial(url) == shown
        for name, content in zip(("tls.key", "tls.crt"), kept, strict=True):
            (folder / name).write_bytes(content)
        new = certify(folder)
        end = time.monotonic() + 20
        while serial(url) != new:
            assert time.monotonic() < end, "the old certificate is still shown"
            time.sleep(0.2)
        assert ask(client) == 200


@pytest.mark.parametrize("case", ["missing", "another key", "run out", "open to others", "not this machine's"])
def test_what_cannot_be_served_is_refused_before_ray_starts(case, tmp_path):
    keys = KeyStore(tmp_path)
    certify(tmp_path, days=-1 if case == "run out" else 30)
    match case:
        case "missing":
            (tmp_path / "tls.crt").unlink()
        case "another key":
            certify(tmp_path, write=("tls.key",))
        case "open to others":
            (tmp_path / "tls.key").chmod(0o644)
        case "not this machine's":
            with pytest.raises(EndpointError, match=r"192\.0\.2\.1: is no address of this machine"):
                check_port(Serve(host="192.0.2.1", tls=True, access="tokens"))
            return
    said = {"missing": "not found", "another key": "cannot be used", "run out": "ran out on", "open to others": "chmod 600"}
    with pytest.raises(KeyStoreError, match=said[case]):
        endpoint_pem(keys)


HEAD = "POST /v1/models/pets:predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
INNER = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
PLAIN = BODY.decode()
N, BOTH = len(PLAIN), len(PLAIN) + len(INNER)
SIZED = f"Content-Length: {N}\r\n\r\n{PLAIN}"
CHUNK = f"{N:x}\r\n{PLAIN}\r\n"
CHUNKED = f"{CHUNK}0\r\n\r\n"
CODED = "Transfer-Encoding: chunked\r\n"
PASSED = {
    "both lengths, chunked first": f"{CODED}Content-Length: 4\r\n\r\n{CHUNKED}",
    "both lengths, chunked last": f"Content-Length: {len(CHUNKED) + len(INNER)}\r\n{CODED}\r\n{CHUNKED}{INNER}",
    "a folded header": f"X: y\r\n {CODED}{SIZED}",
    "the token named as a header of the hop": f"Connection: authorization\r\n{SIZED}",
    "another method on top": f"X-HTTP-Method-Override: GET\r\nX-Original-URL: /metrics\r\n{SIZED}",
}
"""Read in one way by all, and so an ordinary request."""
REFUSED = {
    "two different lengths": f"Content-Length: {N}\r\nContent-Length: {BOTH}\r\n\r\n{PLAIN}{INNER}",
    "a list of lengths": f"Content-Length: {N}, {BOTH}\r\n\r\n{PLAIN}{INNER}",
    "a signed length": f"Content-Length: +{N}\r\n\r\n{PLAIN}",
    "a hexadecimal length": f"Content-Length: 0x{N:x}\r\n\r\n{PLAIN}",
    "a space before the colon": f"Transfer-Encoding : chunked\r\n{SIZED}",
    "an unknown coding": f"Transfer-Encoding: xchunked\r\n{SIZED}",
    "two codings": f"Transfer-Encoding: chunked, identity\r\n\r\n{CHUNKED}",
    "a bare line feed": f"X: y\n{CODED}{SIZED}",
    "a bare carriage return": f"X: y\r{CODED}{SIZED}",
    "a NUL in a header": f"X: y\0z\r\n{SIZED}",
    "a chunk of a wrong size": f"{CODED}\r\nzz\r\n{PLAIN}\r\n0\r\n\r\n",
    "a chunk's size too large": f"{CODED}\r\nffffffffffffffff1\r\n{PLAIN}\r\n0\r\n\r\n",
    "a trailer that is a header": f"{CODED}\r\n{CHUNK}0\r\nAuthorization: Bearer x\r\n\r\n",
}


def test_no_request_is_smuggled_through_haproxy(url, token):
    """Each attempt gets one answer, and the requests of others that come right after it get theirs."""
    got = {}
    for name, rest in (PASSED | REFUSED).items():
        for authorization in (f"Authorization: Bearer {token}\r\n", ""):
            with connected(url) as talk:
                talk.sendall((HEAD + authorization + rest).encode("latin-1"))
                answers = b""
                talk.settimeout(1.5)
                try:
                    while part := talk.recv(65536):
                        answers += part
                except TimeoutError:
                    pass
            statuses = [int(s) for s in re.findall(rb"HTTP/1\.1 (\d{3})", answers)]
            got[name, bool(authorization)] = statuses
            assert b"heliograph_requests" not in answers, f"{name}: the metrics came without a token for them"
            assert statuses, name
            assert authorization or 200 not in statuses, f"{name}: answered without a token"
            with httpx.Client(verify=False, headers={"authorization": f"Bearer {token}"}) as other:
                for _ in range(4):
                    answer = other.post(f"{url}/v1/models/pets:predict", content=BODY)
                    assert (answer.status_code, answer.json()) == (200, {"predictions": [[1.0, 2.0]]}), name
    print({name: (got[name, True], got[name, False]) for name in PASSED | REFUSED})
    for name in PASSED | REFUSED:
        assert got[name, True][0] in ((200,) if name in PASSED else (400, 401)), f"{name}: {got[name, True]}"
