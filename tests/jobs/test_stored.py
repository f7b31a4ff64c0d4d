"""A run whose home is object storage: the machine that it works on may be lost at any time."""

import json
import random
import shutil
import time

import pytest
from heliograph.cluster.mirror import MANIFEST, folder_of
from heliograph.cluster.objects import Bucket

from ..conftest import iris_project

URL = "s3://runs/iris"


@pytest.mark.timeout(600)
def test_a_run_goes_on_on_another_machine_from_what_was_stored(s3, command, tmp_path, monkeypatch):
    folder = iris_project(tmp_path / "iris", epochs=60)
    file = folder / "heliograph.yaml"
    file.write_text(file.read_text().replace("train: {", "train: {checkpoint: {seconds: 0.3}, ") + f"keys: {tmp_path / 'keys'}\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    bucket, draw = Bucket(URL), random.Random(1)

    def stored() -> set[str]:
        found = bucket.get(MANIFEST)
        return set(json.loads(found[0])["files"]) if found else set()

    def trained() -> bool:
        return any("/checkpoints/step-" in name for name in stored())

    for happened, what in ((stored, "the first snapshot"), (trained, "a checkpoint that is stored"), (trained, "another one")):
        running = command("run", folder, "--run", URL)
        running.wait_for(lambda happened=happened: bool(happened()), what)
        time.sleep(3 * draw.random())
        running.kill()
        shutil.rmtree(tmp_path / "machine")
    code, output = command("run", folder, "--run", URL).finish()
    assert code == 0, output
    assert "prepare: reused" in output
    files = stored()
    assert {"report.json", "bundle/model.sig", "stages/predict.json"} <= files
    assert not any(name.startswith(("keys/", ".work/")) for name in files)
    shutil.rmtree(tmp_path / "machine")
    code, output = command("run", folder, "--run", URL).finish()
    assert code == 0 and output.count("reused") >= 5, output
    monkeypatch.setattr("heliograph.cluster.mirror.CACHE", tmp_path / "machine" / "heliograph" / "runs")
    run = folder_of(URL)
    assert "going on after step" in (run / "run.log").read_text()
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 61))


def test_a_place_that_is_none_is_one_line(s3, command, tmp_path):
    folder = iris_project(tmp_path / "iris")
    for url, said in (("s3://nowhere/x", "there is no such bucket"), ("s3://x", "is no place in object storage")):
        code, output = command("run", folder, "--run", url).finish()
        assert code == 2 and said in output and "Traceback" not in output, output
