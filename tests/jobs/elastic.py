"""Two workers on two nodes; one node is killed, and later another comes: run as a program, since it needs a Ray of its own.

    python tests/jobs/elastic.py FOLDER

Prints one JSON line: the seconds until the training went on with one worker, and again with two.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from heliograph import project
from heliograph.cluster import runtime
from heliograph.jobs.watch import EVENTS, STEPS, read_lines

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20, "node_ip_address": "127.0.0.1"}


def main(folder: Path) -> None:
    temp = Path(tempfile.mkdtemp(prefix=f"{runtime.PREFIX}{os.getpid()}-", dir="/tmp"))
    os.environ.update(runtime.environment(temp, runtime.TOKEN, runtime.reserve()[0]))
    import ray
    from ray.cluster_utils import Cluster

    head = {**NODE, "num_cpus": 0, "include_dashboard": False, "temp_dir": str(temp / "ray")}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False, _node_ip_address="127.0.0.1")
        os.environ["RAY_ADDRESS"] = cluster.address
        cluster.add_node(**NODE)
        lost = cluster.add_node(**NODE)
        runtime.quieten()
        print(json.dumps(_train(folder, cluster, lost)))
    finally:
        started = psutil.Process().children(recursive=True)
        ray.shutdown()
        with contextlib.suppress(Exception):
            cluster.shutdown()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(temp, ignore_errors=True)


def _train(folder: Path, cluster, lost) -> dict:
    from heliograph.jobs.prepare import prepare
    from heliograph.jobs.train import train
    from heliograph.jobs.worker import Job

    loaded = project.load(folder)
    prepared, run = folder / "prepared", folder / "run"
    prepared.mkdir()
    run.mkdir()
    prepare(loaded.data, folder, None, prepared, lambda *_: None)
    job = Job("traced", loaded.train, loaded.model, folder, prepared, None, run)
    failure = []

    def work() -> None:
        try:
            train(job, lambda *_: None, lambda _: None)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def wait_for(happened, seconds: float = 120) -> float:
        started = time.monotonic()
        while not happened():
            assert thread.is_alive(), f"training ended: {failure}"
            assert time.monotonic() - started < seconds, read_lines(run / EVENTS)
            time.sleep(0.1)
        return time.monotonic() - started

    def attempts(workers: int) -> int:
        return sum(event["text"].startswith(f"{workers} worker") for event in read_lines(run / EVENTS))

    def steps_since(count: int) -> bool:
        return len(read_lines(run / STEPS)) > count

    wait_for(lambda: steps_since(6))
    cluster.remove_node(lost, allow_graceful=False)
    shrunk = wait_for(lambda: attempts(1) == 1)
    known = len(read_lines(run / STEPS))
    wait_for(lambda: steps_since(known + 3))
    cluster.add_node(**NODE)
    grown = wait_for(lambda: attempts(2) == 2)
    thread.join(200)
    assert not thread.is_alive() and not failure, failure
    return {"shrunk_after": round(shrunk, 1), "grown_after": round(grown, 1), "attempts": read_lines(run / EVENTS)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
