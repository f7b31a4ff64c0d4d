"""The documents: they build without a broken link, every command in them exists, every block of Python and YAML is right, and the
tutorial does what it says."""

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from heliograph import errors, project
from heliograph.cli import app
from heliograph.cluster.runtime import free_port
from heliograph.jobs.check import check
from typer.main import get_command

from .conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each heliograph command: of blocks, of indented lines, and of code in sentences."""
    text = page.read_text()
    lines = re.findall(r"^(?:    |\$ )(?:\$ )?((?:uv run )?heliograph .*)$", text, re.MULTILINE)
    lines += re.findall(r"`((?:uv run )?heliograph [a-z-]+ [^`\n]*)`", text)
    for line in lines:
        words = shlex.split(line.removeprefix("uv run "), comments=True)[1:]
        if not any("…" in word or word == "..." for word in words):
            yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_exists_with_its_options(page):
    group = get_command(app)
    for words in commands(page):
        name, *arguments = words
        command, within = group.commands.get(name), "heliograph"
        while command is not None and getattr(command, "commands", None) and arguments:
            command, within, arguments = command.commands.get(arguments[0]), name, arguments[1:]
        assert command is not None, f"{page.name}: there is no command `{' '.join(words)}`"
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        for word in arguments:
            if word.startswith("--"):
                assert word.split("=")[0] in options, f"{page.name}: `{' '.join(words)}`: {within} has no {word}"


def test_every_command_teaches_by_an_example():
    waiting = [("heliograph", get_command(app))]
    while waiting:
        name, command = waiting.pop()
        inner = getattr(command, "commands", {})
        waiting += [(f"{name} {each}", found) for each, found in inner.items()]
        assert inner or "Example:" in (command.help or ""), f"{name} --help has no example"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_python_and_yaml_can_be_read(page):
    for block in blocks(page, "python"):
        ast.parse(block)
    for block in blocks(page, "yaml"):
        yaml.safe_load(block)


def test_the_documents_build_without_a_broken_link(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    reference = tmp_path / "site" / "reference"
    assert "train.optimizer" in (reference / "project" / "index.html").read_text()
    assert "--force" in (reference / "commands" / "index.html").read_text()
    assert "Sends sealed requests" in (reference / "python" / "index.html").read_text()
    assert "KeyStoreError" in (reference / "errors" / "index.html").read_text()


def test_each_error_says_what_to_do_and_is_met_in_a_test():
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.HeliographError)]
    assert len(kinds) > 15
    for kind in kinds:
        assert kind.__doc__, f"{kind.__name__} says nothing in the catalogue"
        assert re.search(rf"\b{kind.__name__}\b", tests), f"no test meets {kind.__name__}"


def test_the_keras_tutorial_comes_over(tmp_path):
    page = ROOT / "docs" / "keras.md"
    (tmp_path / "model.py").write_text(blocks(page, "python")[0])
    (tmp_path / "heliograph.yaml").write_text(blocks(page, "yaml")[0])
    assert check(project.load(tmp_path), tmp_path)[-1] == "ok"


def test_the_tutorial_does_what_it_says(tmp_path):
    """Its blocks in their order, in an empty folder, as a newcomer types them. A server is asked, then interrupted."""
    page, port = ROOT / "docs" / "tutorial.md", free_port()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = ""
    for kind, block in re.findall(r"^```(console|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        code = block if kind == "python" else block.strip().removeprefix("$ ")
        command = [sys.executable, "-c", code] if kind == "python" else shlex.split(code)
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
        ) as running:
            if " serve " in code and kind == "console":
                assert any(line.startswith("serving ") for line in running.stdout), f"{code}: ended early"
                assert httpx.get(f"http://127.0.0.1:{port}/docs").status_code == 200
                running.send_signal(signal.SIGINT)
            output = running.communicate()[0]
            assert running.returncode == 0, f"{code}\n{output}"
            said += output
        if " init " in code:
            file = tmp_path / "tumours" / "heliograph.yaml"
            file.write_text(file.read_text().replace("port: 8000", f"port: {port}"))
    assert "beside scikit-learn" in said
    assert "no difference is shown" in said
