"""Whole runs, as a user starts, stops, kills and changes them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Command, iris_project

STAGES = ("prepare", "train", "evaluate", "validate", "bundle", "predict")


def stages(folder: Path) -> dict[str, bool]:
    """Each stage of the last run, and whether it was reused."""
    report = json.loads((folder / "runs" / "default" / "report.json").read_text())
    return {s["name"]: s["reused"] for s in report["stages"]}


def test_digits_reaches_97_percent_on_rows_it_has_not_seen(report):
    assert report["test"]["accuracy"] >= 0.97
    assert report["test"]["rows"] > 100
    assert report["test"]["roc_auc"] >= 0.99
    assert len(report["test"]["classes"]) == 10
    assert sum(map(sum, report["test"]["confusion"])) == report["test"]["rows"]


def test_both_ranks_end_with_the_same_weights(report):
    digests = report["train"]["weights_sha256"]
    assert len(digests) == report["train"]["workers"] == 2
    assert digests[0] == digests[1]


def test_the_sealed_answer_equals_the_local_model(report):
    assert report["request"]["gap_to_local_model"] <= 1e-5
    assert report["request"]["prediction"] == report["request"]["truth"]


def test_the_sealed_answer_equals_the_keras_model(digits, report):
    import keras
    import numpy as np
    from heliograph.datasets.preprocess import Preprocessing
    from heliograph.datasets.schema import Schema, parse_instances

    bundle = digits / "runs" / "default" / "bundle"
    schema = Schema.model_validate_json((bundle / "schema.json").read_text())
    preprocessing = Preprocessing.model_validate_json((bundle / "preprocess.json").read_text())
    inputs = preprocessing.apply(parse_instances([report["request"]["inputs"]], schema))
    own = keras.models.load_model(bundle / "model.keras").predict(inputs["image"], verbose=0)[0]
    assert schema.classes[int(np.argmax(own))] == report["request"]["prediction"]
    assert float(own.max()) == pytest.approx(report["request"]["probability"], abs=1e-5)


def test_metrics_have_a_line_an_epoch_and_tensorboard_the_same(digits):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    trained = digits / "runs" / "default" / "train"
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    events = EventAccumulator(str(trained / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    found = events.Tensors("epoch/loss")
    assert [event.step for event in found] == [line["step"] for line in lines]
    assert [float(make_ndarray(e.tensor_proto)) for e in found] == pytest.approx([line["loss"] for line in lines])


def test_a_second_run_reuses_everything_and_starts_no_ray(digits):
    code = (
        "import sys; sys.argv = ['heliograph', 'run', sys.argv[1]]\n"
        "from heliograph.cli import main; main()\n"
        "assert not {'ray', 'tensorflow'} & set(sys.modules), 'Ray or TensorFlow was loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(digits)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(stages(digits).values())


def test_the_report_is_one_page_that_needs_no_network(digits):
    page = (digits / "runs" / "default" / "report.html").read_text()
    assert "Test accuracy" in page
    assert page.count("<svg") == 6  # data, epochs, steps, confusion, curves, calibration
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_run_killed_in_every_stage_ends_as_if_it_had_not_been(tmp_path, command):
    folder = iris_project(tmp_path / "iris", epochs=40)
    run = folder / "runs" / "default"
    log = run / "run.log"

    def starts(stage: str) -> int:
        return log.read_text().count(f"{stage}: starts") if log.exists() else 0

    def kill_in(stage: str) -> None:
        before = starts(stage)
        started = command("run", folder)
        started.wait_for(lambda: starts(stage) > before, f"the start of {stage}")
        if stage == "train":
            work = run / ".work"
            started.wait_for(lambda: bool(list(work.glob("train-*/checkpoints/step-*"))), "the first checkpoint")
        assert not (run / stage).exists()
        started.kill()

    for stage in STAGES:
        kill_in(stage)
    code, output = command("run", folder).finish()
    assert code == 0, output
    assert stages(folder) == {name: name != "predict" for name in STAGES}
    assert starts("prepare") == 2
    assert starts("train") == 2
    assert "going on after step" in log.read_text()
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 41))
    assert list((run / ".work").iterdir()) == []

    (folder / "heliograph.yaml").write_text((folder / "heliograph.yaml").read_text().replace("epochs: 40", "epochs: 3"))
    code, output = command("run", folder).finish()
    assert code == 0, output
    assert stages(folder) == {name: name == "prepare" for name in STAGES}


@pytest.mark.parametrize(("number", "code", "stage"), [(signal.SIGINT, 130, "train"), (signal.SIGTERM, 143, "prepare")])
def test_a_stopped_run_leaves_nothing_behind(tmp_path, command, number, code, stage):
    folder = iris_project(tmp_path / "iris", epochs=100_000)
    started: Command = command("run", folder)
    work = folder / "runs" / "default" / ".work"
    log = work.parent / "run.log"
    if stage == "train":
        started.wait_for(lambda: bool(list(work.glob("train-*/checkpoints/step-*"))), "the first checkpoint")
    else:
        started.wait_for(lambda: log.exists() and "reading rows" in log.read_text(), "the reading of rows")
    assert len(started.left_behind()) == 1, "its own folder, and nothing beside it"
    ended, output = started.end(number)
    assert ended == code, output
    assert "the same command goes on from here" in output
    assert "Traceback" not in output
    assert started.left_running() == []
    assert started.left_behind() == []
    if stage == "train":
        assert list(work.glob("train-*/checkpoints/step-*")), "the checkpoint must survive"


def test_a_model_that_does_not_fit_is_one_line_and_what_is_done_is_kept(tmp_path, command):
    folder = iris_project(tmp_path / "iris")
    model = folder / "model.py"
    model.write_text(model.read_text().replace("schema.outputs", "7"))
    code, output = command("run", folder).finish()
    assert code == 2, output
    said = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "model.py: build: the model answers (7,) for a row, (3,) is needed" in said[0]
    assert "Traceback" not in output
    run = folder / "runs" / "default"
    assert (run / "prepare" / "manifest.json").exists()
    assert not (run / "train").exists()


def test_two_runs_in_one_folder_are_refused(tmp_path, command):
    from heliograph.cluster.storage import exclusive

    folder = iris_project(tmp_path / "iris")
    with exclusive(folder / "runs" / "default"):
        code, output = command("run", folder).finish()
    assert code == 2
    assert output.strip().endswith("wait for it or name another --run")
    assert str(os.getpid()) in output
