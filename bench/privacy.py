"""What sealing costs, and what an attacker gets, on a real endpoint.

    uv run --group bench python bench/privacy.py [repeats] [seconds] [mutations]

- The same binary request (Open Inference Protocol, 784 floats, 3 KB) sealed and in clear, in turn: requests a second with 16
  connections, and the median with one. Each sealed request is one capsule repeated, so the client's own sealing is not in it:
  it is measured apart. And bodies of 15 MB, one connection.
- A key rotation every second for a minute, under load of clients that seal each request: how many failed.
- Changed capsules (flips, cuts, swaps, additions, wrong key, other version, other suite) at the application that the endpoint
  runs: how many were opened, and how many different answers there were.
"""

import asyncio
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import httpx
import numpy as np
from common import finish, in_turn

from serve import Server, bodies, hey, write_model

PLACE = "/v2/models/mlp/infer"


def seal(key, content: bytes, length: str):
    """(the capsule, what opens its answer) of a binary request."""
    from heliograph.serve import bhttp, ohttp

    fields = [(b"content-type", b"application/octet-stream"), (b"inference-header-content-length", length.encode())]
    request = bhttp.Request(b"POST", b"http", b"x", PLACE.encode(), fields, content)
    return ohttp.seal_request(bhttp.padded(bhttp.encode_request(request)), key)


def key_of(server: Server):
    from heliograph.serve import ohttp

    return ohttp.decode_configs(httpx.get(f"http://127.0.0.1:{server.port}/v1/models/mlp/ohttp-keys").content)[0]


def binary(rows: np.ndarray) -> tuple[bytes, str]:
    """(a body, the length of its JSON)."""
    tensor = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "parameters": {"binary_data_size": rows.nbytes}}
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    text = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    return text + rows.tobytes(), str(len(text))


def milliseconds(url: str, body: bytes, headers: dict[str, str], count: int) -> float:
    """The median of one connection."""
    taken = []
    with httpx.Client(timeout=60) as client:
        for _ in range(count):
            began = time.perf_counter()
            answer = client.post(url, content=body, headers=headers)
            taken.append(time.perf_counter() - began)
            assert answer.status_code == 200, answer.text[:300]
    return 1000 * median(taken[len(taken) // 5 :])


def rotation(server: Server, folder: Path, seconds: float) -> tuple[int, int]:
    """(requests, failed ones) of four clients while the key changes every second."""
    from heliograph import Client
    from heliograph.cluster.keys import KeyStore, request_key

    keys, row = KeyStore(folder / "runs" / "default" / "keys"), np.zeros(784).tolist()
    over, counts, failures = threading.Event(), [0] * 4, []

    def ask(i: int) -> None:
        with Client(f"http://127.0.0.1:{server.port}", "mlp", trust=keys.public_key(), retries=0) as client:
            while not over.is_set():
                try:
                    client.predict([row])
                except Exception as error:
                    failures.append(str(error))
                counts[i] += 1

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        keys.rotate(request_key("mlp"))
        time.sleep(1)
    over.set()
    for thread in threads:
        thread.join()
    print(f"{len(keys.versions(request_key('mlp')))} keys, {sum(counts)} requests, failed: {failures[:3] or 'none'}")
    return sum(counts), len(failures)


def change(i: int, rng: random.Random, made: list[bytes], stranger: list[bytes]) -> tuple[str, bytes]:
    """(a path, a changed capsule): flipped, cut, two bytes swapped, longer, half another's, of another key's id, sealed for a
    request without a version and sent to one, sealed with another's key or not at all."""
    capsule, path = bytearray(rng.choice(made)), PLACE
    match i % 8:
        case 0:
            capsule[rng.randrange(len(capsule))] ^= 1 << rng.randrange(8)
        case 1:
            del capsule[rng.randrange(len(capsule)) :]
        case 2:
            a, b = rng.sample(range(len(capsule)), 2)
            capsule[a], capsule[b] = capsule[b], capsule[a]
        case 3:
            capsule += rng.randbytes(rng.randrange(1, 64))
        case 4:
            at = rng.randrange(8, 39)
            capsule = capsule[:at] + rng.choice(made)[at:]
        case 5:
            capsule[0] ^= rng.randrange(1, 256)
        case 6:
            path = "/v2/models/mlp/versions/1/infer"
        case 7:
            capsule = bytearray(rng.choice([*stranger, rng.randbytes(200)]))
    if path == PLACE and bytes(capsule) in made:
        capsule[-1] ^= 1
    return path, bytes(capsule)


def mutations(folder: Path, count: int) -> tuple[int, int]:
    """(capsules opened, different answers) of changed capsules, asked of an application in this process."""
    from dataclasses import replace

    from heliograph.cluster.keys import KeyStore
    from heliograph.jobs.registry import Registry
    from heliograph.project import Serve
    from heliograph.serve import ohttp
    from heliograph.serve.application import Application, Seen
    from heliograph.serve.messages import Request
    from heliograph.serve.metrics import Stats
    from heliograph.serve.models import Models

    models = Models(Registry(folder / "registry"), KeyStore(folder / "runs" / "default" / "keys"), Serve(), 1, Stats())
    rng, answers, opened = random.Random(0), set(), 0

    async def nothing() -> Stats:
        return Stats()

    async def first(name: bytes) -> bool:
        return True

    async def ask() -> None:
        nonlocal opened
        await models.follow()
        application = Application(models, nothing, first)
        (key,) = ohttp.decode_configs(models.door("mlp", None).offer()[0])
        wrong = ohttp.KeyConfig(key.key_id, ohttp.public_key(bytes(range(32))))
        content, length = binary(np.zeros((1, 8), np.float32))
        made, stranger = (
            [seal(replace(k, aeads=(aead,)), content, length)[0] for aead in key.aeads for _ in range(8)] for k in (key, wrong)
        )
        for i in range(count):
            path, capsule = change(i, rng, made, stranger)
            answer = await application.answer(Request("POST", path, ohttp.REQUEST_TYPE, capsule, None), Seen())
            opened += answer.type == ohttp.RESPONSE_TYPE
            answers.add((answer.status, answer.type, answer.body, tuple(sorted(answer.headers.items()))))

    began = time.perf_counter()
    asyncio.run(ask())
    print(f"{count} changed capsules in {time.perf_counter() - began:.0f} s: {opened} opened, {len(answers)} different answers")
    return opened, len(answers)


def main(repeats: int, seconds: float, changed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as temp:
        folder = Path(temp)
        write_model(folder)
        made = bodies(folder)
        length = made["binary-length"].name
        server = Server("heliograph", folder)
        try:
            server.wait(made["json"].read_bytes())
            url = f"http://127.0.0.1:{server.port}{PLACE}"
            small = made["binary"].read_bytes()
            large, large_length = binary(np.zeros((5000, 784), np.float32))
            clear = {"content-type": "application/octet-stream", "inference-header-content-length": length}
            sealed_type = {"content-type": "message/ohttp-req"}
            capsule = folder / "capsule.body"
            header = (f"Inference-Header-Content-Length: {length}",)

            def fresh(content: bytes, length: str) -> bytes:
                capsule.write_bytes(seal(key_of(server), content, length)[0])
                return capsule.read_bytes()

            def sealed_rate() -> float:
                fresh(small, length)
                return hey(url, capsule, seconds, "message/ohttp-req")[0]

            rates = in_turn(
                repeats,
                {
                    "clear": lambda: hey(url, made["binary"], seconds, "application/octet-stream", header)[0],
                    "sealed": sealed_rate,
                },
                "requests/s",
            )
            times = in_turn(
                repeats,
                {
                    "clear, one connection": lambda: milliseconds(url, small, clear, 1000),
                    "sealed, one connection": lambda: milliseconds(url, fresh(small, length), sealed_type, 1000),
                    "clear, 15 MB": lambda: milliseconds(
                        url, large, clear | {"inference-header-content-length": large_length}, 10
                    ),
                    "sealed, 15 MB": lambda: milliseconds(url, fresh(large, large_length), sealed_type, 10),
                },
                "ms",
            )
            key = key_of(server)
            began = time.perf_counter()
            for _ in range(1000):
                seal(key, small, length)
            print(f"the client's sealing of 3 KB: {time.perf_counter() - began:.3f} ms")
            asked, failed = rotation(server, folder, 60)
        finally:
            server.stop()
        opened, answers = mutations(folder, changed)
        middle = {name: median(values) for name, values in (rates | times).items()}
        finish(
            {
                "encrypted_vs_plain_rps": middle["sealed"] / middle["clear"],
                "added_p50_ms": middle["sealed, one connection"] - middle["clear, one connection"],
                "large_vs_plain": middle["clear, 15 MB"] / middle["sealed, 15 MB"],
                "rotation_requests": asked,
                "rotation_failed": failed,
                "changed_opened": opened,
                "changed_answers": answers,
            }
        )


if __name__ == "__main__":
    given = sys.argv[1:] + ["5", "8", "1000000"][len(sys.argv) - 1 :]
    main(int(given[0]), float(given[1]), int(given[2]))
