"""The project file: every mistake with its line, all at once."""

import pytest
from heliograph import project
from heliograph.errors import ProjectError

from .conftest import ROOT

GOOD = "name: x\ndata: {source: a.csv, target: y}\n"
STEP = "name: x\ndata: {{source: a.csv, target: y, preprocess:\n  [{}]}}\n"


def load(tmp_path, text: str) -> project.Project:
    (tmp_path / "heliograph.yaml").write_text(text)
    return project.load(tmp_path)


def problems(tmp_path, text: str) -> list[str]:
    with pytest.raises(ProjectError) as caught:
        load(tmp_path, text)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_the_example_loads():
    loaded = project.load(ROOT / "examples" / "digits")
    assert loaded.name == "digits"
    assert loaded.train.workers == 2
    assert loaded.data.encrypt


def test_two_keys_are_enough(tmp_path):
    loaded = load(tmp_path, GOOD)
    assert loaded.data.split.test == 0.1
    assert loaded.train.optimizer.learning_rate == 0.001


def test_all_mistakes_are_said_at_once_each_with_its_line(tmp_path):
    text = """\
name: Digits
data:
  sorce: x
  target: 3
  split: {validation: 0.9, test: 0.2}
  preprocess:
    - {step: standardize}
train:
  workers: 0
  epochs: 3
  epochs: 4
  optimizer: {name: adam, learning_rate: -1, beta_1: 0.9}
serve: {host: 0.0.0.0}
"""
    assert problems(tmp_path, text) == [
        "heliograph.yaml:1: name: found 'Digits': should be the model's name in URLs: lower-case letters, digits, `-` and `_`",
        "heliograph.yaml:2: data.source: is missing: `sklearn://digits`, a path or glob or `s3://` address of files "
        "or of images in folders, or `file:function`",
        "heliograph.yaml:3: data.sorce: unknown key: did you mean `source`?",
        "heliograph.yaml:4: data.target: found 3: should be a valid string",
        "heliograph.yaml:5: data.split: found {'validation': 0.9, 'test': 0.2}: "
        "validation and test together must leave rows to train on (their sum below 1)",
        "heliograph.yaml:7: data.preprocess[0].step: found 'standardize': did you mean `standardise`?",
        "heliograph.yaml:9: train.workers: found 0: should be greater than or equal to 1",
        "heliograph.yaml:11: train.epochs: stands here a second time: keep one",
        "heliograph.yaml:12: train.optimizer.learning_rate: found -1: should be greater than 0",
        "heliograph.yaml:13: serve: found {'host': '0.0.0.0'}: "
        "host is 0.0.0.0, which others can reach: that needs tls: true and access: tokens beside it",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: x\n\tdata: 1\n", "heliograph.yaml:2: found character '\\t' that cannot start any token (indent with spaces"),
        (
            "- name\n",
            "heliograph.yaml:1: should be a mapping with these keys: name, data, model, train, evaluate, explain, serve, tune",
        ),
        ("", "heliograph.yaml:1: should be a mapping with these keys"),
        (GOOD + "train: {workers: 9, batch_size: 64}\n", "train.workers is 9, but data.shards is 8"),
        (GOOD + "train: {workers: 4, batch_size: 4}\n", "train.batch_size is 4, but 4 workers need at least 8 rows"),
        (
            GOOD + "model: {build: model.build}\n",
            "model.build: found 'model.build': should be `file:function`",
        ),
        (GOOD + "serve: {port: 70000}\n", "heliograph.yaml:3: serve.port: found 70000: should be less than or equal to 65535"),
        (STEP.format("{step: clip, lo: 1}"), "heliograph.yaml:3: data.preprocess[0].lo: unknown key: did you mean `low`?"),
        (STEP.format("{step: clip}"), "data.preprocess[0]: found {'step': 'clip'}: clip needs `low` or `high`"),
        (STEP.format("{columns: [a]}"), "data.preprocess[0].step: is missing: known here: impute, standardise"),
        (STEP.format("{step: pad}"), "heliograph.yaml:3: data.preprocess[0].length: is missing"),
        (STEP.format("{step: pad, length: 0}"), "data.preprocess[0].length: found 0: should be greater than or equal to 1"),
        (GOOD + "train:\n", "heliograph.yaml:3: train: found nothing: should be a valid dictionary"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, text, line):
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert line in found[0]
