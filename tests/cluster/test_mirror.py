"""A run's folder and its home in object storage: snapshots that are whole, of one machine at a time."""

import json
import os
import random
import threading
import time

import boto3
import pytest
from heliograph.cluster.mirror import MANIFEST, Mirror, folder_of, placed, stored, url_of
from heliograph.cluster.objects import PART_BYTES, Bucket, Changed
from heliograph.errors import RunError, StorageError

URL = "s3://runs/digits"


def write(folder, **files):
    for name, content in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def content(folder):
    skipped = (".mirror.json",)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skipped}


@pytest.fixture
def here(s3, tmp_path):
    folder = tmp_path / "here"
    write(folder, run_log=b"one", prepare__rows=os.urandom(1000), stages__prepare=b"{}", big=os.urandom(2 * PART_BYTES + 5))
    mirror = Mirror(folder, URL)
    mirror.pull()
    assert mirror.push()
    return folder


def test_another_machine_has_what_was_stored_and_only_what_changed_is_sent_again(here, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    Mirror(there, URL).pull()
    assert content(there) == content(here)
    mirror = Mirror(there, URL)
    assert not mirror.push()
    write(there, run_log=b"one two")
    (there / "big").unlink()
    assert mirror.push()
    names = Bucket(URL).names()
    assert len(names) == 1 + 3  # the manifest; contents that no file has any more are gone
    Mirror(here, URL).pull()
    assert content(here) == content(there)


def test_two_machines_cannot_both_write(here, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    other = Mirror(there, URL)
    other.pull()
    mine = Mirror(here, URL)
    write(here, run_log=b"mine")
    write(there, run_log=b"theirs")
    assert other.push()
    with pytest.raises(RunError, match="another machine works on this run"):
        mine.push()


def test_what_was_done_here_and_not_stored_yet_is_kept(here):
    write(here, run_log=b"later than what is stored")
    mirror = Mirror(here, URL)
    mirror.pull()
    assert (here / "run_log").read_bytes() == b"later than what is stored"
    assert mirror.push()


def test_what_somebody_took_away_is_stored_again(here):
    bucket = Bucket(URL)
    mirror = Mirror(here, URL)
    mirror.pull()
    bucket.delete(bucket.names())
    write(here, run_log=b"more")
    with pytest.raises(StorageError, match="somebody took away what was stored there"):
        mirror.push()
    mirror = Mirror(here, URL)
    mirror.pull()
    assert mirror.push()
    assert len(bucket.names()) == 5  # all of it


def test_a_file_that_grows_and_commits_that_come_between_leave_every_snapshot_whole(here, tmp_path):
    """A stage's record and its folder change together; a reader must never have one without the other."""
    ended = threading.Event()

    def work():
        number = 0
        while not ended.is_set():
            number += 1
            write(here, **{".work__prepare__rows": str(number).encode()})
            (here / ".work" / "prepare.done").write_bytes(b"")
            (here / "prepare").rename(here / ".prepare.old")
            (here / ".work" / "prepare").rename(here / "prepare")
            (here / "stages" / "prepare.json").write_text(str(number))
            (here / ".work" / "prepare.done").unlink()
            for old in (here / ".prepare.old").iterdir():
                old.unlink()
            (here / ".prepare.old").rmdir()
            with (here / "steps.jsonl").open("a") as lines:
                lines.write(f"{number}\n")
            time.sleep(random.random() * 0.2)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        mirror, there = Mirror(here, URL), tmp_path / "there"
        there.mkdir()
        for _ in range(8):
            mirror.push()
            Mirror(there, URL).pull()
            record, rows = there / "stages" / "prepare.json", there / "prepare" / "rows"
            if record.exists() and rows.exists() and not list((there / ".work").glob("*.done")):
                assert record.read_text() == rows.read_text()
    finally:
        ended.set()
        thread.join()


def test_a_run_is_stored_while_it_works_and_at_its_end(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("heliograph.cluster.mirror.RUNS", tmp_path)
    monkeypatch.setattr("heliograph.cluster.mirror.SECONDS_BETWEEN", 0.1)
    folder = placed(URL)
    assert (folder, url_of(folder)) == (folder_of(URL), URL)
    with stored(folder, print):
        write(folder, a=b"1", keys__secret=b"not for others")
        end = time.monotonic() + 20
        while Bucket(URL).get(MANIFEST) is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        write(folder, b=b"2")
    files = json.loads(Bucket(URL).get(MANIFEST)[0])["files"]
    assert set(files) == {"a", "b"}


def test_a_changed_content_is_found_out(here, tmp_path):
    bucket = Bucket(URL)
    digest, _ = json.loads(bucket.get(MANIFEST)[0])["files"]["prepare/rows"]
    bucket.send(f"objects/{digest}", os.urandom(1000))
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises(StorageError, match="is not what was stored"):
        Mirror(there, URL).pull()
    assert not (there / "prepare" / "rows").exists()


def test_of_two_who_write_what_they_have_seen_one_wins(s3):
    bucket = Bucket(URL)
    tag = bucket.put("x", b"1", None)
    with pytest.raises(Changed):
        bucket.put("x", b"2", None)
    bucket.put("x", b"3", tag)
    with pytest.raises(Changed):
        bucket.put("x", b"4", tag)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://nowhere/x", "s3://nowhere/x: there is no such bucket: make it, or correct its name"),
        ("s3://x", "is no place in object storage"),
        ("gs://bucket/x", "is no place in object storage"),
    ],
)
def test_a_wrong_place_is_one_line(s3, tmp_path, url, said):
    with pytest.raises(StorageError, match=said):
        Mirror(tmp_path, url).pull()


def test_missing_credentials_and_a_server_that_is_away_are_one_line(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match="there are no credentials"):
        Mirror(tmp_path, URL).pull()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"s3://runs/digits: Could not connect"):
        Mirror(tmp_path, URL).pull()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("RequestTimeTooSkewed", "this machine's clock is wrong"),
        ("SignatureDoesNotMatch", "the secret key is wrong"),
        ("InvalidAccessKeyId", "the access key is not known there"),
    ],
)
def test_what_the_storage_refuses_is_explained(s3, monkeypatch, code, said):
    from botocore.exceptions import ClientError

    bucket = Bucket(URL)

    def refuse(**_):
        raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject")

    monkeypatch.setattr(bucket.client, "get_object", refuse)
    with pytest.raises(StorageError, match=said):
        bucket.get("x")


def test_the_client_is_not_pickled(s3):
    import pickle

    bucket = Bucket(URL)
    bucket.send("a", b"1")
    assert pickle.loads(pickle.dumps(bucket)).get("a")[0] == b"1"
    assert boto3.client("s3").list_buckets()["Buckets"][0]["Name"] == "runs"
