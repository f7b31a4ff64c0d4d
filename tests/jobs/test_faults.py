"""Whatever ends a worker, a node, the driver or the disk: the same training in the end, every row once an epoch."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from heliograph import project as projects
from heliograph.jobs.prepare import prepare
from heliograph.jobs.train import train
from heliograph.jobs.watch import EVENTS, STEPS, read_lines
from heliograph.jobs.worker import Job

from . import traced


def job(folder: Path, run: Path | None = None) -> Job:
    loaded = projects.load(folder)
    prepared, run = folder / "prepared", run or folder / "run"
    if not prepared.exists():
        prepared.mkdir()
        prepare(loaded.data, folder, None, prepared, lambda *_: None)
    run.mkdir(exist_ok=True)
    return Job("traced", loaded.train, loaded.model, folder, prepared, None, run)


def run(given: Job) -> list[dict]:
    said: list[str] = []
    train(given, lambda *_: None, said.append)
    return traced.check(given.project, given.prepared, given.folder)


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> list[dict]:
    return run(job(traced.project(tmp_path_factory.mktemp("undisturbed") / "project", "2", pause=0)))


def same(disturbed: list[dict], undisturbed: list[dict]) -> None:
    for line, other in zip(disturbed, undisturbed, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert line["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)


def after_steps(folder: Path, lines: int, act) -> threading.Thread:
    def wait() -> None:
        while len(read_lines(folder / STEPS)) < lines:
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def trainers() -> list[psutil.Process]:
    """The training workers of this process's Ray."""
    return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def test_a_killed_worker_loses_no_step(undisturbed, tmp_path):
    given = job(traced.project(tmp_path / "project", "2"))
    killed: list[int] = []

    def kill() -> None:
        killed.append(trainers()[-1].pid)
        psutil.Process(killed[0]).send_signal(signal.SIGKILL)

    thread = after_steps(given.folder, 4, kill)
    figures = run(given)
    thread.join()
    assert killed
    starts = [(event["text"], event["step"] > 0) for event in read_lines(given.folder / EVENTS)]
    assert starts == [("2 workers, from the start", False), ("2 workers, going on", True)]
    same(figures, undisturbed)


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: root is needed")
    try:
        given = job(traced.project(tmp_path / "project", "2"), disk / "run")
        ballast = disk / "ballast"

        def fill_for_a_while() -> None:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
            time.sleep(1.5)
            ballast.unlink()

        thread = after_steps(given.folder, 3, fill_for_a_while)
        figures = run(given)
        thread.join()
        same(figures, undisturbed)
        assert any("was not written (No space left" in event["text"] for event in read_lines(given.folder / EVENTS))
        assert len(list((given.folder / "checkpoints").iterdir())) >= 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_ends_loses_nothing(undisturbed, command, tmp_path, how):
    folder = traced.project(tmp_path / "project", "2")
    default = folder / "runs" / "default"
    running = command("run", folder)

    def trained() -> Path | None:
        return next(default.glob(".work/train-*"), None)

    running.wait_for(lambda: bool(trained()) and len(read_lines(trained() / STEPS)) > 4, "some steps")
    if how == signal.SIGKILL:
        running.kill()
        least = 1
    else:
        code, output = running.end(how)
        assert code == 143, output
        # The very last step was saved.
        newest = max((trained() / "checkpoints").glob("step-*")).name
        least = read_lines(trained() / STEPS)[-1]["step"]
        assert newest == f"step-{least:08d}"
        assert running.left_running() == []
    again = command("run", folder)
    code, output = again.finish()
    assert code == 0, output
    starts = [event["step"] for event in read_lines(default / "train" / EVENTS) if event["kind"] == "workers"]
    assert len(starts) == 2
    assert starts[1] >= least
    same(traced.check(folder, default / "prepare", default / "train"), undisturbed)


def test_a_lost_node_leaves_one_worker_and_a_new_one_makes_two_again(undisturbed, tmp_path):
    folder = traced.project(tmp_path / "project", "[1, 2]", epochs=9, pause=0.25)
    script = Path(__file__).with_name("elastic.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False, timeout=390)
    assert done.returncode == 0, done.stdout + done.stderr
    times = json.loads(done.stdout.splitlines()[-1])
    print(times)
    assert [event["text"].split()[0] for event in times["attempts"] if event["kind"] == "workers"] == ["2", "1", "2"]
    figures = traced.check(folder, folder / "prepared", folder / "run")
    same(figures[:3], undisturbed)
