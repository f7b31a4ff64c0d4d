"""Mistakes that a newcomer makes: each gets a line that a person can act on and exit code 2, and leaves nothing half-written."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heliograph.cli import app
from typer.testing import CliRunner

from .conftest import iris_project


def typed(*arguments: str | Path) -> tuple[int, str]:
    """What a command that is typed in a terminal prints, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return done.exit_code, done.output


def change(file: str, old: str, new: str) -> Callable[[Path], Any]:
    def do(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return do


def write(file: str, content: str | bytes) -> Callable[[Path], Any]:
    def do(folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return do


def gone(file: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).unlink()


def nothing(_: Path) -> None: ...


YAML, CSV, MODEL = "heliograph.yaml", "iris.csv", "model.py"
HEAD = "length,width,petal_length,petal_width,species\n"
CHECK = ("check", "{}")
MISTAKES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], str]] = {
    "a wrong path": (nothing, ("run", "{}/nowhere"), "nowhere/heliograph.yaml: not found: name a folder"),
    "a file for a folder": (nothing, ("check", "{}/model.py"), "model.py"),
    "tabs in YAML": (change(YAML, "train: {", "train:\n\tepochs: 3\nx: {"), CHECK, "heliograph.yaml:4: "),
    "a bracket too few": (change(YAML, "shards: 2}", "shards: 2"), CHECK, "heliograph.yaml:"),
    "a key twice": (change(YAML, "name: iris", "name: iris\nname: irises"), CHECK, "name"),
    "a section misspelt": (change(YAML, "train:", "trian:"), CHECK, "trian: unknown key: did you mean `train`?"),
    "a word for a number": (change(YAML, "epochs: 6", "epochs: many"), CHECK, "train.epochs: found 'many': should be"),
    "a list for a section": (write(YAML, "- name: x\n"), CHECK, "heliograph.yaml:1: should be a mapping with these keys"),
    "an empty project file": (write(YAML, ""), CHECK, "heliograph.yaml:1: "),
    "a name with blanks": (change(YAML, "name: iris", "name: my iris"), CHECK, "name: found 'my iris'"),
    "all rows for testing": (change(YAML, "test: 0.2", "test: 0.9"), CHECK, "must leave rows to train on"),
    "the data elsewhere": (change(YAML, CSV, "data/iris.csv"), CHECK, "data/iris.csv: not found"),
    "an empty file": (write(CSV, ""), CHECK, "iris.csv"),
    "a header alone": (write(CSV, HEAD), CHECK, "has no rows"),
    "a CSV that is none": (write(CSV, bytes(range(256)) * 40), CHECK, "iris.csv"),
    "a CSV of Excel's": (write(CSV, f"{HEAD}1,2,3,4,été\n".encode("cp1252")), CHECK, "iris.csv:2: is not UTF-8: save"),
    "a Parquet file that is none": (
        lambda f: (write("iris.parquet", "a,b\n1,2\n")(f), change(YAML, "source: iris.csv", "source: iris.parquet")(f)),
        CHECK,
        "iris.parquet",
    ),
    "an empty folder of images": (
        lambda f: ((f / "photos").mkdir(), change(YAML, "source: iris.csv, target: species", "source: photos")(f)),
        CHECK,
        "photos",
    ),
    "the target misspelt": (change(YAML, "target: species", "target: specie"), CHECK, "has no column `specie`: its columns are"),
    "a feature misspelt": (
        change(YAML, "target: species,", "target: species, features: [lenght],"), CHECK, "has no column `lenght`",
    ),
    "a target that never changes": (write(CSV, HEAD + "1,2,3,4,setosa\n" * 30), CHECK, "has one value only ('setosa')"),
    "no model.py": (gone(MODEL), CHECK, "model.py: not found"),
    "a colon forgotten in model.py": (change(MODEL, "def build(schema, hp):", "def build(schema, hp)"), CHECK, "model.py:4: "),
    "a package that is not there": (change(MODEL, "import keras", "import torchh"), CHECK, "model.py:1: does not import"),
    "a function misspelt": (change(MODEL, "def build", "def biuld"), CHECK, "has no function `build`"),
    "nothing returned": (change(MODEL, "return keras.Model", "keras.Model"), CHECK, "returned NoneType, not a keras.Model"),
    "too few outputs": (change(MODEL, "schema.outputs", "2"), CHECK, "the model answers (2,) for a row, (3,) is needed"),
    "softmax forgotten": (change(MODEL, ', activation="softmax"', ""), CHECK, "outputs"),
    "an optimizer misspelt": (change(YAML, "name: adam", "name: adma"), CHECK, "train.optimizer: `adma`"),
    "a loss for another task": (change(YAML, "epochs: 6", "epochs: 6, loss: nosuch"), CHECK, "train.loss"),
    "a preset for other data": (change(YAML, "train:", "model: {preset: image}\ntrain:"), CHECK, "write `tabular`"),
    "a preset misspelt": (change(YAML, "train:", "model: {preset: tabluar}\ntrain:"), CHECK, "model.preset: found 'tabluar'"),
    "a command misspelt": (nothing, ("chekc", "{}"), "No such command 'chekc'"),
    "an option misspelt": (nothing, ("run", "{}", "--prot", "8000"), "No such option"),
    "init in a project": (nothing, ("init", "{}"), "holds a project already: name another folder"),
    "init with data that is not there": (nothing, ("init", "{}/new", "--data", "{}/irises.csv"), "irises.csv: not found"),
    "serve before run": (nothing, ("serve", "{}"), "has no iris yet: run `heliograph run"),
    "export before run": (nothing, ("export", "{}", "{}/saved"), "run"),
    "suspects before run": (nothing, ("suspects", "{}"), "has no prepared rows yet: run `heliograph run"),
    "deploy of nothing": (nothing, ("deploy", "iris@7", "--project", "{}"), "iris"),
    "no cluster named": (nothing, ("plan", "{}"), "names no cluster: add `cluster: FILE` or give --cluster FILE"),
    "a cluster file that is not there": (nothing, ("plan", "{}", "--cluster", "{}/gpus.yaml"), "gpus.yaml: not found"),
    "rows that are no JSON": (
        write("rows.json", "{"), ("predict", "{}/rows.json", "--model", "iris"), "rows.json: is not JSON",
    ),
    "an endpoint that is off": (
        write("rows.json", "[[1,2,3,4]]"), ("predict", "{}/rows.json", "--model", "iris", "--url", "http://127.0.0.1:9"),
        "cannot be reached",
    ),
    "a forgotten key": (
        write("rows.json", "[[1,2,3,4]]"),
        ("predict", "{}/rows.json", "--model", "iris", "--trust", "{}/signing.pub"),
        "signing.pub: not found: name the public key",
    ),
    "a comparison with nothing": (nothing, ("compare", "iris@1", "iris@2", "--project", "{}"), "has no prepared rows yet"),
    "keys rotated before run": (nothing, ("rotate-keys", "{}"), "no such run"),
    "a run that is a file": (nothing, ("run", "{}", "--run", "{}/model.py"), "model.py: is a file: a run is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_line_that_a_person_can_act_on(tmp_path, name):
    arrange, arguments, expected = MISTAKES[name]
    folder = iris_project(tmp_path / "iris")
    arrange(folder)
    before = sorted(f.relative_to(folder) for f in folder.rglob("*"))
    code, output = typed(*(a.replace("{}", str(folder)) for a in arguments))
    print(output)
    assert code == 2
    assert expected in output
    assert "Traceback" not in output
    assert "bug:" not in output
    left = [f for f in sorted(f.relative_to(folder) for f in folder.rglob("*")) if f not in before and f.name != "__pycache__"]
    assert [f for f in left if f.suffix != ".pyc"] == []


def test_a_full_disk_is_a_line(tmp_path, monkeypatch):
    from heliograph.jobs import run

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28), str(tmp_path / "iris" / "runs"))

    monkeypatch.setattr(run, "prepare", full)
    code, output = typed("run", iris_project(tmp_path / "iris"))
    assert code == 2
    assert "No space left on device" in output


def test_an_old_python_and_open_keys_are_found_by_doctor(tmp_path, monkeypatch):
    from heliograph import project
    from heliograph.jobs import doctor

    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    found = doctor._python()
    assert (found.state, found.do) == ("bad", "install Python 3.11 or newer: uv python install 3.11")
    folder = iris_project(tmp_path / "iris")
    (folder / "runs" / "default" / "keys").mkdir(parents=True)
    (folder / "runs" / "default" / "keys" / "signing.key").write_text("x")
    (folder / "runs" / "default" / "keys" / "signing.key").chmod(0o644)
    (keys,) = doctor._keys(project.load(folder), folder)
    assert (keys.state, keys.do) == ("bad", f"chmod 600 {folder / 'runs' / 'default' / 'keys'}/*")
