"""What serving does when things go wrong, or on and on; each part can be named alone.

    uv run --group bench python bench/serve_faults.py [faults] [overload] [hour]

faults: twelve connections ask for 2 rows at a time while replicas are killed (10 SIGKILLs), new versions are deployed (5),
the number of replicas goes from 1 to 4 and back, and the proxy is killed. Every answer must be 200, right, and wholly of
one version. Half the connections are urllib3's, which never repeats a request; the others are `heliograph.Client`s, one in
three sealed. While there is no proxy only those ask that repeat: nobody can answer the others.
overload: five times the requests that can be answered, for 60 seconds, of a model of some milliseconds a row.
hour: ten minutes of all kinds of requests, good ones and bad ones, at full speed; memory of the replica at every minute.
"""

import asyncio
import contextlib
import csv
import io
import json
import multiprocessing as mp
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import urllib3
import uvloop
from common import end, finish, publish
from heliograph.cluster.runtime import free_port
from heliograph.serve.client import Client

JSON = {"content-type": "application/json"}
WIDTH = 512
LAYERS = 20
"""Of work: about a millisecond."""


def add_version(folder: Path, version: int, layers: int = 0) -> None:
    """Sign a model into the registry that answers each of 2 numbers times `version`. layers: of work that changes nothing."""
    from onnx import TensorProto, helper, numpy_helper

    constants = [numpy_helper.from_array(np.eye(2, dtype=np.float32) * version, "w")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["scaled"])]
    if layers:
        wide = {"up": np.eye(2, WIDTH), "work": np.eye(WIDTH), "down": np.eye(WIDTH, 2)}
        constants += [numpy_helper.from_array(value.astype(np.float32), name) for name, value in wide.items()]
        steps = ["up", *["work"] * layers, "down"]
        nodes += [helper.make_node("MatMul", [f"h{i}" if i else "scaled", step], [f"h{i + 1}"]) for i, step in enumerate(steps)]
    nodes.append(helper.make_node("Identity", [nodes[-1].output[0]], ["y"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "m", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    publish(folder, "m", 2, 2, model.SerializeToString())


@contextlib.contextmanager
def serving(folder: Path, options: dict, layers: int = 0):
    """`heliograph serve` of a project with one version; yields (its process, its URL)."""
    options = {"port": free_port(), "engine": "onnx", **options}
    add_version(folder, 1, layers)
    project = {"name": "m", "data": {"source": "x.csv", "target": "y"}, "serve": options}
    (folder / "heliograph.yaml").write_text(json.dumps(project))
    url = f"http://127.0.0.1:{options['port']}"
    log = (folder / "serve.log").open("w")
    command = [sys.executable, "-m", "heliograph", "serve", str(folder)]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until(lambda: answers(url) or process.poll() is not None, 120, "an answer")
        assert process.poll() is None, log.name
        yield psutil.Process(process.pid), url
    finally:
        end(process, 40)
        log.close()


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/v2/health/ready").status_code == 200
    return False


def until(true: Callable[[], Any], seconds: float, what: str) -> float:
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            raise SystemExit(f"no {what} within {seconds:g} s")
        time.sleep(0.1)
    return time.monotonic() - began


def processes(root: psutil.Process, name: str) -> list[psutil.Process]:
    found = []
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def replicas(root: psutil.Process) -> list[psutil.Process]:
    return processes(root, "ray::ServeReplica:m")


def counted(url: str, name: str) -> float:
    """The sum of a metric over its labels."""
    page = httpx.get(f"{url}/metrics").text
    return sum(float(line.split()[-1]) for line in page.splitlines() if re.match(rf"{name}[ {{]", line))


# faults


def checked(body: bytes, rows: list[list[float]]) -> int:
    """The version that answered; raises where the answer is not wholly one version's."""
    found = json.loads(body)["predictions"]
    version = round(found[0][0] / rows[0][0])
    assert np.allclose(found, np.array(rows) * version, rtol=1e-5), (found, rows)
    return version


def ask(kind: str, url: str, number: int, wanted: Any, plain_may: Any, stop: Any, told: Any) -> None:
    """One connection's life. wanted: connections that are to ask now. told: gets (kind, what was answered, failures)."""
    counts, failures = Counter(), []
    pool = urllib3.PoolManager(retries=False, maxsize=1)
    client = Client(url, "m", encrypt=kind == "sealed")
    draw = np.random.default_rng(number)
    while not stop.is_set():
        if number >= wanted.value or (kind == "urllib3" and not plain_may.is_set()):
            time.sleep(0.05)
            continue
        if wanted.value == 1:
            time.sleep(0.05)  # the quiet before and after
        rows = [[float(v) for v in row] for row in draw.integers(1, 1000, (2, 2))]
        try:
            if kind == "urllib3":
                path = f"{url}/v1/models/m:predict"
                answer = pool.request("POST", path, body=json.dumps({"instances": rows}), headers=JSON)
                assert answer.status == 200, (answer.status, answer.data[:200])
                counts[checked(answer.data, rows)] += 1
            else:
                counts[checked(json.dumps({"predictions": client.predict(rows)}).encode(), rows)] += 1
        except Exception as error:
            failures.append(f"{time.strftime('%X')} {kind}: {type(error).__name__}: {error}"[:300])
    told.put((kind, dict(counts), failures))


KINDS = ["urllib3", "client"] * 4 + ["urllib3", "sealed"] * 2


def faults(folder: Path) -> dict[str, Any]:
    scale = {"min": 1, "max": 4, "target": 0.1, "up_seconds": 2, "down_seconds": 6}
    spawn = mp.get_context("spawn")
    wanted, plain_may, stop, told = spawn.Value("i", 1), spawn.Event(), spawn.Event(), spawn.Queue()
    plain_may.set()
    with serving(folder, {"replicas": scale, "cpus": 0.25}, LAYERS) as (root, url):
        began = time.monotonic()

        def say(text: str) -> None:
            print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

        asking = [
            spawn.Process(target=ask, args=(kind, url, i, wanted, plain_may, stop, told), daemon=True)
            for i, kind in enumerate(KINDS)
        ]
        for process in asking:
            process.start()
        time.sleep(5)
        say(f"{len(replicas(root))} replica for {wanted.value} connection")
        wanted.value = len(KINDS)
        up = until(lambda: len(replicas(root)) == 4 and counted(url, "heliograph_replicas") == 4, 120, "4 replicas")
        say(f"4 replicas, {up:.1f} s after {len(KINDS)} connections came")
        for kill in range(10):
            known = replicas(root)
            known[kill % len(known)].kill()
            before = {p.pid for p in known}
            took = until(lambda: {p.pid for p in replicas(root)} - before, 90, "new replica")  # noqa: B023
            time.sleep(3)
            say(f"SIGKILL {kill + 1} of 10; another replica after {took:.1f} s")
        for version in range(2, 7):
            add_version(folder, version, LAYERS)
            rollout = ["--percent", "50", "--seconds", "4", "--requests", "100", "--wait"]
            command = [sys.executable, "-m", "heliograph", "deploy", f"m@{version}", "--project", str(folder), *rollout]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
            say((out.stdout + out.stderr).strip().splitlines()[-1])
        plain_may.clear()
        time.sleep(1)
        proxies = [p for p in processes(root, "haproxy") if p.name() == "haproxy"]
        max(proxies, key=lambda p: p.create_time()).kill()  # others end with their last connection
        took = until(lambda: answers(url), 60, "proxy")
        say(f"the proxy killed; answers again after {took:.1f} s")
        time.sleep(20)  # Ray's own proxy takes over from the bridge
        plain_may.set()
        time.sleep(10)
        say(f"{len(replicas(root))} replicas")
        wanted.value = 1
        down = until(lambda: len(replicas(root)) == 1, 180, "1 replica")
        say(f"1 replica, {down:.1f} s after all connections but one left")
        wanted.value = len(KINDS)
        until(lambda: counted(url, "heliograph_requests_total") > 105_000, 400, "100,000 requests")
        time.sleep(2)
        stop.set()
        results = [told.get(timeout=60) for _ in asking]
        for process in asking:
            process.join(20)
    counts, failures = Counter(), []
    for _, versions, failed in results:
        counts.update(versions)
        failures += failed
    for line in failures[:20]:
        print(line)
    print("answers by version:", dict(sorted(counts.items())))
    return {"faults_requests": sum(counts.values()) + len(failures), "faults_failed": len(failures)}


# overload


class Connection(asyncio.Protocol):
    """A kept connection that asks once at a time; `told(status)` when the answer is whole."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.read, self.told = transport, b"", lambda status: None

    def data_received(self, data: bytes) -> None:
        self.read += data
        head, found, body = self.read.partition(b"\r\n\r\n")
        if found and len(body) >= int(re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)[1]):
            self.read = b""
            self.told(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        self.told(0)


Asked = tuple[float, float, int]
"""When a request was due, the seconds that its answer took from then, its status (0: no answer)."""


async def offer(url: str, seconds: float, rate: float) -> list[Asked]:
    """Requests at times that do not wait for answers (a Poisson process), each on a free connection or a new one."""
    host, port = url.removeprefix("http://").split(":")
    body = b'{"instances": [[1, 2]]}'
    head = f"POST /v1/models/m:predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    message, loop, free, asked = head.encode() + b"\r\n\r\n" + body, asyncio.get_running_loop(), [], []
    draw, due, began = np.random.default_rng(0), 0.0, time.perf_counter()

    async def ask(due: float) -> None:
        try:
            wire = free.pop() if free else (await loop.create_connection(Connection, host, int(port)))[1]
        except OSError:
            asked.append((due, time.perf_counter() - began - due, 0))
            return

        def told(status: int) -> None:
            asked.append((due, time.perf_counter() - began - due, status))
            wire.told = lambda status: free.remove(wire) if wire in free else None
            if status:
                free.append(wire)

        wire.told = told
        wire.transport.write(message)

    asking = set()
    while due < seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        asking.add(task := asyncio.create_task(ask(due)))
        task.add_done_callback(asking.discard)
        due += draw.exponential(1 / rate)
    await asyncio.sleep(2)
    for wire in list(free):
        wire.transport.abort()
    return asked


def offered(url: str, seconds: float, rate: float, told: Any) -> None:
    told.put(uvloop.run(offer(url, seconds, rate)))


def hey(url: str, seconds: float, connections: int) -> list[Asked]:
    """As many requests as some connections get answered."""
    command = ["hey", "-z", f"{seconds}s", "-c", str(connections), "-o", "csv", "-m", "POST"]
    command += ["-T", "application/json", "-d", '{"instances": [[1, 2]]}', f"{url}/v1/models/m:predict"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = csv.DictReader(io.StringIO(out))
    return [(float(r["offset"]), float(r["response-time"]), int(r["status-code"])) for r in rows]


def rate_of(requests: list[Asked], since: float, to: float) -> float:
    return sum(1 for at, took, status in requests if status == 200 and since <= at + took < to) / (to - since)


def overload(folder: Path) -> dict[str, Any]:
    with serving(folder, {"replicas": 1, "cpus": 1}, layers=600) as (root, url):
        hey(url, 5, 32)
        capacity = float(np.median([rate_of(hey(url, 8, 32), 1, 8) for _ in range(3)]))
        print(f"capacity: {capacity:.0f} requests/s, of 32 connections", flush=True)
        (replica,) = replicas(root)
        before = replica.memory_info().rss
        peak = [before]
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                peak.append(replica.memory_info().rss)

        watching = threading.Thread(target=watch)
        watching.start()
        told = mp.get_context("spawn").Queue()
        asking = mp.get_context("spawn").Process(target=offered, args=(url, 60, 5 * capacity, told), daemon=True)
        asking.start()
        found = told.get(timeout=120)
        after = hey(url, 8, 32)
        over.set()
        watching.join()
        statuses = Counter(status for _, _, status in found)
        refused = sorted(took for _, took, status in found if status != 200)
        recovered = next(s for s in range(8) if rate_of(after, s, s + 1) >= 0.9 * capacity)
        rate = len(found) / 60
        print(f"offered {rate:.0f}/s = {rate / capacity:.1f} x capacity; {dict(statuses)}; {recovered} s to full speed")
        good = sorted(took for _, took, status in found if status == 200)
        print(f"answered in {1000 * good[len(good) // 2]:.0f} ms (median), {1000 * good[int(0.99 * len(good))]:.0f} ms (p99)")
        return {
            "overload_offered": rate / capacity,
            "overload_goodput": rate_of(found, 2, 60) / capacity,
            "refused_p99_ms": 1000 * refused[int(0.99 * len(refused))],
            "overload_memory_growth": max(peak) / before - 1,
            "recovery_seconds": recovered,
        }


# ten minutes


def mixed(url: str, number: int, seconds: float, told: Any) -> None:
    draw = np.random.default_rng(number)
    end, counts = time.monotonic() + seconds, Counter()
    sealed, path = Client(url, "m"), f"{url}/v1/models/m:predict"
    with httpx.Client() as plain:

        def binary(rows: np.ndarray) -> httpx.Response:
            head = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "parameters": {"binary_data_size": rows.nbytes}}
            text = json.dumps({"inputs": [head], "parameters": {"binary_data_output": True}}).encode()
            kind = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(text))}
            return plain.post(f"{url}/v2/models/m/infer", content=text + rows.tobytes(), headers=kind)

        def arrow(rows: np.ndarray) -> httpx.Response:
            table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 2)})
            sink = io.BytesIO()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            return plain.post(path, content=sink.getvalue(), headers={"content-type": "application/vnd.apache.arrow.stream"})

        kinds = {
            "row": lambda: plain.post(path, json={"instances": draw.random((1, 2)).tolist()}),
            "rows": lambda: plain.post(path, json={"instances": draw.random((int(draw.integers(1, 500)), 2)).tolist()}),
            "binary": lambda: binary(draw.random((int(draw.integers(1, 2000)), 2)).astype(np.float32)),
            "arrow": lambda: arrow(draw.random((int(draw.integers(1, 2000)), 2)).astype(np.float32)),
            "sealed": lambda: sealed.predict(draw.random((4, 2)).tolist()),
            "wrong shape": lambda: plain.post(path, json={"instances": [[1, 2, 3]]}),
            "not JSON": lambda: plain.post(path, content=draw.bytes(200)),
            "unknown model": lambda: plain.post(
                f"{url}/v1/models/{number}-{draw.integers(1e9)}:predict", json={"instances": [1]}
            ),
            "page": lambda: plain.get(f"{url}/{draw.choice(['docs', 'openapi.json', 'metrics', 'v1/models/m/metadata'])}"),
            "large": lambda: plain.post(path, json={"instances": draw.random((20_000, 2)).tolist()}),
        }
        names, share = list(kinds), np.array([40, 8, 12, 6, 15, 6, 6, 4, 2, 1])
        while time.monotonic() < end:
            kind = draw.choice(names, p=share / share.sum())
            answer = kinds[kind]()
            counts[f"{kind} {answer.status_code if isinstance(answer, httpx.Response) else 200}"] += 1
    told.put(counts)


def hour(folder: Path, seconds: float = 600) -> dict[str, Any]:
    spawn = mp.get_context("spawn")
    told = spawn.Queue()
    with serving(folder, {"replicas": 1}) as (root, url):
        asking = [spawn.Process(target=mixed, args=(url, i, seconds, told), daemon=True) for i in range(4)]
        for process in asking:
            process.start()
        began, seen = time.monotonic(), []
        (replica,) = replicas(root)
        while (now := time.monotonic() - began) < seconds:
            seen.append((now, replica.memory_info().rss / 2**20))
            if len(seen) % 60 == 1:
                print(f"{now:5.0f} s  {seen[-1][1]:.0f} MiB", flush=True)
            time.sleep(1)
        counts = sum((told.get(timeout=60) for _ in asking), Counter())
    for kind, count in sorted(counts.items()):
        print(f"{kind:<20} {count}")
    early = np.median([m for at, m in seen if 0.1 * seconds <= at < 0.2 * seconds])
    late = np.median([m for at, m in seen if at >= 0.9 * seconds])
    return {
        "hour_requests": sum(counts.values()),
        "hour_5xx": sum(n for k, n in counts.items() if " 5" in k),
        "hour_memory_growth": late / early - 1,
    }


PARTS = {"faults": faults, "overload": overload, "hour": hour}

if __name__ == "__main__":
    figures = {}
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory(prefix="bench-") as temp:
            figures |= PARTS[name](Path(temp))
    finish(figures)
