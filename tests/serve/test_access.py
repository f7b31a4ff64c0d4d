"""Who may ask: every door that somebody could try, and what he got."""

import base64
import hmac
import json
import stat
import time

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from heliograph import Client
from heliograph.cluster.audit import Audit
from heliograph.errors import AccessError, KeyStoreError, RequestError
from heliograph.names import Verb
from heliograph.project import Jwt, Serve
from heliograph.serve import bhttp, ohttp
from heliograph.serve.access import Tokens, require_role
from heliograph.serve.application import Seen
from heliograph.serve.messages import Request

from .served import TENSOR, Room

PETS, BODY = "/v1/models/pets", b'{"instances": [[1, 2]]}'


@pytest.fixture
def room(tmp_path):
    room = Room(tmp_path, access="tokens")
    for name in ("pets", "cats"):
        room.add(name, TENSOR, [[1, 0], [0, 1]])
    room.follow()
    return room


@pytest.fixture
def tokens(room) -> Tokens:
    return Tokens(room.keys)


def ask(room: Room, token: str | None, path: str = f"{PETS}:predict", body: bytes = BODY, method: str = "POST") -> int:
    """The status; token: as it stands in the header, but for a token alone."""
    header = "" if token is None else f"Bearer {token}" if token.startswith("hg_") else token
    return room.request(Request(method, path, "application/json", body, None, header)).status


def unsigned(algorithm: str) -> str:
    parts = ({"alg": algorithm, "typ": "JWT"}, {"sub": "admin", "models": ["pets"]})
    head, claims = (base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts)
    return f"Bearer {head}.{claims}."


def test_attacks_on_access_and_the_status_that_each_got(room, tokens, capsys):
    good = tokens.add("alice", ["pets"], [Verb.PREDICT], 30, None)
    other = tokens.add("bob", ["cats"], [Verb.PREDICT], 30, None)
    reader = tokens.add("carol", [], [Verb.READ], 30, None)
    expired = tokens.add("dave", [], [Verb.PREDICT], 1e-9, None)
    revoked = tokens.add("eve", [], [Verb.PREDICT], None, None)
    tokens.revoke(revoked.split("_")[1])
    identity, secret = good.split("_", 2)[1:]
    stored = tokens.all()[0].sha256
    tried = {
        "its own": (good, 200),
        "none": (None, 401),
        "another scheme": (f"Basic {base64.b64encode(good.encode()).decode()}", 401),
        "without a scheme": (f" {good}", 401),
        "one letter changed": (good[:-1] + ("A" if good[-1] != "A" else "B"), 401),
        "unknown id": (f"hg_{'0' * 8}_{secret}", 401),
        "another's id with its secret": (f"hg_{other.split('_')[1]}_{secret}", 401),
        "the hash of the list": (f"hg_{identity}_{stored[:43]}", 401),
        "empty secret": (f"hg_{identity}_", 401),
        "two tokens": (f"Bearer {other}, Bearer {good}", 401),
        "line break": (f"Bearer {good}\r\nx: y", 401),
        "null byte": (f"Bearer {good}\0", 401),
        "oversized": ("hg_" + "a" * 1_000_000, 401),
        "alg=none": (unsigned("none"), 401),
        "key confusion": (unsigned("HS256"), 401),
        "expired": (expired, 401),
        "revoked": (revoked, 401),
        "another model's": (other, 403),
        "another verb's": (reader, 403),
    }
    got = {name: ask(room, token) for name, (token, _) in tried.items()}
    tried_paths = {
        "dots in the path": "/v1/models/cats/../pets:predict",
        "encoded slash": "/v1/models/cats%2F..%2Fpets:predict",
        "encoded dots": "/v1/models/%2e%2e/pets:predict",
        "double slash": "//v1/models/pets:predict",
        "upper case": "/V1/MODELS/PETS:PREDICT",
    }
    for name, path in tried_paths.items():
        got[name] = ask(room, other, path)
    got["encoded name"] = ask(room, other, "/v1/models/%70ets:predict")
    with capsys.disabled():
        print("\n" + "\n".join(f"  {name:<30} {status}" for name, status in got.items()))
    assert {name: got[name] for name in tried} == {name: status for name, (_, status) in tried.items()}
    assert all(got[name] in (403, 404) for name in tried_paths)
    assert got["encoded name"] == 403


def test_a_token_opens_what_its_verbs_say(room, tokens):
    predict, read, metrics = (tokens.add(v, [], [v], None, None) for v in (Verb.PREDICT, Verb.READ, Verb.METRICS))
    paths = {
        ("POST", f"{PETS}:predict"): "predict",
        ("POST", "/v2/models/pets/infer"): "predict",
        ("GET", PETS): "read",
        ("GET", f"{PETS}/metadata"): "read",
        ("GET", "/v2/models/pets"): "read",
        ("POST", "/v2/repository/index"): "read",
        ("GET", f"{PETS}/rollout"): "read",
        ("GET", "/docs"): "read",
        ("GET", "/openapi.json"): "read",
        ("GET", "/metrics"): "metrics",
    }
    body = b'{"inputs": [{"name": "features", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}'
    for (method, path), needs in paths.items():
        sent = body if path.startswith("/v2/models") else b"{}" if path.startswith("/v2") else BODY
        got = [ask(room, token, path, sent, method) for token in (predict, read, metrics, None)]
        assert [status != 403 for status in got[:3]] == [needs == v for v in ("predict", "read", "metrics")], (path, got)
        assert got[3] == 401
    for path in ("/v2/health/live", "/v2/health/ready", f"{PETS}/ohttp-keys"):
        assert ask(room, None, path, method="GET") == 200


def test_a_refusal_says_how_and_tells_nothing_of_what_exists(room, tokens):
    answer = room.ask("POST", f"{PETS}:predict", BODY)
    assert answer.headers["www-authenticate"] == 'Bearer realm="heliograph"'
    missing = room.ask("POST", "/v1/models/nothing:predict", BODY)
    assert (missing.status, missing.body) == (answer.status, answer.body)
    cats = tokens.add("bob", ["cats"], [Verb.PREDICT], None, None)
    assert ask(room, cats, "/v1/models/nothing:predict") == 403


def test_a_rate_holds_for_each_token_by_itself(room, tokens, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    slow, other = (tokens.add(name, [], [Verb.PREDICT], None, 3) for name in ("slow", "other"))
    assert [ask(room, slow) for _ in range(5)] == [200, 200, 200, 429, 429]
    assert ask(room, other) == 200
    now += 0.4
    assert [ask(room, slow) for _ in range(2)] == [200, 429]


def test_a_sealed_token_is_seen_by_the_replica_alone(room, tokens):
    token = tokens.add("alice", ["pets"], [Verb.PREDICT, Verb.READ], None, None)
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.headers) + str(request.content))
        answer = room.ask(request.method, request.url.path, request.content, request.headers.get("content-type", ""))
        return httpx.Response(answer.status, content=answer.body, headers={"content-type": answer.type, **answer.headers})

    for given, works in ((token, True), (None, False), (token[:-2] + "xx", False)):
        with Client("http://x", "pets", token=given) as client:
            client._http = httpx.Client(transport=httpx.MockTransport(handle))
            if works:
                assert client.predict([[1, 2]]) == [[1, 2]]
                assert client.schema()["target"]
            else:
                with pytest.raises(RequestError, match="a valid token is needed") as caught:
                    client.predict([[1, 2]])
                assert caught.value.status == 401
    assert not any("hg_" in text for text in seen)


def test_a_token_outside_does_not_count_for_a_request_inside(room, tokens):
    token = tokens.add("alice", [], [Verb.PREDICT], None, None)
    (key,) = ohttp.decode_configs(room.ask("GET", f"{PETS}/ohttp-keys").body)
    inner = bhttp.encode_request(bhttp.Request(b"POST", b"http", b"x", f"{PETS}:predict".encode(), [], BODY))
    capsule, open_answer = ohttp.seal_request(inner, key)
    answer = room.request(Request("POST", f"{PETS}:predict", ohttp.REQUEST_TYPE, capsule, None, f"Bearer {token}"))
    assert bhttp.decode_response(open_answer(answer.body)).status == 401


def test_the_list_has_no_token_and_a_damaged_one_lets_nobody_in(room, tokens):
    token = tokens.add("alice", [], [Verb.PREDICT], None, None)
    assert token.split("_")[2] not in tokens.file.read_text()
    assert not stat.S_IMODE(tokens.file.parent.stat().st_mode) & 0o077
    assert ask(room, token) == 200
    tokens.file.write_text("[{]")
    assert ask(room, token) == 500
    with pytest.raises(KeyStoreError, match=r"tokens\.json: cannot be read"):
        tokens.all()


def test_the_log_says_whose_token_it_was(room, tokens):
    token, seen = tokens.add("alice", [], [Verb.PREDICT], None, None), Seen()
    room.request(Request("POST", f"{PETS}:predict", "application/json", BODY, None, f"Bearer {token}"), seen)
    assert seen.who == "alice"


def test_who_was_given_and_refused_what_is_in_the_audit_log(room, tokens):
    token = tokens.add("alice", ["pets"], [Verb.PREDICT], None, None)
    tokens.revoke(token.split("_")[1])
    for path in (f"{PETS}:predict", f"{PETS}:predict", "/v1/models/nothing:predict"):
        ask(room, token, path)
    assert room.application.refused == {(401, "pets"): 2, (401, "-"): 1}
    lines = [json.loads(line) for line in Audit(room.keys).file.read_text().splitlines()]
    assert [(line["what"], line["name"]) for line in lines if "token" in line["what"]] == [
        ("token add", "alice"),
        ("token revoke", "alice"),
    ]
    assert token.split("_")[2] not in Audit(room.keys).file.read_text()
    Audit(room.keys).verify()


ISSUER, AUDIENCE = "https://id.example", "heliograph"


@pytest.fixture(scope="module")
def provider():
    """An identity provider's keys: EC and RSA, by their ids."""
    return {"e": ec.generate_private_key(ec.SECP256R1()), "r": rsa.generate_private_key(65537, 2048)}


@pytest.fixture
def foreign(provider, tmp_path) -> Room:
    room = Room(tmp_path, access="tokens", jwt={"issuer": ISSUER, "audience": AUDIENCE, "keys": "jwks.json"})
    write_jwks(room, provider)
    for name in ("pets", "cats"):
        room.add(name, TENSOR, [[1, 0], [0, 1]])
    room.follow()
    room.application = type(room.application)(room.models, room._total, room._first)
    return room


def write_jwks(room: Room, keys: dict) -> None:
    algorithms = {"e": jwt.algorithms.ECAlgorithm, "r": jwt.algorithms.RSAAlgorithm}
    listed = [algorithms[k].to_jwk(v.public_key(), as_dict=True) | {"kid": k, "use": "sig"} for k, v in keys.items()]
    room.keys.folder.mkdir(parents=True, exist_ok=True)
    (room.keys.folder / "jwks.json").write_text(json.dumps({"keys": listed}))


def signed(key, kid: str = "e", algorithm: str = "ES256", **claims) -> str:
    given = {"iss": ISSUER, "aud": AUDIENCE, "sub": "erin", "exp": time.time() + 60, "scope": "predict", **claims}
    made = jwt.encode({k: v for k, v in given.items() if v is not None}, key, algorithm, headers={"kid": kid})
    return f"Bearer {made}"


def test_attacks_on_tokens_of_an_identity_provider(foreign, provider):
    ec_key, rsa_key = provider["e"], provider["r"]
    pem = rsa_key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    head = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "kid": "r"}).encode()).decode().rstrip("=")
    body = signed(rsa_key, "r", "RS256").split(".")[1]
    mac = hmac.digest(pem, f"{head}.{body}".encode(), "sha256")
    confused = f"Bearer {head}.{body}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"
    tried = {
        signed(ec_key): 200,
        signed(rsa_key, "r", "RS256"): 200,
        signed(ec_key, models=["pets"]): 200,
        signed(ec_key, models=["cats"]): 403,
        signed(ec_key, scope="read"): 403,
        signed(ec_key, scope=None): 403,
        signed(ec_key, exp=time.time() - 60): 401,
        signed(ec_key, exp=None): 401,
        signed(ec_key, nbf=time.time() + 600): 401,
        signed(ec_key, iss="https://evil.example"): 401,
        signed(ec_key, iss=None): 401,
        signed(ec_key, aud="another"): 401,
        signed(ec_key, aud=None): 401,
        signed(ec.generate_private_key(ec.SECP256R1())): 401,
        signed(ec_key, kid="unknown"): 401,
        signed(rsa_key, "e", "RS256"): 401,
        signed(None, algorithm="none"): 401,
        confused: 401,
        signed(ec_key)[:-4] + "AAAA": 401,
        signed(ec_key) + "a" * 10_000: 401,
        signed(ec_key).replace("Bearer", "Basic"): 401,
        "Bearer a.b.c": 401,
    }
    assert {token: ask(foreign, token) for token in tried} == tried


def test_an_identity_providers_new_keys_are_taken_up_and_a_broken_answer_changes_nothing(foreign, provider):
    new = ec.generate_private_key(ec.SECP256R1())
    issuer = foreign.application.guard.issuer
    write_jwks(foreign, {"e": new})
    assert ask(foreign, signed(new)) == 401
    issuer.refresh()
    assert (ask(foreign, signed(new)), ask(foreign, signed(provider["e"]))) == (200, 401)
    (foreign.keys.folder / "jwks.json").write_text("[")
    issuer.refresh()
    assert ask(foreign, signed(new)) == 200


def test_a_token_of_our_own_counts_beside_an_identity_providers(foreign):
    assert ask(foreign, Tokens(foreign.keys).add("alice", [], [Verb.PREDICT], None, None)) == 200
    with pytest.raises(ValueError, match="access is `tokens` only"):
        Serve(jwt=Jwt(issuer=ISSUER, audience=AUDIENCE, keys="jwks.json"))


def test_who_may_deploy_is_asked_to_the_token_and_what_he_did_is_written_down(room, tokens):
    room.add("pets", TENSOR, [[2, 0], [0, 2]])
    room.follow()
    of = {verb: tokens.add(verb, ["pets"], [verb], None, None) for verb in (Verb.PREDICT, Verb.DEPLOY, Verb.PROMOTE, Verb.READ)}
    judged, at_once = b'{"version": 1, "percent": 20}', b'{"version": 1, "percent": 100}'

    def deploy(verb: Verb | None, body: bytes, path: str = f"{PETS}:deploy") -> int:
        return ask(room, of[verb] if verb else None, path, body)

    assert [deploy(verb, judged) for verb in (None, Verb.PREDICT, Verb.READ, Verb.PROMOTE)] == [401, 403, 403, 403]
    assert deploy(Verb.DEPLOY, judged, "/v1/models/cats:deploy") == 403
    assert deploy(Verb.DEPLOY, at_once) == 403
    assert room.registry.state("pets").rollout is None
    assert deploy(Verb.DEPLOY, judged) == 200
    assert room.registry.state("pets").rollout.percent == 20
    assert deploy(Verb.PROMOTE, at_once) == 200
    assert deploy(Verb.PROMOTE, at_once) == 409  # it is in production already
    assert room.registry.resolve("pets") == 1
    assert deploy(Verb.PROMOTE, b'{"version": 9, "percent": 100}') == 409
    assert [deploy(Verb.DEPLOY, body) for body in (b"", b"[]", b'{"version": 0}', b'{"percent": 0}', b'{"x": 1}')] == [400] * 5
    answer = room.request(Request("GET", f"{PETS}/rollout", authorization=f"Bearer {of[Verb.READ]}"))
    assert json.loads(answer.body)["aliases"] == {"production": 1}
    lines = [json.loads(line) for line in Audit(room.keys).file.read_text().splitlines()]
    done = [(line["of"], line["token"], line["percent"]) for line in lines if line["what"] == "deploy"]
    assert done == [("pets@1", "deploy", 20.0), ("pets@1", "promote", 100.0)]


def test_a_version_that_failed_its_gates_is_deployed_by_force_and_that_is_written_down(room, tokens):
    room.add("pets", TENSOR, [[2, 0], [0, 2]], failed=("accuracy is 0.5, >= 0.9 is required",))
    room.follow()
    of = {verb: tokens.add(verb, ["pets"], [verb], None, None) for verb in (Verb.DEPLOY, Verb.PROMOTE)}
    version = max(room.registry.versions("pets"))

    def deploy(verb: Verb, **wanted) -> int:
        return ask(room, of[verb], f"{PETS}:deploy", json.dumps({"version": version, **wanted}).encode())

    assert deploy(Verb.DEPLOY, percent=20) == 409
    assert deploy(Verb.PROMOTE, percent=100) == 409
    assert deploy(Verb.DEPLOY, percent=20, force=True) == 403
    assert deploy(Verb.PROMOTE, percent=100, force=True) == 200
    assert room.registry.resolve("pets") == version
    lines = [json.loads(line) for line in Audit(room.keys).file.read_text().splitlines()]
    assert [line["forced"] for line in lines if line["what"] == "deploy"] == ["accuracy is 0.5, >= 0.9 is required"]


def test_an_endpoint_that_is_open_takes_no_deployment(tmp_path):
    room = Room(tmp_path)
    room.add("pets", TENSOR, [[1, 0], [0, 1]])
    room.follow()
    assert ask(room, None, f"{PETS}:deploy", b'{"version": 1, "percent": 100}') == 403
    assert room.registry.state("pets").aliases == {}


def test_a_role_is_asked_for_once_somebody_has_it(room, tokens, monkeypatch):
    monkeypatch.delenv("HELIOGRAPH_TOKEN", raising=False)
    assert require_role(room.keys, Verb.TRAIN, "pets") == ""
    trainer = tokens.add("ann", ["pets"], [Verb.TRAIN], None, None)
    with pytest.raises(AccessError, match="train pets: needs a token for it in HELIOGRAPH_TOKEN"):
        require_role(room.keys, Verb.TRAIN, "pets")
    monkeypatch.setenv("HELIOGRAPH_TOKEN", trainer)
    assert require_role(room.keys, Verb.TRAIN, "pets") == "ann"
    with pytest.raises(AccessError):
        require_role(room.keys, Verb.TRAIN, "cats")
    assert require_role(room.keys, Verb.DEPLOY, "cats") == ""
    assert [json.loads(line)["what"] for line in Audit(room.keys).file.read_text().splitlines()][-1] == "refused"
