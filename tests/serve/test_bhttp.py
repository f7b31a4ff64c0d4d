"""Binary HTTP (RFC 9292): both framings are read, and nothing that is malformed gets through."""

import json

import pytest
from heliograph.errors import CapsuleError
from heliograph.serve import bhttp
from heliograph.serve.bhttp import Request, Response
from hypothesis import given
from hypothesis import strategies as st

from ..conftest import VECTORS

words = st.binary(max_size=200)
names = st.binary(min_size=1, max_size=20).filter(lambda name: not name.startswith(b":"))
fields = st.lists(st.tuples(names, words), max_size=4)


@given(words, words, words, words, fields, st.binary(max_size=70_000))
def test_a_request_comes_back_as_it_was(method, scheme, authority, path, found, content):
    request = Request(method, scheme, authority, path, found, content)
    assert bhttp.decode_request(bhttp.encode_request(request)) == request


@given(st.integers(200, 599), fields, st.binary(max_size=70_000))
def test_a_response_comes_back_as_it_was(status, found, content):
    response = Response(status, found, content)
    assert bhttp.decode_response(bhttp.encode_response(response)) == response


def test_the_indeterminate_framing_is_read_and_informational_responses_are_passed_over():
    request = b"\x02\x04POST\x05https\x01a\x01/" + b"\x01n\x01v\x00" + b"\x03abc\x02de\x00" + b"\x00"
    assert bhttp.decode_request(request) == Request(b"POST", b"https", b"a", b"/", [(b"n", b"v")], b"abcde")
    response = b"\x03" + b"\x40\x66\x01n\x01v\x00" + b"\x40\xc8\x00" + b"\x02ok\x00" + b"\x00"
    assert bhttp.decode_response(response) == Response(200, [], b"ok")


def test_empty_ends_may_be_left_out_and_zeros_may_pad():
    short = b"\x00\x03GET\x05https\x01a\x01/"
    whole = Request(b"GET", b"https", b"a", b"/")
    assert bhttp.decode_request(short) == whole
    assert bhttp.decode_request(bhttp.encode_request(whole) + bytes(100)) == whole
    with pytest.raises(CapsuleError):
        bhttp.decode_request(bhttp.encode_request(whole) + b"\0\1")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_capsule_error(data):
    for decode, encode in ((bhttp.decode_request, bhttp.encode_request), (bhttp.decode_response, bhttp.encode_response)):
        try:
            found = decode(data)
        except CapsuleError:
            continue
        assert decode(encode(found)) == found


def test_a_truncated_request_is_refused_but_at_the_end_of_a_section():
    control = b"\x00" + b"\x04POST" + b"\x04http" + b"\x01h" + b"\x02/p"
    fields, content = b"\x04\x01a\x01b", b"\x07content"
    sections = {len(control), len(control + fields), len(control + fields + content)}
    message = control + fields + content + b"\x00"
    for cut in set(range(len(message))) - sections:
        with pytest.raises(CapsuleError):
            bhttp.decode_request(message[:cut])
    for cut in sections:  # RFC 9292, section 3.8: what would be empty may be left out
        assert bhttp.decode_request(message[:cut]).path == b"/p"


def test_the_standards_own_examples():
    """RFC 9292, section 5."""
    found = json.loads((VECTORS / "rfc9292.json").read_text())
    vector = {name: bytes.fromhex(value) for name, value in found.items() if name != "source"}
    fields = [
        (b"user-agent", b"curl/7.16.3 libcurl/7.16.3 OpenSSL/0.9.7l zlib/1.2.3"),
        (b"host", b"www.example.com"),
        (b"accept-language", b"en, mi"),
    ]
    request = bhttp.Request(b"GET", b"https", b"", b"/hello.txt", fields)
    assert bhttp.encode_request(request) == vector["known_request"]
    for message, removable in ((vector["known_request"], 2), (vector["indeterminate_request"], 12)):
        for cut in range(removable + 1):
            assert bhttp.decode_request(message[: len(message) - cut]) == request
    answer = bhttp.decode_response(vector["indeterminate_response"])
    assert (answer.status, answer.content) == (200, b"Hello World! My content includes a trailing CRLF.\r\n")
    assert [name for name, _ in answer.fields][:3] == [b"date", b"server", b"last-modified"]
    answer = bhttp.decode_response(vector["known_response"])
    assert (answer.status, answer.fields, answer.content) == (200, [], b"This content contains CRLF.\r\n")
