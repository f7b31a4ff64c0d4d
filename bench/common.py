"""What every benchmark does: repeat in turn, print each repeat, end with one JSON line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def in_turn(repeats: int, contenders: dict[str, Callable[[], float]], unit: str) -> dict[str, list[float]]:
    """Run all contenders once, then all again, …, so that whatever else the machine does meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name, run in contenders.items():
            found[name].append(run())
            print(f"repeat {repeat + 1}  {name:<28} {found[name][-1]:10.2f} {unit}", flush=True)
    return found


def child(file: str, *arguments: str, cpus: str | None = None) -> subprocess.Popen:
    """This file again, in a process of its own, which prints one JSON line. cpus: pinned to these."""
    pinned = ["taskset", "-c", cpus] if cpus else []
    command = [*pinned, sys.executable, str(Path(file).resolve()), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def answer(process: subprocess.Popen) -> dict:
    out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{process.args}: ended with {process.returncode}")
    return json.loads(out.splitlines()[-1])


def publish(folder: Path, name: str, classes: int, width: int, model: bytes) -> None:
    """Sign an ONNX model, input `x` `[n, width]`, output `[n, classes]`, into the registry of a project's folder."""
    from heliograph.cluster.keys import KeyStore
    from heliograph.datasets.preprocess import Preprocessing
    from heliograph.datasets.schema import Feature, Schema
    from heliograph.jobs import bundle
    from heliograph.jobs.registry import Registry

    feature = Feature(name="x", kind="tensor", shape=(width,))
    labels = tuple(range(classes))
    schema = Schema(task="classification", target="y", classes=labels, features=(feature,), inputs={"x": (width,)})
    with tempfile.TemporaryDirectory(dir=folder) as temp:
        parts, made = Path(temp, "parts"), Path(temp, "bundle")
        parts.mkdir()
        made.mkdir()
        (parts / "schema.json").write_text(schema.model_dump_json())
        (parts / "preprocess.json").write_text(Preprocessing(inputs={"x": ("x",)}).model_dump_json())
        (parts / "metrics.json").write_text("{}")
        (parts / "model.onnx").write_bytes(model)
        bundle.make(made, name, {}, sorted(parts.iterdir()), KeyStore(folder / "runs" / "default" / "keys"))
        Registry(folder / "registry").add(name, made)


@contextlib.contextmanager
def cluster() -> Iterator:
    from heliograph.cluster.runtime import LocalCluster

    with LocalCluster(2) as running:
        running.start()
        yield running


def ran(folder: Path, running, text: str, model: str | Path, **files: str):
    """Run a project of this text, with this model and other files: the run."""
    from heliograph import project
    from heliograph.jobs.display import Display
    from heliograph.jobs.run import execute
    from heliograph.jobs.stages import Run
    from rich.console import Console

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(model.read_text() if isinstance(model, Path) else model)
    (folder / "heliograph.yaml").write_text(text)
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content)
    run = Run(folder / "runs" / "default", running, Display(Console(quiet=True)))
    execute(project.load(folder), folder, run)
    return run


def metrics(run) -> dict:
    """Of the test rows."""
    return json.loads((run["evaluate"] / "metrics.json").read_text())


def test_accuracy(run) -> float:
    return metrics(run)["accuracy"]


def end(process: subprocess.Popen, seconds: float) -> None:
    """Interrupt a server that leads a process group of its own; what is left of the group after some seconds is killed."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(figures: dict) -> None:
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}))
