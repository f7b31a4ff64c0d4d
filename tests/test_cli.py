"""The front door: light, and a line that a person can act on for each mistake."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from heliograph import project
from heliograph.errors import DataError, HeliographError
from heliograph.jobs.check import check

from .conftest import ROOT, iris_project


def heliograph(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "heliograph", *map(str, arguments)], capture_output=True, text=True, check=False, cwd="/"
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import heliograph",
        "import heliograph; heliograph.Client('http://127.0.0.1:1', 'x')",
        "import heliograph.cli, heliograph.project",
        "import sys; sys.argv = ['heliograph', '--help']; from heliograph.cli import main; main()",
        "import sys; sys.argv = ['heliograph', 'run', '--help']; from heliograph.cli import main; main()",
    ],
)
def test_import_help_and_client_load_neither_ray_nor_tensorflow(code):
    probe = f"{code}\nimport sys\nassert not {{'ray', 'tensorflow', 'keras', 'sklearn'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_init_writes_a_project_that_passes_check(tmp_path):
    code, output = heliograph("init", tmp_path / "My Project")
    assert code == 0, output
    code, output = heliograph("check", tmp_path / "My Project")
    assert code == 0, output
    assert "10 classes" in output
    assert output.strip().endswith("ok")
    code, output = heliograph("init", tmp_path / "My Project")
    assert code == 2
    assert "holds a project already" in output


def test_what_nobody_can_catch_is_not_shown(tmp_path):
    rows = b"a,b\n" + b"1,2\n" * 20_000
    (tmp_path / "late.csv").write_bytes(rows + "1,été,3\n".encode("latin-1"))  # raises in pyarrow, where it tells of the line
    code, output = heliograph("init", tmp_path / "project", "--data", tmp_path / "late.csv")
    assert code == 2
    assert output.startswith("error: ")
    assert "late.csv: cannot be read as csv" in output
    assert "Traceback" not in output


def edited(folder: Path, file: str, old: str, new: str) -> Path:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    return folder


MISTAKES = [
    ("heliograph.yaml", "train:", "trian:", "heliograph.yaml:3: trian: unknown key: did you mean `train`?"),
    ("heliograph.yaml", "epochs: 6", 'epochs: "six"', "heliograph.yaml:3: train.epochs: found 'six': should be a valid integer"),
    ("heliograph.yaml", "iris.csv", "iris.parquet", "iris.parquet: not found"),
    ("heliograph.yaml", "target: species", "target: kind", "iris.csv: has no column `kind`: its columns are `length`"),
    ("heliograph.yaml", "name: adam", "name: adamant", "train.optimizer: `adamant`"),
    ("model.py", "import keras", "import kerass", "model.py:1: does not import: ModuleNotFoundError"),
    ("model.py", "def build", "def make", "model.py: has no function `build`"),
    ("model.py", "return keras.Model(", "return print(", "returned NoneType, not a keras.Model"),
    ("model.py", "schema.outputs", "7", "the model answers (7,) for a row, (3,) is needed: a probability for each of 3 classes"),
    ("model.py", "schema.input_shape", "(5,)", "input `features` has the shape (5,), the data (4,)"),
    ("model.py", 'activation="softmax"', 'activation="sigmoid"', "the outputs add up to"),
    ("model.py", "Dense(16", "Dense(-1", "model.py:6: build failed: ValueError"),
]


@pytest.mark.parametrize(("file", "old", "new", "line"), MISTAKES)
def test_check_explains_a_mistake_in_one_line(tmp_path, file, old, new, line):
    folder = edited(iris_project(tmp_path / "iris"), file, old, new)
    with pytest.raises(HeliographError) as caught:
        check(project.load(folder), folder)
    assert len(str(caught.value).splitlines()) == 1
    assert line in str(caught.value)


@pytest.mark.parametrize("number", [0, 3, 8])
def test_check_exits_with_2_and_shows_no_traceback(tmp_path, number):
    file, old, new, line = MISTAKES[number]
    folder = edited(iris_project(tmp_path / "iris"), file, old, new)
    code, output = heliograph("check", folder)
    assert code == 2
    assert output.startswith("error: ")
    assert len(output.splitlines()) == 1
    assert line in output
    assert not (folder / "runs").exists()


def test_check_refuses_a_target_of_one_class(tmp_path):
    folder = iris_project(tmp_path / "iris")
    edited(edited(folder, "iris.csv", "setosa", "virginica"), "iris.csv", "versicolor", "virginica")
    with pytest.raises(DataError, match="target `species` has one value only \\('virginica'\\)"):
        check(project.load(folder), folder)


@pytest.mark.parametrize("name", sorted(f.parent.name for f in (ROOT / "examples").glob("*/heliograph.yaml")))
def test_every_example_passes_check(name):
    folder = ROOT / "examples" / name
    assert check(project.load(folder), folder)[-1] == "ok"


def test_rotating_keys_needs_a_run(tmp_path):
    folder = iris_project(tmp_path / "iris")
    code, output = heliograph("rotate-keys", folder)
    assert code == 2
    assert "no such run" in output


def test_a_missing_project_and_a_missing_command_exit_with_2(tmp_path):
    code, output = heliograph("run", tmp_path)
    assert code == 2
    assert "not found: name a folder that holds a heliograph.yaml" in output
    code, output = heliograph("rnu")
    assert code == 2
    assert "No such command 'rnu'" in output


def test_a_port_in_use_is_said_before_anything_starts(tmp_path):
    folder = iris_project(tmp_path / "iris")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, output = heliograph("run", folder, "--port", str(taken.getsockname()[1]))
    assert (code, output.count("\n")) == (2, 1)
    assert "is in use: stop what listens there, or set another `serve.port`" in output
    assert not (folder / "runs" / "default" / "prepare").exists()


def test_predict_says_when_nobody_answers(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[[1, 2]]")
    code, output = heliograph("predict", rows, "--model", "x", "--url", "http://127.0.0.1:1")
    assert code == 2
    assert "cannot be reached" in output
    rows.write_text("{")
    code, output = heliograph("predict", rows, "--model", "x")
    assert code == 2
    assert "is not JSON" in output


def test_serve_says_when_there_is_nothing_to_serve_yet(tmp_path):
    code, output = heliograph("serve", iris_project(tmp_path / "iris"))
    assert code == 2
    assert "has no iris yet" in output
