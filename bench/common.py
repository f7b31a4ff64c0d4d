"""What every benchmark does: repeat in turn, print each repeat, end with one JSON line."""

import json
import subprocess
import sys
from collections.abc import Callable
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


def finish(figures: dict) -> None:
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}))
