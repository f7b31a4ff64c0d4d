"""`heliograph tune`: trials are trainings, a killed search goes on, and what is wrong is said before anything starts."""

import json
from pathlib import Path

import numpy as np
import pytest
from heliograph import project
from heliograph.cluster.runtime import free_port
from heliograph.errors import ProjectError
from heliograph.jobs.search import SEARCHES
from heliograph.jobs.tune import Record, configured, metric_of, space_of

MODEL = """\
import keras


def build(schema, hp):
    if hp.units == 13:
        raise ValueError("thirteen units bring bad luck")
    inputs = keras.Input(schema.input_shape)
    x = keras.layers.Dense(hp.units, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(schema.outputs, activation="softmax")(x))
"""
FILE = """\
name: tuned
data: {{source: rows.csv, target: kind, split: {{validation: 0.2, test: 0.1}}, shards: 2}}
model: {{hp: {{units: 8}}}}
train: {{epochs: 3, batch_size: 32, checkpoint: {{seconds: 0.5}}}}
serve: {{port: {port}}}
tune: {{trials: {trials}, parallel: {parallel}, {more}space: {space}}}
"""
SPACE = "{model.hp.units: {integer: [2, 40]}, train.optimizer.learning_rate: {log_uniform: [0.0001, 0.3]}}"


def write(folder: Path, space: str = SPACE, trials: int = 6, parallel: int = 1, more: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(MODEL)
    text = FILE.format(port=free_port(), trials=trials, parallel=parallel, more=more, space=space)
    (folder / "heliograph.yaml").write_text(text)
    if not (folder / "rows.csv").exists():
        points = np.random.default_rng(0).normal(size=(600, 3))
        kinds = (points[:, 0] * points[:, 1] > 0).astype(int)
        rows = [f"{a:.4f},{b:.4f},{c:.4f},{kind}" for (a, b, c), kind in zip(points, kinds, strict=True)]
        (folder / "rows.csv").write_text("a,b,c,kind\n" + "\n".join(rows) + "\n")
    return folder


def lines(folder: Path) -> list[dict]:
    file = folder / "runs" / "default" / "tune" / "trials.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.timeout(600)
def test_a_search_killed_twice_goes_on_and_its_trials_are_those_of_an_undisturbed_one(tmp_path, command):
    folder = write(tmp_path / "tuned", trials=7)
    for ended in (1, 3):  # in the middle of the trial after
        killed = command("tune", folder)
        killed.wait_for(
            lambda ended=ended: (
                sum(line["status"] == "finished" for line in lines(folder)) >= ended and lines(folder)[-1]["status"] == "running"
            ),
            f"trial {ended}'s end",
        )
        killed.kill()
    code, said = command("tune", folder).finish()
    assert code == 0, said
    found = lines(folder)
    finished = [line["number"] for line in found if line["status"] == "finished"]
    assert finished == list(range(1, 8))  # none lost, none twice
    configs = {line["number"]: line["config"] for line in found if line["status"] == "running"}
    values = {line["number"]: line["value"] for line in found if line["status"] == "finished"}
    loaded = project.load(folder)
    space, sign = space_of(loaded), -1.0 if metric_of(loaded)[1] == "max" else 1.0
    past: list = []
    for number in sorted(configs):
        assert SEARCHES["bayesian"](space, past, [], 0) == configs[number]
        past.append((configs[number], sign * values[number]))
    best = max(values, key=lambda n: values[n])
    made = project.load(folder / "runs" / "default" / "tune" / "best")
    assert made.model.hp["units"] == configs[best]["model.hp.units"]
    assert made.train.optimizer.learning_rate == configs[best]["train.optimizer.learning_rate"]
    kept = {int(p.parent.name) for p in (folder / "runs/default/tune/trials").glob("*/checkpoints")}
    assert kept == set(sorted(values, key=lambda n: -values[n])[:3])
    assert "What matters" in (folder / "runs/default/tune/report.html").read_text()
    write(folder, trials=8)  # one more: the others count
    code, said = command("tune", folder).finish()
    assert code == 0, said
    assert sum(line["status"] == "finished" for line in lines(folder)) == 8
    code, said = command("check", folder / "runs" / "default" / "tune" / "best").finish()
    assert code == 0, said


def test_failed_trials_are_told_slow_ones_are_stopped_and_a_small_space_ends(tmp_path, command):
    space = "{model.hp.units: {choice: [13, 16, 17]}, train.optimizer.learning_rate: {choice: [0.00001, 0.02]}}"
    folder = write(tmp_path / "tuned", space, trials=20, parallel=2, more="search: grid, scheduler: asha, grace: 1, ")
    code, said = command("tune", folder).finish()
    assert code == 0, said
    found = lines(folder)
    failed = [line for line in found if line["status"] == "failed"]
    assert len(failed) == 2
    assert all("thirteen units bring bad luck" in line["why"] for line in failed)
    assert "every configuration of the space was tried" in said
    ended = [line for line in found if line["status"] in ("finished", "stopped")]
    assert len(ended) == 4
    assert any(line["status"] == "stopped" and line["epochs"] < 3 for line in ended)


def test_every_mistake_is_a_line_and_nothing_starts(tmp_path, command):
    wrong = {
        "{}": "tune.space: is empty",
        "{model.hp.unit: {integer: [1, 2]}}": "tune.space.model.hp.unit: model.hp has no such parameter: it has units",
        "{data.shards: {integer: [1, 2]}}": "tune.space.data.shards: cannot be searched",
        "{train.batchsize: {integer: [1, 2]}}": "tune.space.train.batchsize: 1: Extra inputs are not permitted",
        "{train.batch_size: {integer: [0, 2]}}": "tune.space.train.batch_size: 0: should be greater than or equal to 1",
        "{train.ema: {uniform: [0.5, 1.5]}}": "tune.space.train.ema: 1.5: should be less than 1",
        "{model.hp.units: {integer: [1, 9], when: {train.epochs: [1]}}}": "`train.epochs` is not searched before it",
        "{model.hp.units: {integer: [5, 5]}}": "this one is empty",
        "{train.optimizer.learning_rate: {log_uniform: [0, 1]}}": "starts at 0, which has no logarithm",
        "{model.hp.units: {integer: [1, 5], choice: [1]}}": "a range is one of",
        "{model.hp.units: {choice: []}}": "name values, each once",
        "{model.hp.units: {uniform: [0.0, 1.0], step: 2.0}}": "more than the range is long",
    }
    for space, said in wrong.items():
        with pytest.raises(ProjectError) as caught:
            space_of(project.load(write(tmp_path / "p", space)))
        assert said in str(caught.value)
    with pytest.raises(ProjectError, match=r"tune\.metric: auc is not measured: loss, accuracy"):
        space_of(project.load(write(tmp_path / "p", more="metric: auc, ")))
    with pytest.raises(ProjectError, match=r"tune\.constraints: `model\.hp\.units >`"):
        space_of(project.load(write(tmp_path / "p", more="constraints: [model.hp.units >], ")))
    folder = write(tmp_path / "p", "{}")
    code, said = command("tune", folder).finish()
    assert (code, said) == (
        2,
        "error: heliograph.yaml: tune.space: is empty: name a key, such as train.optimizer.learning_rate, and its range\n",
    )
    assert not (folder / "runs").exists()


def test_trials_of_another_space_count_where_they_lie_in_it(tmp_path):
    loaded = project.load(write(tmp_path / "p"))
    about = {"prepared": "x"}
    record = Record(tmp_path / "tune", about)
    for number, units, of in ((1, 5, about), (2, 30, about), (3, 6, {"prepared": "y"})):
        record.write(number, config={"model.hp.units": units, "train.optimizer.learning_rate": 0.01}, status="running", about=of)
        record.write(number, status="finished", value=0.5)
    again = Record(tmp_path / "tune", about)
    assert [t["number"] for t in again.of(space_of(loaded), "finished")] == [1, 2]
    smaller = project.load(write(tmp_path / "p", SPACE.replace("[2, 40]", "[2, 20]")))
    assert [t["number"] for t in again.of(space_of(smaller), "finished")] == [1]


def test_a_configuration_sets_its_keys_and_nothing_else(tmp_path):
    loaded = project.load(write(tmp_path / "p"))
    made = configured(loaded, {"model.hp.units": 3, "train.stop.patience": 2, "train.optimizer.name": "sgd"})
    assert (made.model.hp["units"], made.train.stop.patience, made.train.optimizer.name) == (3, 2, "sgd")
    assert made.tune is None
    assert made.data == loaded.data
