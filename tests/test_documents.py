"""The documents' commands, run as a reader types them: each page a shell script, in what a fresh clone holds after two runs.

A `console` block is typed line by line; a `python` block is run, a block with a title is written to the file of that name. What
serves stays until the page's end, and people ask it meanwhile. What cannot be had here is stood in for: AWS by moto, Kubernetes
by a `kubectl` that reads what it is given.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliograph.project import load as load_project
from sklearn.datasets import load_digits, load_iris

from .conftest import ROOT, Command
from .test_docs import PAGES, blocks

BLOCK = re.compile(r'^```(\w+)(?: title="(\S+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
SERVES = re.compile(r"heliograph (serve|relay|ui) ")
BEGINNING = """\
set -euo pipefail
serving() {
  "$@" & servers+=($!)
  python ready.py $!
}
servers=()
trap 'for pid in "${servers[@]}"; do kill -TERM $pid || true; wait $pid || true; done' EXIT
set -x
"""
KUBECTL = "#!{python}\nimport sys, yaml\nassert all(part['kind'] for part in yaml.safe_load_all(sys.stdin)), sys.argv\n"
READY = """\
import sys, time, httpx, psutil
client = httpx.Client()
while psutil.pid_exists(int(sys.argv[1])):
    try:
        client.get("http://127.0.0.1:{port}/v2/health/ready").raise_for_status()
        sys.exit()
    except httpx.HTTPError:
        time.sleep(0.3)
sys.exit("what serves has ended")
"""
ASKS = re.compile(r"heliograph (predict|explain|drift) ")
RUN_ELSEWHERE = {"tutorial", "keras", "index"}
"""By `test_docs`, and by the fixture here: the first command of all."""


@pytest.fixture(scope="module")
def clone(digits, tmp_path_factory) -> tuple[Path, int]:
    """The examples, with two versions of the digits; what pages speak of; and the port in the place of 8000."""
    folder = tmp_path_factory.mktemp("documents")
    unwanted = shutil.ignore_patterns("runs", "registry", "__pycache__")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=unwanted)
    shutil.copytree(digits, folder / "examples" / "digits", dirs_exist_ok=True)
    port = load_project(digits).serve.port
    project = folder / "examples" / "digits" / "heliograph.yaml"
    project.write_text(project.read_text().replace("trials: 20", "trials: 3").replace("epochs: 12", "epochs: 2"))
    code, output = Command(tmp_path_factory.mktemp("temp"), "run", project.parent).finish()
    assert code == 0, output
    images = [{"image": image.tolist()} for image in load_digits().images[:4]]
    (folder / "rows.json").write_text(json.dumps({"instances": images}))
    pq.write_table(pa.Table.from_pylist(images), folder / "rows.parquet")
    (folder / "passphrase.txt").write_text("a passphrase that nobody guesses\n")
    iris = load_iris(as_frame=True)
    iris.data.assign(species=iris.target_names[iris.target]).to_csv(folder / "flowers.csv", index=False)
    (folder / "kubectl").write_text(KUBECTL.format(python=sys.executable))
    (folder / "kubectl").chmod(0o755)
    (folder / "ready.py").write_text(READY.format(port=port))
    for page in PAGES:
        for _, title, text in BLOCK.findall(page.read_text()):
            if title:
                (folder / title).write_text(text)
    return folder, port


@pytest.fixture
def aws(s3) -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket="team")
    kms = boto3.client("kms")
    with contextlib.suppress(kms.exceptions.AlreadyExistsException):  # moto's are one for this process
        kms.create_alias(AliasName="alias/heliograph", TargetKeyId=kms.create_key()["KeyMetadata"]["KeyId"])


def script(page: Path) -> str:
    """Empty where the page has nothing to type."""
    lines = []
    for kind, title, text in BLOCK.findall(page.read_text()):
        if kind == "console":
            for line in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
                command = line.replace("pip install uv && ", "").replace("uv run ", "")
                if SERVES.match(command):
                    command = f"serving {command}"
                elif ASKS.match(command):  # where it is by default, another endpoint may be
                    command = f"{command} --url http://127.0.0.1:8000"
                if command != "pytest":  # which is at it
                    lines.append(command)
        elif kind == "python" and not title and page.stem != "tuning":  # of a program with a Ray of its own: below
            lines.append(f"python - <<'END'\n{text}END")
    return "\n".join([BEGINNING, *lines, ""]) if lines else ""


def here(page: Path) -> bool:
    return page.stem not in RUN_ELSEWHERE and bool(script(page))


@contextlib.contextmanager
def people(port: int) -> Iterator[None]:
    """Who asks the endpoint, as soon as there is one."""
    over, images = threading.Event(), load_digits().images

    def ask() -> None:
        number, url = 0, f"http://127.0.0.1:{port}/v1/models/digits:predict"
        with httpx.Client(timeout=5) as client:
            while not over.wait(0.1):
                rows = [{"image": images[(number + i) % len(images)].tolist()} for i in range(4)]
                with contextlib.suppress(httpx.HTTPError):
                    client.post(url, json={"instances": rows})
                    number += 4

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()


@pytest.mark.parametrize("page", filter(here, PAGES), ids=lambda page: page.stem)
def test_the_commands_of_a_page_do_what_they_say(clone, aws, tmp_path, page):
    made, port = clone
    folder = tmp_path / "clone"
    shutil.copytree(made, folder)
    (folder / "page.sh").write_text(script(page).replace("8000", str(port)))
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with (folder / "said").open("w") as said, people(port):
        reading = subprocess.Popen(
            ["bash", "page.sh"], cwd=folder, env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL
        )
        try:
            code = reading.wait(1400)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(reading.pid).children(recursive=True), psutil.Process(reading.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGKILL)
            reading.wait()
    assert code == 0, (folder / "said").read_text()


def test_the_search_of_a_program_of_ones_own(cluster):
    (block,) = blocks(ROOT / "docs" / "tuning.md", "python")
    made: dict = {}
    exec(block, made)
    assert made["best"].metrics["loss"] < 40
