"""Who did what stays written: whatever is done to a line is found."""

import json
import subprocess
import sys

import pytest
from heliograph.cluster.audit import Audit
from heliograph.cluster.keys import KeyStore
from heliograph.errors import AuditError


@pytest.fixture
def audit(tmp_path) -> Audit:
    audit = Audit(KeyStore(tmp_path / "keys"))
    for i in range(5):
        audit.write("deploy", f"pets@{i}", percent=10.0)
    return audit


def test_a_line_says_who_did_what(audit):
    lines = [json.loads(line) for line in audit.file.read_text().splitlines()]
    assert [line["of"] for line in lines] == [f"pets@{i}" for i in range(5)]
    assert all(line["what"] == "deploy" and line["percent"] == 10 and line["who"] and line["time"] > 0 for line in lines)
    assert audit.verify() == (5, lines[-1]["mac"])


@pytest.mark.parametrize(
    ("change", "at"),
    [
        (lambda lines: [*lines[:2], lines[2].replace(b"pets@2", b"pets@9"), *lines[3:]], 3),
        (lambda lines: lines[1:], 1),
        (lambda lines: lines[:2] + lines[3:], 3),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: lines[:3] + lines[2:], 4),
        (lambda lines: [*lines, b'{"what": "deploy"}'], 6),
        (lambda lines: [*lines[:4], b"not JSON"], 5),
        (lambda lines: [*lines[:4], lines[4][:40]], 5),
        (lambda lines: [*lines, b"[1]"], 6),
    ],
)
def test_what_is_changed_left_out_moved_or_added_is_found_where_it_is(audit, change, at):
    audit.file.write_bytes(b"\n".join(change(audit.file.read_bytes().splitlines())) + b"\n")
    with pytest.raises(AuditError, match=rf"audit\.jsonl: line {at} was changed"):
        audit.verify()


def test_a_log_that_was_cut_or_written_anew_is_found_by_what_was_noted(audit, tmp_path):
    count, mac = audit.verify()
    audit.write("serve", "pets")
    assert audit.verify(count, mac)[0] == 6
    lines = audit.file.read_bytes().splitlines(keepends=True)
    audit.file.write_bytes(b"".join(lines[:3]))
    assert audit.verify()[0] == 3
    with pytest.raises(AuditError, match="its end was cut off"):
        audit.verify(count, mac)
    for i in range(3):
        audit.write("deploy", f"other@{i}")
    with pytest.raises(AuditError, match="was written anew"):
        audit.verify(count, mac)
    audit.file.unlink()
    with pytest.raises(AuditError, match="is gone"):
        audit.verify(count, mac)


def test_another_key_verifies_nothing(audit, tmp_path):
    stranger = Audit(KeyStore(tmp_path / "other"))
    stranger.write("deploy", "pets@1")
    audit.file.write_bytes(stranger.file.read_bytes())
    with pytest.raises(AuditError, match="line 1 was changed"):
        audit.verify()


WRITER = """
import sys
from heliograph.cluster.audit import Audit
from heliograph.cluster.keys import KeyStore
for _ in range(50):
    Audit(KeyStore(sys.argv[1])).write("refused", "pets", status=401, count=1)
"""


def test_many_processes_write_one_chain(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "keys"]) for _ in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert Audit(KeyStore(tmp_path / "keys")).verify()[0] == 200


def test_a_line_that_a_full_disk_cut_short_ends_no_chain_but_is_found(audit):
    whole = audit.file.read_bytes()
    audit.file.write_bytes(whole[:-20])
    audit.write("serve", "pets")
    assert len(audit.file.read_bytes().splitlines()) == 6
    with pytest.raises(AuditError, match="line 5 was changed"):
        audit.verify()


def test_a_log_that_cannot_be_written_stops_what_must_be_in_it(tmp_path):
    audit = Audit(KeyStore(tmp_path / "keys"))
    audit.file.mkdir(parents=True)
    with pytest.raises(AuditError, match="cannot be written"):
        audit.write("deploy", "pets@1")
    audit.write("refused", "pets", must=False)
