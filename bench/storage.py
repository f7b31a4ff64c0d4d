"""Object storage against plain boto3: a file of 256 MB up and down, in turn, on a server of this machine.

    uv run --group bench python bench/storage.py [repeats]

Ours also computes and checks the file's digest on the way, which boto3's transfer does not.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import boto3
from heliograph.cluster.objects import Bucket, digest_of
from heliograph.cluster.runtime import free_port

BYTES = 256 << 20


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "served" / "bench").mkdir(parents=True)
        port = free_port()
        command = ["rclone", "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "testkey,testsecret", folder / "served"]
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            time.sleep(2)
            measure(folder, repeats)
        finally:
            server.terminate()
            server.wait()


def measure(folder: Path, repeats: int) -> None:
    file, back = folder / "file", folder / "back"
    file.write_bytes(os.urandom(BYTES))
    with file.open("rb") as opened:
        digest = digest_of(opened)
    bucket, plain = Bucket("s3://bench"), boto3.client("s3")
    ways: dict[str, Callable[[], object]] = {
        "ours up": lambda: bucket.upload(file, "ours"),
        "boto3 up": lambda: plain.upload_file(str(file), "bench", "boto3"),
        "ours down": lambda: bucket.download("ours", back, digest),
        "boto3 down": lambda: plain.download_file("bench", "boto3", str(back)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, work in ways.items():
            took = seconds(work)
            if repeat:  # the first is for caches and connections
                times[name].append(took)
                print(f"{repeat} {name:<10} {took:6.2f} s  {BYTES / took / 1e6:6.0f} MB/s")
    middle = {name: statistics.median(t) for name, t in times.items()}
    print(json.dumps({
        "bench": "storage", "bytes": BYTES, "repeats": repeats,
        "up": round(middle["boto3 up"] / middle["ours up"], 3), "down": round(middle["boto3 down"] / middle["ours down"], 3),
        "seconds": {name: round(t, 3) for name, t in middle.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
