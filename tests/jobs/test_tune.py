"""`heliograph tune`: trials are trainings, a killed search goes on, and what is wrong is said before anything starts."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from heliograph import project
from heliograph.cluster.bill import COST
from heliograph.cluster.runtime import JOINED, free_port
from heliograph.cluster.spec import Capacity, Group
from heliograph.cluster.storage import write_json
from heliograph.errors import ProjectError
from heliograph.jobs.display import Display
from heliograph.jobs.record import Record
from heliograph.jobs.run import execute
from heliograph.jobs.search import SEARCHES
from heliograph.jobs.space import configured, settings_of, signs_of, space_of
from heliograph.jobs.stages import Run
from heliograph.jobs.trials import late, told
from heliograph.jobs.tune import tune
from rich.console import Console

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
data: {{{data}source: rows.csv, target: kind, split: {{validation: 0.2, test: 0.1}}, shards: {shards}}}
model: {{hp: {{units: 8}}}}
train: {{epochs: {epochs}, workers: {workers}, batch_size: 32, checkpoint: {{seconds: 0.5}}}}
serve: {{port: {port}}}
tune: {{trials: {trials}, parallel: {parallel}, {more}space: {space}}}
"""
SPACE = "{model.hp.units: {integer: [2, 40]}, train.optimizer.learning_rate: {log_uniform: [0.0001, 0.3]}}"


def write(folder: Path, space: str = SPACE, trials: int = 6, parallel: int = 1, more: str = "", **given: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(MODEL)
    settings = {"epochs": 3, "workers": 1, "shards": 2, "data": ""} | given
    text = FILE.format(port=free_port(), trials=trials, parallel=parallel, more=more, space=space, **settings)
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


def searched(folder: Path, cluster, name: str = "default") -> str:
    """What `heliograph tune` says, without a process of its own."""
    console = Console(file=io.StringIO(), width=300)
    found = tune(project.load(folder), folder, Run(folder / "runs" / name, cluster, Display(console)))
    return console.file.getvalue() + "\n".join(found)


def test_a_search_killed_twice_goes_on_and_its_trials_are_those_of_an_undisturbed_one(tmp_path, command, cluster):
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
    loaded = project.load(folder)
    space, sign = space_of(loaded), signs_of(loaded)[0]
    configs = {line["number"]: {key: line["settings"][key] for key in space.dimensions} for line in found if "settings" in line}
    ended = {line["number"]: line for line in found if line["status"] == "finished"}
    values = {number: line["values"]["val_accuracy"] for number, line in ended.items()}
    past: list = []
    for number in sorted(configs):
        assert SEARCHES["bayesian"](space, past, [], 0) == configs[number]
        past.append((configs[number], told(late(ended[number]["curve"]), sign)))
    best = max(values, key=lambda n: values[n])
    made = project.load(folder / "runs" / "default" / "tune" / "best")
    assert made.model.hp["units"] == configs[best]["model.hp.units"]
    assert made.train.optimizer.learning_rate == configs[best]["train.optimizer.learning_rate"]
    kept = {int(p.parent.name) for p in (folder / "runs/default/tune/trials").glob("*/checkpoints")}
    assert kept == set(sorted(values, key=lambda n: -values[n])[:3])
    assert "What matters" in (folder / "runs/default/tune/report.html").read_text()
    write(folder, trials=8)  # one more: the others count
    searched(folder, cluster)
    assert sum(line["status"] == "finished" for line in lines(folder)) == 8


def test_failed_trials_are_told_and_a_small_space_ends(tmp_path, cluster):
    space = "{model.hp.units: {choice: [13, 16, 17]}, train.optimizer.learning_rate: {choice: [0.00001, 0.02]}}"
    folder = write(tmp_path / "tuned", space, trials=20, parallel=2, more="search: grid, ")
    said = searched(folder, cluster)
    failed = [line for line in lines(folder) if line["status"] == "failed"]
    assert len(failed) == 2
    assert all("thirteen units bring bad luck" in line["why"] for line in failed)
    assert "every configuration of the space was tried" in said
    assert sum(line["status"] == "finished" for line in lines(folder)) == 4


def test_halving_holds_what_is_behind_and_goes_on_after_a_kill(tmp_path, command):
    """Of 9 trials three go on after the first epoch, and one of them to the end; each epoch is trained once."""
    folder = write(tmp_path / "tuned", trials=9, more="scheduler: asha, grace: 1, search: random, ", epochs=9)
    killed = command("tune", folder)
    killed.wait_for(lambda: sum(line["status"] == "paused" for line in lines(folder)) >= 4, "four trials' pause")
    killed.kill()
    code, said = command("tune", folder).finish()
    assert code == 0, said
    ended = {line["number"]: line for line in lines(folder) if line["status"] in ("finished", "stopped")}
    assert sorted(ended) == list(range(1, 10))
    lengths = sorted(len(line["curve"]) for line in ended.values())
    assert lengths == [1] * 6 + [3] * 2 + [9]
    for number, line in ended.items():
        at = folder / "runs/default/tune/trials" / f"{number:04}" / "metrics.jsonl"
        trained = [json.loads(text)["epoch"] for text in at.read_text().splitlines()]
        assert trained == list(range(1, len(line["curve"]) + 1))
    first = sorted((line["curve"][0] for line in ended.values()), reverse=True)
    promoted = [line["curve"][0] for line in ended.values() if len(line["curve"]) > 1]
    assert min(promoted) >= first[4]  # the best third of those that had come, each time
    assert "stopped: after epoch 1 of 9 it was" in " ".join(said.split())


def test_fractions_of_the_data_and_brackets(tmp_path, cluster):
    folder = write(
        tmp_path / "tuned", trials=6, more="scheduler: hyperband, fidelity: data, search: random, ", epochs=2, shards=9
    )
    searched(folder, cluster)
    ended = {line["number"]: line for line in lines(folder) if line["status"] in ("finished", "stopped")}
    assert len(ended) == 6
    trials = folder / "runs/default/tune/trials"
    levels = [(trials / "0001" / f"level-{k}" / "steps.jsonl").exists() for k in (1, 2, 3)]
    assert levels[: len(ended[1]["curve"])] == [True] * len(ended[1]["curve"])
    rows = {k: json.loads(next(trials.glob(f"*/level-{k}/metrics.jsonl")).read_text().splitlines()[0])["step"] for k in (1, 3)}
    assert rows[3] >= 6 * rows[1]  # steps of an epoch: a ninth of the shards, and all


def test_a_population_takes_over_what_is_best_and_goes_on_after_a_kill(tmp_path, command):
    more = "scheduler: pbt, grace: 2, search: random, "
    space = "{train.optimizer.learning_rate: {choice: [1.0e-7, 0.01, 0.02, 1.1e-7]}, model.hp.units: {integer: [16, 20]}}"
    folder = write(tmp_path / "tuned", space, trials=4, parallel=2, more=more, epochs=6)
    killed = command("tune", folder)
    killed.wait_for(lambda: any(line.get("from") is not None for line in lines(folder)), "the first that takes over")
    killed.kill()
    code, said = command("tune", folder).finish()
    assert code == 0, said
    found = lines(folder)
    ended = {line["number"]: line for line in found if line["status"] == "finished"}
    assert sorted(ended) == [1, 2, 3, 4]
    assert all(len(line["curve"]) == 6 for line in ended.values())
    for line in found:
        if line.get("from") is not None:  # weights come with what they belong to, the rest may change
            parent = next(x for x in found if x["number"] == line["from"] and "settings" in x)
            assert line["settings"]["model.hp.units"] == parent["settings"]["model.hp.units"]


def test_several_metrics_and_ways_to_prepare(tmp_path, cluster):
    """The smallest model whose accuracy is near the best; trials on data of their own."""
    space = "{model.hp.units: {choice: [2, 64, 512]}, data.preprocess.0.step: {choice: [standardise, min_max]}}"
    more = "search: grid, metric: [val_accuracy, parameters], tolerance: 1.0, "
    folder = write(tmp_path / "tuned", space, trials=6, parallel=2, more=more, data="preprocess: [{step: standardise}], ")
    said = searched(folder, cluster)
    ended = [line for line in lines(folder) if line["status"] == "finished"]
    assert len(ended) == 6
    assert {line["values"]["parameters"] for line in ended} == {2 * 4 + 3 * 2, 64 * 4 + 65 * 2, 512 * 4 + 513 * 2}
    assert len(list((folder / "runs/default/tune/data").iterdir())) == 2
    assert "on the Pareto front; chosen: best in parameters among those whose val_accuracy is within 1" in said
    made = project.load(folder / "runs" / "default" / "tune" / "best")
    assert made.model.hp["units"] == 2
    assert "Pareto front" in (folder / "runs/default/tune/report.html").read_text()


def test_no_trial_begins_that_would_cost_too_much(tmp_path, cluster, monkeypatch):
    """On a cluster with prices: 1.50 dollars were spent; a trial, and another one would cost as much again."""
    head, nodes = Group("head", {"CPU": 0.0}, 1, 1, 0.1, {}), Group("cpu", {"CPU": 2.0}, 0, 2, 1.0, {})
    folder = write(tmp_path / "tuned", more="search: random, dollars: 2.0, ")
    monkeypatch.setenv(JOINED, Capacity(head, (nodes,), 2).dumps())
    write_json(folder / "runs" / "default" / COST, {"dollars": 1.5})
    said = searched(folder, cluster)
    assert "the search ends early: the run has cost $3.00, or would with one more trial, and tune.dollars is $2.00" in said
    assert [line["number"] for line in lines(folder) if line["status"] == "finished"] == [1]
    monkeypatch.setenv(JOINED, Capacity(head, (replace(nodes, dollars=None),), 2).dumps())
    with pytest.raises(ProjectError, match=r"tune\.dollars: nodes without a price: cpu"):
        searched(folder, cluster)


def test_trials_of_two_workers_share_their_group_and_start_from_another_run(tmp_path, cluster):
    """And the best one equals the training of the same configuration by a run."""
    folder = write(tmp_path / "tuned", trials=3, more="search: random, ", workers=2)
    searched(folder, cluster)
    events = [(folder / f"runs/default/tune/trials/000{n}/events.jsonl").read_text() for n in (1, 2, 3)]
    assert all("2 workers, from the start" in text for text in events)
    best = folder / "runs" / "default" / "tune" / "best"
    value = max(line["values"]["val_accuracy"] for line in lines(folder) if line["status"] == "finished")
    execute(project.load(best), best, Run(best / "runs" / "default", cluster, Display(Console(file=io.StringIO()))))
    assert json.loads((best / "runs/default/train/result.json").read_text())["val_accuracy"] == pytest.approx(value, abs=1e-6)

    # Another space and other settings: what was best is tried first, moved into it.
    space = "{model.hp.units: {integer: [2, 20]}, train.optimizer.learning_rate: {log_uniform: [0.0001, 0.3]}}"
    write(folder, space, trials=2, more="warm_start: [runs/default], ", epochs=2)
    said = searched(folder, cluster, "next")
    assert "0 trials of earlier runs count, 3 say what to try first" in said
    first = json.loads((folder / "runs/next/tune/trials.jsonl").read_text().splitlines()[0])["settings"]
    assert first["train.optimizer.learning_rate"] == project.load(best).train.optimizer.learning_rate
    assert first["model.hp.units"] == min(20, project.load(best).model.hp["units"])


def test_every_mistake_is_a_line_and_nothing_starts(tmp_path, command):
    wrong = {
        "{}": "tune.space: is empty",
        "{model.hp.unit: {integer: [1, 2]}}": "tune.space.model.hp.unit: model.hp has no such parameter: it has units",
        "{data.shards: {integer: [1, 2]}}": "tune.space.data.shards: cannot be searched: all trials share data.shards",
        "{train.workers: {integer: [1, 2]}}": "tune.space.train.workers: cannot be searched: all trials share train.workers",
        "{serve.cpus: {integer: [1, 2]}}": "tune.space.serve.cpus: cannot be searched: keys of train, model.hp and data can",
        "{data.preprocess.4.buckets: {integer: [1, 2]}}": "data.preprocess.4.buckets: the project has nothing there",
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
    settings = {
        "metric: auc": "tune.metric: auc is not measured: loss, accuracy",
        "metric: parameters": "tune.metric: parameters is not measured: loss, accuracy",
        "metric: [val_loss, size]": "tune.metric: size is not measured",
        "metric: [val_loss, val_loss]": "tune.metric: names one metric twice",
        "scheduler: asha": "tune.grace: is 3, and trials have 3 epochs: asha has nothing to decide",
        "scheduler: asha, fidelity: data": "data.shards is 2: fractions need 3 or more",
        "scheduler: pbt, fidelity: data": "pbt trains on all of the data",
    }
    for more, said in settings.items():
        with pytest.raises(ProjectError, match=re.escape(said)):
            space_of(project.load(write(tmp_path / "p", more=f"{more}, ")))
    with pytest.raises(ProjectError, match="pbt changes what can change while a model trains"):
        space_of(project.load(write(tmp_path / "p", "{model.hp.units: {integer: [2, 9]}}", more="scheduler: pbt, grace: 1, ")))
    with pytest.raises(ProjectError, match=r"tune\.constraints: `model\.hp\.units >`"):
        space_of(project.load(write(tmp_path / "p", more="constraints: [model.hp.units >], ")))
    folder = write(tmp_path / "p", "{}")
    code, said = command("tune", folder).finish()
    assert (code, said) == (
        2,
        "error: heliograph.yaml: tune.space: is empty: name a key, such as train.optimizer.learning_rate, and its range\n",
    )
    assert not (folder / "runs").exists()
    money = write(tmp_path / "money", more="dollars: 2.0, ")
    code, said = command("tune", money).finish()
    assert (code, said.count("\n")) == (2, 1)
    assert "tune.dollars: is counted by a cluster's prices: `heliograph submit --tune` sends it to one" in said
    warm = write(tmp_path / "warm", more="warm_start: [nowhere], ")
    code, said = command("tune", warm).finish()
    assert code == 2
    assert "tune.warm_start: " in said
    assert "nowhere: holds no search" in said


def test_trials_of_another_space_count_where_they_lie_in_it(tmp_path):
    """Whatever was searched when they were made."""
    loaded = project.load(write(tmp_path / "p"))
    record = Record(tmp_path / "tune", "x", space_of(loaded), settings_of(loaded))
    for number, units, about in ((1, 5, "x"), (2, 30, "x"), (3, 6, "y")):
        record.about = about
        made = configured(loaded, {"model.hp.units": units, "train.optimizer.learning_rate": 0.01})
        record.begin(number, settings_of(made))
        record.end(number, "finished", values={"val_accuracy": 0.5}, curve=[0.5])

    def known(space: str, units: int = 8) -> list[int]:
        folder = write(tmp_path / "p", space)
        text = (folder / "heliograph.yaml").read_text().replace("{units: 8}", f"{{units: {units}}}")
        (folder / "heliograph.yaml").write_text(text)
        other = project.load(folder)
        return [t.number for t in Record(tmp_path / "tune", "x", space_of(other), settings_of(other)).of("finished")]

    assert known(SPACE) == [1, 2]
    assert known(SPACE.replace("[2, 40]", "[2, 20]")) == [1]
    only_rate = "{train.optimizer.learning_rate: {log_uniform: [0.0001, 0.3]}}"
    assert known(only_rate) == []
    assert known(only_rate, units=30) == [2]
    assert known(SPACE[:-1] + ", train.label_smoothing: {uniform: [0.0, 0.2]}}") == [1, 2]
    assert known(SPACE[:-1] + ", train.label_smoothing: {uniform: [0.1, 0.2]}}") == []


def test_a_configuration_sets_its_keys_and_nothing_else(tmp_path):
    loaded = project.load(write(tmp_path / "p"))
    made = configured(loaded, {"model.hp.units": 3, "train.stop.patience": 2, "train.optimizer.name": "sgd"})
    assert (made.model.hp["units"], made.train.stop.patience, made.train.optimizer.name) == (3, 2, "sgd")
    assert made.tune is None
    assert made.data == loaded.data
