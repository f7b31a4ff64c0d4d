"""Local mode: on loopback, and nothing left behind."""

import contextlib
import logging
import os
import py_compile
import socket
import subprocess
import sys
import time

import psutil
import pytest
from heliograph.cluster import bytecode, haproxy
from heliograph.cluster.runtime import (
    PORTS,
    PREFIX,
    TEMP,
    environment,
    explained,
    free_port,
    keep_on_loopback,
    quieten,
    reserve,
    sweep,
)
from heliograph.cluster.storage import publish_folder, write_bytes
from heliograph.errors import CapsuleError, DataError, HeliographError, RequestError


def test_a_socket_that_listens_everywhere_is_tied_to_loopback():
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as here:
        keep_on_loopback()
        assert everywhere.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"
        assert here.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16) == b""
        with socket.create_connection(("127.0.0.1", everywhere.getsockname()[1]), timeout=5) as caller:
            assert caller.getpeername()[0] == "127.0.0.1"


def test_what_ray_says_is_in_the_log_and_not_among_our_results(cluster, tmp_path, capsys):
    from ray._private.utils import push_error_to_driver
    from ray._private.worker import global_worker

    log = logging.FileHandler(tmp_path / "run.log")
    logging.getLogger("ray").addHandler(log)
    try:
        quieten()
        push_error_to_driver(global_worker, "infeasible", "there are tasks that no node can run")
        logging.getLogger("ray.serve").warning("a replica is gone")
        end = time.monotonic() + 60
        while "no node" not in (tmp_path / "run.log").read_text() and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        logging.getLogger("ray").removeHandler(log)
        log.close()
    said = (tmp_path / "run.log").read_text()
    assert "there are tasks that no node can run" in said
    assert "a replica is gone" in said
    assert capsys.readouterr() == ("", "")


def test_haproxys_wildcard_binds_become_loopback_and_no_other_line_changes(tmp_path):
    config = "frontend a\n    bind :9101\nfrontend b\n  bind *:8404\nfrontend c\n    bind 127.0.0.1:8000\n    log x:514\n"
    assert haproxy.edited(config).splitlines() == [
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


def test_no_two_heliographs_have_a_port_in_common(tmp_path):
    first, held = reserve()
    with held, socket.create_server(("127.0.0.1", first + PORTS)):  # the range after it has another's
        here = (
            f"from heliograph.cluster.runtime import reserve; import os; os.getpid = lambda: {os.getpid()}; print(reserve()[0])"
        )
        other = int(subprocess.run([sys.executable, "-c", here], check=True, capture_output=True, text=True).stdout)
        assert other not in (first, first + PORTS)
    again, held = reserve()
    held.close()
    assert again == first
    given = environment(tmp_path, "token", first)
    of_serve = {name: int(value) for name, value in given.items() if name.startswith("RAY_SERVE_") and name.endswith("_PORT")}
    assert len(of_serve) == 6 and len(set(of_serve.values())) == 6
    assert set(of_serve.values()) <= set(range(first, first + PORTS))


def test_processes_share_compiled_modules_where_none_are_kept_beside_the_sources(tmp_path, monkeypatch):
    (tmp_path / "often").mkdir()
    source = tmp_path / "often" / "__init__.py"
    source.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bytecode, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert bytecode.variables("often") == {}  # as usual: Python keeps them itself
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    given = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | bytecode.variables("often")
    subprocess.run([sys.executable, "-c", "import often"], check=True, cwd=tmp_path, env=given)
    assert [file.name.split(".")[0] for file in (tmp_path / "cache").rglob("often/*.pyc")] == ["__init__"]
    assert list(source.parent.iterdir()) == [source]
    py_compile.compile(str(source))
    assert bytecode.variables("often") == {}  # compiled when it was installed


CONFIG = """global
    maxconn 10
defaults
    mode http
    timeout client 5s
frontend http_frontend
    bind 127.0.0.1:{port}
    http-request return status 200 content-type text/plain string "pid"
"""


def test_a_killed_haproxy_is_bridged_until_its_owner_ends(tmp_path):
    port, config = free_port(), tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(port=port))
    haproxy.write_launcher(tmp_path / "haproxy")
    owner = f"import subprocess; subprocess.run(['{tmp_path}/haproxy', '-db', '-f', '{config}']); input()"
    process = subprocess.Popen([sys.executable, "-c", owner], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as wire:
            wire.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return b" 200 " in wire.recv(100)
        return False

    def until(wanted: bool) -> None:
        end = time.monotonic() + 20
        while answers() != wanted:
            assert time.monotonic() < end
            time.sleep(0.05)

    try:
        until(True)
        (proxy,) = [p for p in psutil.Process(process.pid).children() if p.name() == "haproxy"]
        proxy.kill()
        until(True)
        assert config.with_suffix(".bridge.pid").exists()
    finally:
        process.kill()
        process.wait()
    until(False)
    assert not config.with_suffix(".bridge.pid").exists()


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


SLOW = """
import subprocess, sys
from heliograph.cluster.runtime import LocalCluster
from heliograph.errors import HeliographError
import psutil, ray
real, times = ray.init, int(sys.argv[1])

def slow(**options):
    global times
    times -= 1
    if times >= 0:
        subprocess.Popen(["sleep", "300"])
        raise Exception("The current node timed out during startup. This could happen because …")
    return real(**options)

ray.init = slow
with LocalCluster(1) as cluster:
    try:
        cluster.start()
        print(ray.get(ray.remote(lambda: "done").remote()))
    except HeliographError as error:
        print(error)
    print(sum(p.name() == "sleep" for p in psutil.Process().children()))
"""


@pytest.mark.parametrize(("times", "said"), [(1, "done"), (2, "this machine has too much to do now")])
def test_a_ray_that_starts_too_slowly_is_started_once_more(times, said):
    ran = subprocess.run([sys.executable, "-c", SLOW, str(times)], capture_output=True, text=True, check=False, timeout=200)
    lines = ran.stdout.splitlines()
    assert said in lines[0], ran.stderr
    assert lines[1] == "0"  # what the first try had started is gone
