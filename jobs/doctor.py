"""Doctor: whether this machine can do what heliograph needs, and what to do where it cannot."""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from ..cluster.runtime import LOOPBACK, LocalCluster
from ..errors import HeliographError
from ..project import Project

OLDEST = (3, 11)
LEAST_DISK, LEAST_SHARED, LEAST_MEMORY, LEAST_FILES = 5e9, 1e9, 4e9, 4096
"""Bytes, and open files."""
ASKED = """\
import tensorflow as tf
print(tf.sysconfig.get_build_info().get("cuda_version", ""), len(tf.config.list_physical_devices("GPU")))
"""
State = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """state: `bad` stops a run, `warn` slows or narrows it. do: what mends it; empty where nothing is wrong."""

    name: str
    state: State
    found: str
    do: str = ""


def examine(project: Project | None, base: Path, update: Callable[[str], None]) -> Iterator[Finding]:
    """All that can be found out, one after the other. project: also what its file needs (port, keys, storage)."""
    yield _python()
    yield from _packages()
    yield _cpu()
    update("asking for GPUs")
    yield _gpu()
    yield _memory()
    yield _shared()
    yield _disk(base)
    yield _files()
    yield _port(project)
    if project:
        yield from _keys(project, base)
        yield from _storage(project, update)
    update("starting Ray")
    yield _ray()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST:
        return Finding("python", "bad", version, "install Python 3.11 or newer: uv python install 3.11")
    return Finding("python", "ok", version)


def _packages() -> Iterator[Finding]:
    for name in ("ray", "tensorflow", "keras", "pyarrow"):
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "bad", "not installed", "uv sync")


def _cpu() -> Finding:
    count, machine = len(os.sched_getaffinity(0)), platform.machine()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if machine == "x86_64" and not re.search(r"\bavx2\b", flags):
        lacks = "bad" if not re.search(r"\bavx\b", flags) else "warn"
        return Finding("cpu", lacks, f"{count} cores without AVX2", "use a newer machine: TensorFlow is built for AVX")
    wide = "AVX-512" if "avx512f" in flags else "AVX2" if machine == "x86_64" else machine
    return Finding("cpu", "ok", f"{count} core{'s' if count > 1 else ''}, {wide}")


def _gpu() -> Finding:
    """The driver's CUDA against the one that TensorFlow's wheel was built with."""
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=False).stdout  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return Finding("gpu", "ok", "none: models are trained on the CPU")
    driver = re.search(r"CUDA Version: (\d+)\.(\d+)", said)
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False).stdout  # noqa: S607
    names = ", ".join(sorted(set(re.findall(r"GPU \d+: (.+?) \(", listed)))) or "a GPU"
    if not driver:
        return Finding("gpu", "warn", f"{names}, but its driver does not answer", "reboot, or install the NVIDIA driver again")
    command = [sys.executable, "-c", ASKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout.split()  # noqa: S603
    built, seen = (done[0], int(done[1])) if len(done) == 2 else ("", int(done[-1]) if done else 0)
    cuda = f"CUDA {driver[1]}.{driver[2]}"
    if seen:
        return Finding("gpu", "ok", f"{seen} × {names}, driver for {cuda}, TensorFlow for CUDA {built}")
    if built and int(built.split(".")[0]) > int(driver[1]):
        return Finding(
            "gpu", "warn", f"{names}: driver for {cuda}, TensorFlow needs CUDA {built}", "install a newer NVIDIA driver"
        )
    return Finding("gpu", "warn", f"{names}, but TensorFlow sees none", "uv sync --extra gpu (TensorFlow's own CUDA libraries)")


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    if free < LEAST_MEMORY:
        return Finding("memory", "warn", f"{_size(free)} free", "end other programs, or use fewer workers (train.workers)")
    return Finding("memory", "ok", f"{_size(free)} free of {_size(psutil.virtual_memory().total)}")


def _shared() -> Finding:
    """Ray's object store lies there."""
    if not Path("/dev/shm").is_dir():  # noqa: S108
        return Finding("shared memory", "warn", "no /dev/shm", "Ray will use the disk, slowly: mount a tmpfs there")
    free = shutil.disk_usage("/dev/shm").free  # noqa: S108
    if free < LEAST_SHARED:
        return Finding("shared memory", "warn", f"{_size(free)} free in /dev/shm", "in a container: --shm-size 4g")
    return Finding("shared memory", "ok", f"{_size(free)} free in /dev/shm")


def _disk(base: Path) -> Finding:
    free = shutil.disk_usage(base).free
    if free < LEAST_DISK:
        return Finding("disk", "warn", f"{_size(free)} free at {base}", "free some, or keep runs elsewhere: --run FOLDER")
    return Finding("disk", "ok", f"{_size(free)} free at {base}")


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LEAST_FILES:
        return Finding("open files", "warn", f"{soft} at most", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")
    return Finding("open files", "ok", f"{soft} at most")


def _port(project: Project | None) -> Finding:
    port = project.serve.port if project else 8000
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((LOOPBACK, port))
        except OSError:
            return Finding("port", "warn", f"{port} is in use", "serve on another one: --port, or serve.port in the project file")
    return Finding("port", "ok", f"{port} is free")


def _keys(project: Project, base: Path) -> Iterator[Finding]:
    from .run import key_store

    held = key_store(project, base, base / "runs" / "default")
    if not held.folder.is_dir():
        yield Finding("keys", "ok", f"none yet: the first run makes them in {held.folder}")
        return
    open_to_others = [f.name for f in held.folder.iterdir() if f.is_file() and f.suffix != ".pub" and f.stat().st_mode & 0o077]
    if open_to_others:
        yield Finding("keys", "bad", f"{held.folder}: others may read {open_to_others[0]}", f"chmod 600 {held.folder}/*")
    else:
        yield Finding("keys", "ok", str(held.folder))


def _storage(project: Project, update: Callable[[str], None]) -> Iterator[Finding]:
    """Object storage, where the project names any."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    for what, place in (("data", project.data.source), ("registry", project.registry)):
        if not place.startswith("s3://"):
            continue
        bucket = place.removeprefix("s3://").split("/")[0]
        update(f"asking for s3://{bucket}")
        try:
            boto3.client("s3").head_bucket(Bucket=bucket)
            yield Finding(f"s3 ({what})", "ok", f"s3://{bucket} answers")
        except (BotoCoreError, ClientError) as error:
            yield Finding(
                f"s3 ({what})", "bad", f"s3://{bucket}: {error}", "set AWS_PROFILE or AWS_ACCESS_KEY_ID, and allow ListBucket"
            )


def _ray() -> Finding:
    try:
        with LocalCluster() as cluster:
            cluster.start()
            import ray

            cpus = int(ray.cluster_resources().get("CPU", 0))
    except HeliographError as error:
        return Finding("ray starts", "bad", str(error), "end what else runs here and ask again")
    return Finding("ray starts", "ok", f"with {cpus} CPUs, on {LOOPBACK} alone")
