"""Local mode: on loopback, and nothing left behind."""

import os
import socket
import subprocess
import sys

import pytest
from heliograph.cluster import haproxy
from heliograph.cluster.runtime import PREFIX, TEMP, explained, keep_on_loopback, sweep
from heliograph.cluster.storage import publish_folder, write_bytes
from heliograph.errors import CapsuleError, DataError, HeliographError, RequestError


def test_a_socket_that_listens_everywhere_is_tied_to_loopback():
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as here:
        keep_on_loopback()
        assert everywhere.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"
        assert here.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16) == b""
        with socket.create_connection(("127.0.0.1", everywhere.getsockname()[1]), timeout=5) as caller:
            assert caller.getpeername()[0] == "127.0.0.1"


def test_haproxys_wildcard_binds_become_loopback_and_no_other_line_changes(tmp_path):
    config = "frontend a\n    bind :9101\nfrontend b\n  bind *:8404\nfrontend c\n    bind 127.0.0.1:8000\n    log x:514\n"
    edited = haproxy.WILDCARD_BIND.sub(r"\g<1>127.0.0.1:", config)
    assert edited.splitlines() == [
        "frontend a",
        "    bind 127.0.0.1:9101",
        "frontend b",
        "  bind 127.0.0.1:8404",
        "frontend c",
        "    bind 127.0.0.1:8000",
        "    log x:514",
    ]
    haproxy.write_launcher(tmp_path / "haproxy")
    done = subprocess.run([tmp_path / "haproxy", "-v"], capture_output=True, text=True, check=False, cwd="/")
    assert "HAProxy version" in done.stdout, done.stderr


def test_folders_of_killed_heliographs_are_swept_and_those_of_living_ones_are_not():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale, alive = TEMP / f"{PREFIX}{dead.pid}-test", TEMP / f"{PREFIX}{os.getpid()}-test"
    for folder in (stale, alive):
        folder.mkdir()
    sweep()
    assert not stale.exists()
    assert alive.exists()
    alive.rmdir()


def test_the_users_mistake_is_found_inside_what_ray_raised():
    mistake = DataError("column `a`: empty")
    try:
        try:
            raise mistake
        except DataError as inner:
            raise RuntimeError("task failed") from inner
    except RuntimeError as outer:
        wrapped = outer
    assert explained(wrapped) is mistake
    assert explained(mistake) is mistake
    flattened = explained(RuntimeError("worker failed:\n  File x\nheliograph.errors.DataError: column `a`: empty\n\nmore text"))
    assert type(flattened) is DataError
    assert str(flattened) == str(mistake)
    assert explained(ValueError("a bug")) is None


@pytest.mark.parametrize("error", [DataError("text"), RequestError("text", 404), CapsuleError("text")])
def test_errors_survive_the_way_out_of_a_worker(error):
    import pickle

    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == "text"
    assert getattr(again, "status", None) == getattr(error, "status", None)
    assert isinstance(again, HeliographError)


def test_a_folder_is_published_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), publish_folder(tmp_path / "out") as aside:
        (aside / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with publish_folder(tmp_path / "out") as aside:
        (aside / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
