"""Versions that never change, aliases that are moved by one at a time, and what is thrown away."""

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from heliograph.errors import RegistryError, StorageError
from heliograph.jobs.bucket_registry import BucketRegistry, _Lease
from heliograph.jobs.registry import PRODUCTION, Registry, Rollout, State, registry_at

from ..conftest import ROOT


@pytest.fixture(params=["folder", "bucket"])
def registry(request, tmp_path, monkeypatch):
    monkeypatch.setattr("heliograph.cluster.mirror.RUNS", tmp_path / "cache")
    if request.param == "bucket":
        request.getfixturevalue("s3")
    made = registry_at("s3://runs/registry" if request.param == "bucket" else "registry", tmp_path)
    for i in range(1, 6):
        bundle = tmp_path / f"bundle-{i}"
        bundle.mkdir()
        (bundle / "model.sig").write_bytes(bytes([i]))
        (bundle / "bundle.json").write_text('{"lineage": {"source": "rows.csv", "code": "abcdef0123456789"}}')
        (bundle / "metrics.json").write_text(f'{{"accuracy": 0.{i}}}')
        assert made.add("pets", bundle) == i
    return made


def promoted(registry: Registry, version: int) -> bool:
    seen = registry.state("pets")
    print("ready", flush=True)
    input()  # all have read the same
    try:
        registry.replace("pets", seen, seen.moved(PRODUCTION, version))
    except RegistryError:
        return False
    return True


def test_of_those_who_move_an_alias_at_the_same_time_exactly_one_wins(registry):
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); from tests.jobs.test_registry import promoted; "
        "from heliograph.jobs.registry import registry_at; "
        "print(promoted(registry_at(sys.argv[1], Path()), int(sys.argv[2])))"
    )
    command = [sys.executable, "-c", script, str(registry)]
    racing = [
        subprocess.Popen([*command, str(v), str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for v in (1, 2, 3, 4)
    ]
    assert [process.stdout.readline() for process in racing] == ["ready\n"] * 4
    for process in racing:
        process.stdin.write("\n")
        process.stdin.flush()
    won = [v for v, process in enumerate(racing, 1) if process.communicate()[0].strip() == "True"]
    assert len(won) == 1
    state = registry.state("pets")
    assert state.aliases == {PRODUCTION: won[0]}
    assert [(c.alias, c.before, c.version) for c in state.history] == [(PRODUCTION, None, won[0])]


def test_a_change_that_was_made_from_an_older_state_is_refused_and_history_says_what_happened(registry):
    seen = registry.state("pets")
    registry.replace("pets", seen, seen.moved("staging", 2))
    with pytest.raises(RegistryError, match="somebody else changed"):
        registry.replace("pets", seen, seen.moved("staging", 3))
    now = registry.state("pets")
    registry.replace("pets", now, now.moved("staging", 4))
    assert registry.state("pets").aliases == {"staging": 4}
    assert [(c.before, c.version) for c in registry.state("pets").history] == [(None, 2), (2, 4)]


def test_what_an_alias_a_rollout_or_an_endpoint_uses_is_never_collected(registry):
    rollout = Rollout(version=2, percent=10, started=0, seconds=1, requests=1)
    registry.replace("pets", State(), State(aliases={PRODUCTION: 1}, rollout=rollout))
    held = registry.hold("pets", 3)
    assert registry.collect("pets", 1) == [4]
    assert registry.versions("pets") == [1, 2, 3, 5]
    held.close()
    assert registry.collect("pets", 1) == [3]
    ended = rollout.model_copy(update={"verdict": "rolled back: slow"})
    registry.replace("pets", registry.state("pets"), State(aliases={PRODUCTION: 1}, rollout=ended))
    assert registry.collect("pets", 1) == [2]
    assert registry.versions("pets") == [1, 5]
    left = registry.bucket.names() if isinstance(registry, BucketRegistry) else {p.name for p in registry.folder.rglob("*")}
    assert sum(name.startswith("contents/") for name in left) in (0, 6)  # three files of two versions
    assert not any(name.endswith(".gone") or name.startswith("held/") for name in left)


def test_a_version_says_where_it_comes_from(registry):
    registry.replace("pets", State(), State(aliases={PRODUCTION: 2, "staging": 2}))
    newest, *_ = registry.describe("pets")
    assert newest.startswith("pets@5  ") and "accuracy 0.5000" in newest and "from rows.csv" in newest
    assert "code abcdef012345" in newest
    assert registry.describe("pets")[3].endswith("[production]  [staging]")


def test_a_version_that_is_not_there_cannot_be_asked_for(registry):
    seen = registry.state("pets")
    with pytest.raises(RegistryError, match="has no pets@9: it has 1, 2, 3, 4, 5"):
        registry.replace("pets", seen, seen.moved("staging", 9))
    assert registry.state("pets") == seen


def test_what_is_published_again_keeps_its_version_and_what_is_fetched_is_what_was_published(registry, tmp_path):
    assert registry.add("pets", tmp_path / "bundle-3") == 3
    folder = registry.bundle("pets", 3)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "bundle-3").iterdir()
    }
    with pytest.raises(RegistryError, match="it has 1, 2"):
        registry.bundle("pets", 6)
    with pytest.raises(RegistryError, match="it knows pets"):
        registry.bundle("cats", 1)


@pytest.mark.parametrize("registry", ["bucket"], indirect=True)
class TestInABucket:
    def test_those_who_publish_at_the_same_time_get_numbers_of_their_own(self, registry, tmp_path):
        bundles = []
        for i in range(6, 12):
            bundles.append(shutil.copytree(tmp_path / "bundle-1", tmp_path / f"bundle-{i}"))
            (bundles[-1] / "model.sig").write_bytes(bytes([i]))
        ready = threading.Barrier(len(bundles))

        def publish(bundle: Path) -> int:
            mine = registry_at("s3://runs/registry", tmp_path)
            ready.wait()
            return mine.add("pets", bundle)

        with ThreadPoolExecutor(len(bundles)) as threads:
            versions = list(threads.map(publish, bundles))
        assert sorted(versions) == [6, 7, 8, 9, 10, 11]
        for bundle, version in zip(bundles, versions, strict=True):
            assert (registry.bundle("pets", version) / "model.sig").read_bytes() == (bundle / "model.sig").read_bytes()

    def test_a_holder_that_died_holds_nothing_after_a_while(self, registry, monkeypatch):
        monkeypatch.setattr("heliograph.jobs.bucket_registry.HELD_SECONDS", -1.0)
        held = _Lease.__new__(_Lease)
        held._bucket, held._key = registry.bucket, "held/pets/2/somebody"
        held._say()
        assert 2 in registry.collect("pets", 1)

    def test_a_version_that_is_asked_for_while_it_is_collected_stays(self, registry, monkeypatch):
        delete = registry.bucket.delete

        def late(keys):
            delete(keys)
            monkeypatch.undo()
            registry.hold("pets", 1)  # somebody had read it just before

        monkeypatch.setattr(registry.bucket, "delete", late)
        assert registry.collect("pets", 4) == []
        assert registry.versions("pets") == [1, 2, 3, 4, 5] and registry.bundle("pets", 1)

    def test_what_was_damaged_in_the_storage_is_refused(self, registry):
        for key in registry.bucket.names("contents/"):
            registry.bucket.send(key, b"other")
        with pytest.raises(StorageError, match="is not what was stored"):
            registry.bundle("pets", 2)
        assert not (registry.folder / "pets" / "2").exists()
