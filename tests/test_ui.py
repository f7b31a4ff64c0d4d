"""A run's page while it works and after, as a browser asks for it."""

import json
import os
import time
from pathlib import Path

import httpx
import pytest
from heliograph.errors import PortInUse
from heliograph.jobs import live
from heliograph.jobs.live import part, served
from heliograph.jobs.traffic_report import traffic


@pytest.fixture
def run(tmp_path) -> Path:
    """In the middle of its training, as the files of a run say it."""
    folder = tmp_path / "iris" / "runs" / "default"
    work = folder / ".work" / "train-0123456789abcdef"
    (folder / "stages").mkdir(parents=True)
    work.mkdir(parents=True)
    (folder / ".lock").write_text(str(os.getpid()))
    (folder / "stages" / "prepare.json").write_text(json.dumps({"name": "prepare", "fingerprint": "f", "seconds": 2.5}))
    (folder / "run.log").write_text("one line\n<b>another</b>\n")
    epochs = [{"epoch": e, "step": 4 * e, "loss": 1 / e, "val_loss": 1.2 / e} for e in (1, 2)]
    steps = [{"step": s, "epoch": 2, "end": 40, "loss": 1 / s, "rows_per_second": 100.0} for s in range(1, 9)]
    events = [{"step": 5, "kind": "anomaly", "text": "the loss is far from what it was"}]
    for name, lines in (("metrics", epochs), ("steps", steps), ("events", events)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_page_shows_what_is_at_work_and_then_the_report(run):
    with served(run, 0) as url:
        assert "<script>" in httpx.get(url).text
        first = httpx.get(f"{url}part")
        assert "train is at work" in first.text
        for said in ("prepare", "2.5 s", "Step 8 of 40, epoch 2", "the loss is far from what it was", "&lt;b&gt;another"):
            assert said in first.text
        assert first.text.count("<svg") == 2
        assert "run-ended" not in first.headers
        assert httpx.get(f"{url}report.html").status_code == 404
        (run / ".work" / "train-0123456789abcdef").replace(run / "train")
        (run / "stages" / "train.json").write_text(json.dumps({"name": "train", "fingerprint": "f", "seconds": 9.0}))
        assert "nothing is at work" in httpx.get(f"{url}part").text
        time.sleep(0.02)
        (run / "report.html").write_text("the report")
        last = httpx.get(f"{url}part")
        assert last.headers["run-ended"] == "yes"
        assert httpx.get(f"{url}report.html").text == "the report"
        port = int(url.rstrip("/").rsplit(":")[-1])
        with pytest.raises(PortInUse, match="in use: name another one with --port"), served(run, port):
            pass


def test_a_search_and_an_endpoint_are_shown_while_they_work(run):
    (run / "report.html").write_text("<main>the report</main>")
    with served(run, 0) as url:
        assert httpx.get(f"{url}traffic").text == ""
        trials = [
            {"number": 1, "status": "running"},
            {"number": 1, "status": "finished", "values": {"val_loss": 0.5}},
            {"number": 2, "status": "running"},
        ]
        (run / "tune").mkdir()
        (run / "tune" / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in trials))
        asked = {"model": "iris", "version": "3", "protocol": "ohttp", "rows": 2}
        lines = [{"time": 1000.0 + i, "id": str(i), "status": 200 if i else 400, "ms": 2.0 + i, **asked} for i in range(5)]
        lines.append({**lines[0], "time": 999.0, "model": "-"})  # of another replica, which wrote later
        (run / "serve.log").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut sho')
        shown = httpx.get(f"{url}part").text
        assert "2 trials: 1 finished, 1 running." in shown
        assert "6 requests since 1970-01-01 00:16:39 UTC" in shown
        assert "<td>iris@3</td><td>ohttp</td><td>200</td><td>4</td><td>8</td><td>4.50</td><td>5.97</td>" in shown
        assert "<td>other paths</td>" in shown
        tag = httpx.get(f"{url}traffic").headers["etag"]
        assert httpx.get(f"{url}traffic", headers={"if-none-match": tag}).status_code == 304
        assert 'look("traffic")' in httpx.get(f"{url}report.html").text


def test_what_an_endpoint_was_asked_is_read_again_when_there_is_more(run, monkeypatch):
    line = {"time": 1000.0, "status": 200, "ms": 2.0, "model": "iris", "version": "3", "protocol": "json", "rows": 1}
    log, read = run / "serve.log", []
    monkeypatch.setattr(live, "traffic", lambda folder: read.append(folder) or traffic(folder))
    log.write_text(json.dumps(line) + "\n")
    assert "1 requests since" in part(run)[0] and "1 requests since" in part(run)[0]
    assert len(read) == 1
    with log.open("a") as more:
        more.write(json.dumps(line) + "\n")
    assert "2 requests since" in part(run)[0]


def test_what_has_not_changed_is_not_sent_again_and_a_dead_run_is_not_at_work(run):
    (run / ".lock").write_text("999999999")
    assert "nothing is at work" in part(run)[0]
    with served(run, 0) as url:
        tag = httpx.get(f"{url}part").headers["etag"]
        assert httpx.get(f"{url}part", headers={"if-none-match": tag}).status_code == 304
