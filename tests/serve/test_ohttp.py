"""Oblivious HTTP: the standard's own example, and nothing that was touched opens."""

import json
import os

import pytest
from heliograph.errors import CapsuleError
from heliograph.serve import bhttp, ohttp
from hypothesis import given, settings
from hypothesis import strategies as st
from pyhpke import AEADId

from ..conftest import VECTORS


@pytest.fixture(scope="module")
def vector() -> dict[str, bytes]:
    """RFC 9458, Appendix A."""
    found = json.loads((VECTORS / "rfc9458.json").read_text())
    return {name: bytes.fromhex(value) for name, value in found.items() if name != "source"}


def test_the_standards_key_configuration_is_read_and_written(vector):
    listed = len(vector["key_config"]).to_bytes(2, "big") + vector["key_config"]
    (config,) = ohttp.decode_configs(listed)
    assert config.key_id == 1
    assert config.public_key == ohttp.public_key(vector["private_key"])
    assert config.aeads == (AEADId.AES128_GCM, AEADId.CHACHA20_POLY1305)
    assert ohttp.encode_configs([config]) == listed


def test_the_standards_request_opens(vector):
    message, _ = ohttp.Gateway({1: vector["private_key"]}).open_request(vector["encapsulated_request"])
    assert message == vector["request"]
    assert bhttp.decode_request(message) == bhttp.Request(b"GET", b"https", b"example.com", b"/")


def test_the_standards_response_is_sealed_to_the_byte(vector, monkeypatch):
    _, seal = ohttp.Gateway({1: vector["private_key"]}).open_request(vector["encapsulated_request"])
    monkeypatch.setattr(ohttp.secrets, "token_bytes", lambda size: vector["response_nonce"][:size])
    assert seal(vector["response"]) == vector["encapsulated_response"]
    assert bhttp.decode_response(vector["response"]).status == 200


def with_ephemeral_key(private: bytes, monkeypatch) -> None:
    """Requests are sealed with this key for once, and not with one that is drawn."""
    from pyhpke import CipherSuite, KEMKeyPair

    real = CipherSuite.create_sender_context

    def create(suite, pkr, info=b"", **_):
        secret = suite.kem.deserialize_private_key(private)
        public = suite.kem.deserialize_public_key(ohttp.public_key(private))
        return real(suite, pkr, info, eks=KEMKeyPair(secret, public))

    monkeypatch.setattr(CipherSuite, "create_sender_context", create)


def test_the_standards_request_is_made_to_the_byte_and_its_response_opens(vector, monkeypatch):
    with_ephemeral_key(vector["ephemeral_private_key"], monkeypatch)
    listed = len(vector["key_config"]).to_bytes(2, "big") + vector["key_config"]
    capsule, open_answer = ohttp.seal_request(vector["request"], ohttp.decode_configs(listed)[0])
    assert capsule == vector["encapsulated_request"]
    assert open_answer(vector["encapsulated_response"]) == vector["response"]


PRIVATE = bytes(range(1, 33))
GATEWAY = ohttp.Gateway({7: PRIVATE})
CONFIG = ohttp.KeyConfig(7, ohttp.public_key(PRIVATE))


@pytest.mark.parametrize("aead", list(ohttp.AEADS))
@pytest.mark.parametrize("size", [0, 1, 3000, 1 << 20])
def test_a_request_and_its_answer_go_there_and_back(aead, size):
    message, answer = os.urandom(size), os.urandom(size)
    capsule, open_answer = ohttp.seal_request(message, ohttp.KeyConfig(7, CONFIG.public_key, (aead,)))
    assert len(capsule) == size + 55
    opened, seal = GATEWAY.open_request(capsule)
    assert opened == message
    assert open_answer(seal(answer)) == answer


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_touched_capsule_is_refused_and_always_alike(data):
    capsule, _ = ohttp.seal_request(b"a request", CONFIG)
    at = data.draw(st.integers(0, len(capsule) - 1))
    mutated = data.draw(
        st.sampled_from(
            [
                capsule[:at] + bytes([capsule[at] ^ data.draw(st.integers(1, 255))]) + capsule[at + 1 :],
                capsule[:at],
                capsule + b"\0",
                capsule[at:] + capsule[:at] if at else capsule[1:],
            ]
        )
    )
    with pytest.raises(CapsuleError) as caught:
        GATEWAY.open_request(mutated)
    assert str(caught.value) == "the encapsulated request cannot be opened: fetch the key configuration again"


def test_another_models_key_opens_nothing():
    capsule, _ = ohttp.seal_request(b"a request", CONFIG)
    with pytest.raises(CapsuleError):
        ohttp.Gateway({7: bytes(range(2, 34))}).open_request(capsule)


def test_the_answer_to_another_request_does_not_open():
    _, open_first = ohttp.seal_request(b"first", CONFIG)
    second, _ = ohttp.seal_request(b"second", CONFIG)
    _, seal = GATEWAY.open_request(second)
    for answer in (seal(b"answer"), b"", b"short"):
        with pytest.raises(CapsuleError):
            open_first(answer)


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\5abc", b"\0\3" + b"\1\0\x20", bytes(60)])
def test_a_broken_key_configuration_is_refused(data):
    with pytest.raises(CapsuleError):
        ohttp.decode_configs(data)


@pytest.fixture(scope="module")
def chunked() -> dict[str, bytes]:
    """draft-ietf-ohai-chunked-ohttp-08, Appendix A; pieces joined."""
    found = json.loads((VECTORS / "chunked_ohttp_08.json").read_text())
    return {name: bytes.fromhex("".join(value)) for name, value in found.items() if name != "source"}


def test_the_drafts_chunked_request_opens(chunked):
    gateway = ohttp.Gateway({1: chunked["private_key"]})
    message, _ = gateway.open_request(chunked["encapsulated_request"], chunked=True)
    assert message == chunked["request"]
    with pytest.raises(CapsuleError):
        gateway.open_request(chunked["encapsulated_request"])


def test_the_drafts_chunked_response_opens(chunked, monkeypatch):
    with_ephemeral_key(chunked["ephemeral_private_key"], monkeypatch)
    (config,) = ohttp.decode_configs(len(chunked["key_config"]).to_bytes(2) + chunked["key_config"])
    _, open_answer = ohttp.seal_request(chunked["request"], config, chunked=True)
    assert open_answer(chunked["encapsulated_response"]) == chunked["response_chunks"]


@pytest.mark.parametrize("size", [0, 1, ohttp.CHUNK, ohttp.CHUNK + 1, 3 * ohttp.CHUNK])
def test_what_is_sealed_in_pieces_opens_in_their_order_only(size):
    message = os.urandom(size)
    capsule, open_answer = ohttp.seal_request(message, CONFIG, chunked=True)
    opened, seal = GATEWAY.open_request(capsule, chunked=True)
    answer = seal(message)
    assert opened == message == open_answer(answer)
    piece = ohttp.CHUNK + 16 + 4  # with its tag and its length
    for data, head, opens in ((capsule, 39, lambda d: GATEWAY.open_request(d, chunked=True)), (answer, 16, open_answer)):
        body = data[head:]
        wrong = [data[:-1], data + b"\0"]
        if size > ohttp.CHUNK:
            wrong += [data[:head] + body[piece:], data[:head] + body[:piece] + body, data[: head + piece]]
        if size == 3 * ohttp.CHUNK:
            wrong.append(data[:head] + body[piece : 2 * piece] + body[:piece] + body[2 * piece :])
        for changed in wrong:
            with pytest.raises(CapsuleError):
                opens(changed)
