"""Keys of sealed requests come, are offered, grow old and go, and no request fails for it."""

import json
import os
import random
import time
from email.utils import formatdate

import httpx
import pytest
from heliograph import Client
from heliograph.cluster.keys import request_key
from heliograph.errors import CapsuleError, RequestError, SignatureError
from heliograph.serve import bhttp, ohttp
from heliograph.serve.application import KEY_PROBLEM
from heliograph.serve.client import check_signature

from .served import TENSOR, Room

PETS = "/v1/models/pets"
KEY = request_key("pets")


@pytest.fixture
def room(tmp_path):
    room = Room(tmp_path, key_grace_seconds=60)
    room.add("pets", TENSOR, [[1, 0], [0, 1]])
    room.follow()
    return room


def another(room: Room, **options) -> Room:
    """A second replica: the same registry and key store."""
    other = Room(room.folder, **{"key_grace_seconds": 60, **options})
    other.follow()
    return other


def config(room: Room, place: str = PETS) -> ohttp.KeyConfig:
    return ohttp.decode_configs(room.ask("GET", f"{place}/ohttp-keys").body)[0]


def sealed(key: ohttp.KeyConfig, place: str = PETS, rows=((1, 2),)):
    body = json.dumps({"instances": list(rows)}).encode()
    request = bhttp.Request(b"POST", b"http", b"x", f"{place}:predict".encode(), [], body)
    return ohttp.seal_request(bhttp.padded(bhttp.encode_request(request)), key)


def status(room: Room, key: ohttp.KeyConfig, place: str = PETS, inside: str | None = None) -> int | None:
    """Of the answer inside; None where the capsule was not opened."""
    capsule, open_answer = sealed(key, inside or place)
    answer = room.ask("POST", f"{place}:predict", capsule, ohttp.REQUEST_TYPE)
    if answer.status != 200:
        assert (answer.status, answer.body) == (400, KEY_PROBLEM)
        return None
    return bhttp.decode_response(open_answer(answer.body)).status


def age(room: Room, version: int, seconds: float) -> None:
    """As if a key had been made so long ago."""
    file = room.keys.folder / f"{KEY}-{version}.key"
    os.utime(file, (time.time() - seconds,) * 2)


def test_a_replica_opens_what_was_sealed_with_a_key_that_only_another_has_offered(room):
    other = another(room)
    old = config(room)
    room.keys.rotate(KEY)
    new = config(other)
    assert new.key_id != old.key_id
    assert status(room, new) == status(room, old) == status(other, old) == 200


def test_an_older_key_opens_for_its_grace_and_no_longer(room):
    old = config(room)
    room.keys.rotate(KEY)
    age(room, 2, 59)
    late = another(room)
    assert status(late, old) == 200
    age(room, 2, 61)
    assert status(another(room), old) is None
    assert status(another(room), config(room)) == 200


def test_a_replica_lets_go_of_a_key_by_itself_when_its_grace_ends(room):
    brief = another(room, key_grace_seconds=0.5)
    old = config(brief)
    room.keys.rotate(KEY)
    new = config(brief)
    assert status(brief, old) == 200
    time.sleep(0.6)
    assert status(brief, old) is None
    assert status(brief, new) == 200


def test_a_key_that_was_retired_opens_nothing_from_then_on(room):
    old = config(room)
    room.keys.rotate(KEY)
    room.keys.retire(KEY)
    room.follow()
    assert status(room, old) is None


def test_a_key_belongs_to_one_version_or_to_whichever_is_in_production(room):
    room.add("pets", TENSOR, [[2, 0], [0, 2]])
    places = [PETS, f"{PETS}/versions/1", f"{PETS}/versions/2"]
    keys = [config(room, place) for place in places]
    assert len({key.public_key for key in keys}) == 3
    for i, key in enumerate(keys):
        assert [status(room, key, place) for place in places] == [200 if i == j else None for j in range(3)]
    assert status(room, keys[1], places[1], inside=places[2]) == 404
    assert room.ask("GET", f"{PETS}/versions/9/ohttp-keys").status == 404


def test_a_signature_is_bound_to_name_version_and_time(room, monkeypatch):
    answer = room.ask("GET", f"{PETS}/ohttp-keys")
    public, signature = room.keys.public_key(), answer.headers[ohttp.SIGNATURE_HEADER]
    check_signature(public, "pets", None, answer.body, signature)
    later = str(int(signature.split()[0]) + 1) + signature[signature.index(" ") :]
    for model, version, text in (("other", None, signature), ("pets", 1, signature), ("pets", None, later), ("pets", None, "")):
        with pytest.raises(SignatureError, match="is not signed by"):
            check_signature(public, model, version, answer.body, text)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 62)
    with pytest.raises(SignatureError, match="has expired"):
        check_signature(public, "pets", None, answer.body, signature)


def test_the_length_of_a_capsule_and_of_its_answer_do_not_tell_the_rows(room):
    key, lengths = config(room), set()
    for rows in (((0, 0),), ((0.123456789, -1e-30),), tuple((i / 7, i) for i in range(8))):
        capsule, open_answer = sealed(key, rows=rows)
        answer = room.ask("POST", f"{PETS}:predict", capsule, ohttp.REQUEST_TYPE)
        assert len(json.loads(bhttp.decode_response(open_answer(answer.body)).content)["predictions"]) == len(rows)
        lengths.add((len(capsule), len(answer.body)))
    assert len(lengths) == 1


@pytest.mark.parametrize("size", [1, 511, 512, 513, 3000, 16384, 16385, 100_000, 16 << 20])
def test_padding_costs_less_than_what_is_padded(size):
    length = len(bhttp.padded(b"x" * size))
    assert size <= length <= max(512, 2 * size if size <= 16384 else size * 9 / 8)
    assert length == len(bhttp.padded(b"x" * length))


def test_an_endpoint_that_takes_no_sealed_requests_says_so(room):
    closed = another(room, encrypted="off")
    capsule, _ = sealed(config(room))
    assert closed.ask("POST", f"{PETS}:predict", capsule, ohttp.REQUEST_TYPE).status == 415
    assert closed.ask("POST", f"{PETS}:predict", b'{"instances": [[1, 2]]}').status == 200
    with talk(Client, closed) as client, pytest.raises(RequestError, match="takes no encapsulated requests"):
        client.predict([[1, 2]])


def talk(kind, *rooms: Room) -> Client:
    """A client of these replicas, any of which gets a request."""

    def handle(request: httpx.Request) -> httpx.Response:
        room = random.choice(rooms)
        media = request.headers.get("content-type", "")
        answer = room.ask(request.method, request.url.path, request.content, media)
        return httpx.Response(answer.status, content=answer.body, headers={"content-type": answer.type, **answer.headers})

    client = kind("http://x", "pets", trust=rooms[0].keys.public_key())
    client._http = httpx.Client(transport=httpx.MockTransport(handle))
    return client


def test_a_client_never_fails_while_keys_are_rotated_under_it(room):
    replicas = [another(room, key_grace_seconds=0.2) for _ in range(3)]
    with talk(Client, *replicas) as client:
        for i in range(300):
            if i % 10 == 5:
                room.keys.rotate(KEY)
            if i % 100 == 50:
                time.sleep(0.3)  # the key that the client holds grows too old
            assert client.predict([[i, 1]]) == [[i, 1]]
    assert len(room.keys.versions(KEY)) == 31


def test_a_stolen_offer_for_another_model_is_not_believed(room):
    room.add("cats", TENSOR, [[1, 0], [0, 1]])
    room.follow()
    stolen = room.ask("GET", "/v1/models/cats/ohttp-keys")
    client = Client("http://x", "pets", trust=room.keys.public_key())
    answer = httpx.Response(200, content=stolen.body, headers={**stolen.headers, "content-type": stolen.type})
    client._http = httpx.Client(transport=httpx.MockTransport(lambda request: answer))
    with client, pytest.raises(SignatureError, match="is not signed by"):
        client.predict([[1, 2]])


def test_no_changed_capsule_opens_and_all_get_one_answer(room):
    """`bench/privacy.py` does it a million times."""
    rng = random.Random(0)
    key = config(room)
    capsule, _ = sealed(key)
    other, _ = sealed(key)
    for _ in range(2000):
        changed = bytearray(capsule)
        match rng.randrange(4):
            case 0:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            case 1:
                del changed[rng.randrange(len(changed)) :]
            case 2:
                at = rng.randrange(20, len(changed))
                changed = changed[:at] + bytearray(other[at:])
            case 3:
                changed += rng.randbytes(rng.randrange(1, 40))
        answer = room.ask("POST", f"{PETS}:predict", bytes(changed), ohttp.REQUEST_TYPE)
        assert (answer.status, answer.type, answer.body) == (400, "application/problem+json", KEY_PROBLEM)


def test_an_answer_to_another_request_does_not_open(room):
    key = config(room)
    (first, _), (_, open_second) = sealed(key), sealed(key)
    answer = room.ask("POST", f"{PETS}:predict", first, ohttp.REQUEST_TYPE)
    with pytest.raises(CapsuleError, match="not the answer to this request"):
        open_second(answer.body)


def dated(key: ohttp.KeyConfig, seconds: float | None = 0.0):
    """A sealed request with a date so far from now."""
    fields = [] if seconds is None else [(b"date", formatdate(time.time() + seconds, usegmt=True).encode())]
    body = b'{"instances": [[1, 2]]}'
    return ohttp.seal_request(
        bhttp.encode_request(bhttp.Request(b"POST", b"http", b"x", f"{PETS}:predict".encode(), fields, body)), key
    )


def inside(room: Room, sealed_request) -> tuple[int, bytes]:
    capsule, open_answer = sealed_request
    answer = bhttp.decode_response(open_answer(room.ask("POST", f"{PETS}:predict", capsule, ohttp.REQUEST_TYPE).body))
    return answer.status, answer.content


@pytest.fixture
def once(room) -> list[Room]:
    """Two replicas that answer a sealed request once."""
    replicas = [another(room, replays="refused") for _ in range(2)]
    replicas[1].tally = replicas[0].tally
    return replicas


def test_a_repeated_capsule_is_answered_once_by_whichever_replica(room, once, monkeypatch):
    request = dated(config(room))
    assert [inside(replica, request)[0] for replica in (once[0], once[0], once[1])] == [200, 409, 409]
    assert inside(once[1], dated(config(room)))[0] == 200
    assert [inside(room, request)[0] for _ in range(2)] == [200, 200]  # who does not ask for it, has it not
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 130)
    assert once[0].tally.first(b"another")
    assert len(once[0].tally._answered) == 1


def test_a_capsule_that_was_not_answered_may_be_repeated(room, once, monkeypatch):
    """As a proxy does when a replica dies."""
    request = dated(config(room))
    with monkeypatch.context() as broken:
        broken.setattr(once[0].application, "_infer", None)
        assert inside(once[0], request)[0] == 500
    assert [inside(replica, request)[0] for replica in (once[1], once[0])] == [200, 409]


@pytest.mark.parametrize(
    ("seconds", "status"), [(0, 200), (-55, 200), (55, 200), (-65, 400), (65, 400), (None, 400), (10**9, 400)]
)
def test_a_sealed_request_needs_the_date_of_now(room, once, seconds, status):
    found, content = inside(once[0], dated(config(room), seconds))
    assert found == status
    assert (b"http-problem-types#date" in content) == (status == 400)


def test_a_client_whose_answer_got_lost_seals_anew(room, once):
    lost = [True]

    def handle(request: httpx.Request) -> httpx.Response:
        answer = once[0].ask(request.method, request.url.path, request.content, request.headers.get("content-type", ""))
        if answer.type == ohttp.RESPONSE_TYPE and lost:
            lost.clear()
            raise httpx.ReadError("the connection broke")
        return httpx.Response(answer.status, content=answer.body, headers={"content-type": answer.type, **answer.headers})

    with Client("http://x", "pets") as client:
        client._http = httpx.Client(transport=httpx.MockTransport(handle))
        assert client.predict([[1, 2]]) == [[1, 2]]
    assert not lost
