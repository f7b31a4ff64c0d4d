"""Rows, the run with its shards and checkpoints, and the registry in object storage: the machine may be lost at any time."""

import io
import json
import random
import shutil
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliograph.cluster.mirror import MANIFEST, folder_of
from heliograph.cluster.objects import Bucket
from heliograph.cluster.runtime import free_port
from heliograph.datasets.schema import arrow_column
from heliograph.jobs.registry import PRODUCTION, registry_at
from heliograph.project import load
from sklearn.datasets import load_digits

from ..conftest import ROOT, iris_project
from ..tools import answers

RUN, REGISTRY = "s3://runs/digits", "s3://runs/registry"


@pytest.fixture
def folder(s3, tmp_path, monkeypatch):
    """The digits example; its rows are in the storage too."""
    digits = load_digits()
    made = tmp_path / "digits"
    shutil.copytree(ROOT / "examples" / "digits", made, ignore=shutil.ignore_patterns("runs", "registry", "__pycache__"))
    rows = io.BytesIO()
    pq.write_table(pa.table({"image": arrow_column(digits.images), "target": digits.target}), rows)
    Bucket("s3://runs/rows").send("digits.parquet", rows.getvalue())
    file = made / "heliograph.yaml"
    text = file.read_text().replace("sklearn://digits", "s3://runs/rows/*.parquet")
    text = text.replace("train:\n", "train:\n  checkpoint: {seconds: 0.3}\n").replace("port: 8000", f"port: {free_port()}")
    file.write_text(f"{text}registry: {REGISTRY}\nkeys: {tmp_path / 'keys'}\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    return made


def test_digits_with_everything_in_object_storage_goes_on_on_another_machine(folder, command, tmp_path, monkeypatch):
    bucket, draw = Bucket(RUN), random.Random(1)

    def stored() -> set[str]:
        found = bucket.get(MANIFEST)
        return set(json.loads(found[0])["files"]) if found else set()

    def trained() -> bool:
        return any("/checkpoints/step-" in name for name in stored())

    for happened, what in ((stored, "the first snapshot"), (trained, "a checkpoint that is stored"), (trained, "another one")):
        running = command("run", folder, "--run", RUN)
        running.wait_for(lambda happened=happened: bool(happened()), what)
        time.sleep(3 * draw.random())
        running.kill()
        shutil.rmtree(tmp_path / "machine")
    code, output = command("run", folder, "--run", RUN).finish()
    assert code == 0, output
    assert "prepare: reused" in output and f"model: digits@1 in {REGISTRY}" in output
    files = stored()
    assert {"report.json", "bundle/model.sig", "stages/predict.json"} <= files
    assert not any(name.startswith(("keys/", ".work/")) for name in files)
    shutil.rmtree(tmp_path / "machine")
    code, output = command("run", folder, "--run", RUN).finish()
    assert code == 0 and output.count("reused") >= 5, output
    assert not (folder / "runs").exists() and not (folder / "registry").exists()
    monkeypatch.setattr("heliograph.cluster.mirror.RUNS", tmp_path / "machine" / "heliograph" / "runs")
    run = folder_of(RUN)
    assert "going on after step" in (run / "run.log").read_text()
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert json.loads((run / "evaluate" / "metrics.json").read_text())["accuracy"] > 0.9

    shutil.rmtree(tmp_path / "machine")
    code, output = command("deploy", "digits@1", "--project", folder, "--percent", "100").finish()
    assert code == 0, output
    assert registry_at(REGISTRY, tmp_path).state("digits").aliases == {PRODUCTION: 1}
    code, output = command("models", "list", folder).finish()
    assert code == 0 and "digits@1" in output and "[production]" in output, output
    serving = command("serve", folder)
    url = f"http://127.0.0.1:{load(folder).serve.port}"
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([[[0.0] * 8] * 8]))
    serving.wait_for(lambda: answers(url), "the endpoint")
    trust = tmp_path / "keys" / "signing.pub"
    code, output = command("predict", rows, "--model", "digits", "--url", url, "--trust", trust).finish()
    assert code == 0, output
    code, output = command("models", "collect", folder, "--keep", "1").finish()
    assert code == 0 and "removed nothing" in output, output
    serving.end(signal.SIGINT)


def test_a_place_that_is_none_is_one_line(s3, command, tmp_path):
    folder = iris_project(tmp_path / "iris")
    for url, said in (("s3://nowhere/x", "there is no such bucket"), ("s3://x", "is no place in object storage")):
        code, output = command("run", folder, "--run", url).finish()
        assert code == 2 and said in output and "Traceback" not in output, output
