"""Versions that never change, aliases that are moved by one at a time, and what is thrown away."""

import subprocess
import sys
import time

import pytest
from heliograph.errors import RegistryError
from heliograph.jobs.registry import PRODUCTION, Registry, Rollout, State

from ..conftest import ROOT


@pytest.fixture
def registry(tmp_path):
    made = Registry(tmp_path / "registry")
    for i in range(1, 6):
        bundle = tmp_path / f"bundle-{i}"
        bundle.mkdir()
        (bundle / "model.sig").write_bytes(bytes([i]))
        (bundle / "bundle.json").write_text('{"lineage": {"source": "rows.csv", "code": "abcdef0123456789"}}')
        (bundle / "metrics.json").write_text(f'{{"accuracy": 0.{i}}}')
        assert made.add("pets", bundle) == i
    return made


def promoted(registry: Registry, version: int, when: float) -> bool:
    seen = registry.state("pets")
    time.sleep(max(0.0, when - time.time()))  # so that all have read the same
    try:
        registry.replace("pets", seen, seen.moved(PRODUCTION, version))
    except RegistryError:
        return False
    return True


def test_of_those_who_move_an_alias_at_the_same_time_exactly_one_wins(registry):
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[4]); from tests.jobs.test_registry import promoted; "
        "from heliograph.jobs.registry import Registry; "
        "print(promoted(Registry(Path(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])))"
    )
    when = time.time() + 8
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(registry.folder), str(v), str(when), str(ROOT)], stdout=subprocess.PIPE, text=True
        )
        for v in (1, 2, 3, 4)
    ]
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
    assert [p.name for p in (registry.folder / "pets").iterdir() if p.name.endswith(".gone")] == []


def test_a_version_says_where_it_comes_from(registry):
    registry.replace("pets", State(), State(aliases={PRODUCTION: 2, "staging": 2}))
    newest, *_ = registry.describe("pets")
    assert newest.startswith("pets@5  ") and "accuracy 0.5000" in newest and "from rows.csv" in newest
    assert "code abcdef012345" in newest
    assert registry.describe("pets")[3].endswith("[production]  [staging]")
