"""The registry and what replicas hold of it: defaults, aliases, rollouts, the least recently used, what cannot be loaded."""

import asyncio
import json
import random
import shutil

import numpy as np
import pytest
from heliograph.cluster.sealed import FORMAT, KEY_FILE, SEALED_KEY, rewrap_all
from heliograph.errors import KeyStoreError, RegistryError, SealError
from heliograph.jobs.guard import Guard
from heliograph.jobs.registry import PRODUCTION, Rollout, State, parse
from heliograph.serve.metrics import SECONDS, Stats, quantile
from heliograph.serve.rollout import Share, begin, judge, share

from .served import TENSOR, Room

ONE, TWO, THREE = ([[n, 0], [0, n]] for n in (1, 2, 3))


@pytest.fixture
def room(tmp_path) -> Room:
    room = Room(tmp_path, models=2)
    room.add("pets", TENSOR, ONE)
    return room


def version_of(room: Room, path: str = "/v1/models/pets:predict") -> tuple[str, list]:
    answer = room.ask("POST", path, b'{"instances": [[1, 1]]}')
    assert answer.status == 200, answer.body
    return answer.headers["model-version"], json.loads(answer.body)["predictions"][0]


def test_the_newest_answers_until_one_is_in_production(room):
    room.follow()
    assert version_of(room) == ("1", [1.0, 1.0])
    room.add("pets", TENSOR, TWO)
    assert version_of(room)[0] == "1"
    room.follow()
    assert version_of(room) == ("2", [2.0, 2.0])
    room.registry.replace("pets", State(), State(aliases={PRODUCTION: 1, "old": 1}))
    room.follow()
    assert version_of(room)[0] == "1"
    assert version_of(room, "/v1/models/pets/labels/old:predict")[0] == "1"
    assert version_of(room, "/v1/models/pets/versions/2:predict")[0] == "2"


def test_a_bundle_is_registered_once(room):
    bundle = room.folder / "bundle-1"
    assert room.registry.add("pets", bundle) == 1
    assert room.registry.versions("pets") == [1]


def test_the_least_recently_used_goes_and_comes_back_when_it_is_asked_for(room):
    for weights in (TWO, THREE):
        room.add("pets", TENSOR, weights)
    room.follow()  # holds 3, and one more
    for version in ("1", "2", "1"):
        assert version_of(room, f"/v1/models/pets/versions/{version}:predict")[0] == version
        assert len(room.models._loaded) == 2
    assert version_of(room)[0] == "3"
    states = json.loads(room.ask("GET", "/v1/models/pets").body)["model_version_status"]
    assert [(s["version"], s["state"]) for s in states] == [("3", "AVAILABLE"), ("2", "START"), ("1", "AVAILABLE")]


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_where_it_is(room):
    room.follow()
    room.add("pets", TENSOR, TWO)
    file = room.registry.bundle("pets", 2) / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    room.follow()
    assert version_of(room)[0] == "1"
    assert "was changed" in room.stats.failures["pets", "2"]
    answer = room.ask("POST", "/v1/models/pets/versions/2:predict", b'{"instances": [[1, 1]]}')
    assert answer.status == 503
    assert b"cannot be loaded" in answer.body


def test_a_version_asked_for_by_many_at_once_is_loaded_once(room):
    room.add("pets", TENSOR, TWO)
    room.follow()
    opened = []
    open_it = room.models.open
    room.models.open = lambda place: opened.append(place) or open_it(place)

    async def work():
        await asyncio.gather(*[room.models.load(("pets", 1)) for _ in range(5)])

    asyncio.run(work())
    assert opened == [("pets", 1)]


def test_a_rollout_takes_its_share_of_the_requests(room):
    room.follow()
    room.add("pets", TENSOR, TWO)
    begin(room.registry, "pets", 2, percent=25, seconds=1000, requests=10)
    room.follow()
    random.seed(5)
    found = [version_of(room)[0] for _ in range(400)]
    assert 60 <= found.count("2") <= 140
    assert {version_of(room, "/v1/models/pets/labels/production:predict")[0] for _ in range(20)} == {"1"}


def test_deploying_what_is_not_there_or_there_already_is_refused(room):
    with pytest.raises(RegistryError, match="has no pets@7: it has 1"):
        begin(room.registry, "pets", 7, 10, 1, 1)
    begin(room.registry, "pets", 1, 100, 1, 1)
    with pytest.raises(RegistryError, match="is in production already"):
        begin(room.registry, "pets", 1, 10, 1, 1)
    for text in ("pets@", "pets@x", "../pets@1", "", "@1"):
        with pytest.raises(RegistryError, match="names no model"):
            parse(text)
    assert parse("pets@12") == ("pets", 12)


FAST = Share(1000, 0, 0.010)
ROLLOUT = Rollout(version=2, percent=10, started=0, seconds=30, requests=100)


@pytest.mark.parametrize(
    ("old", "new", "failure", "seconds", "verdict"),
    [
        (FAST, Share(0, 0, 0), "changed", 1, "rolled back: it cannot be loaded: changed"),
        (FAST, Share(20, 10, 0.010), None, 1, "rolled back: 10 of 20 requests failed"),
        (FAST, Share(9, 9, 0.010), None, 1, ""),
        (FAST, Share(500, 0, 0.010), None, 29, ""),
        (FAST, Share(99, 0, 0.010), None, 500, ""),
        (FAST, Share(100, 0, 0.012), None, 30, "promoted"),
        (FAST, Share(100, 2, 0.012), None, 30, "rolled back: 2 of 100 requests failed"),
        (FAST, Share(100, 0, 0.030), None, 30, "rolled back: p99 30.0 ms (old: 10.0 ms)"),
        (Share(1000, 100, 0.01), Share(100, 10, 0.01), None, 30, "promoted"),
        (Share(0, 0, 0), Share(100, 0, 0.03), None, 30, "promoted"),
    ],
)
def test_the_judge_waits_promotes_and_rolls_back(old, new, failure, seconds, verdict):
    found = judge(ROLLOUT, old, new, failure, seconds)
    assert found.startswith(verdict)
    assert bool(found) == bool(verdict)


def test_what_a_version_did_is_counted_from_the_beginning_of_the_rollout():
    stats, base = Stats(), Stats()
    for where, count in ((base, 5), (stats, 25)):
        for i in range(count):
            where.request("pets", "2", "oip", "500" if i % 5 == 0 else "200", 0.010)
    found = share(stats, base, "pets", 2)
    assert (found.requests, found.failures) == (20, 4)
    assert 0.008 <= found.p99 <= 0.016


def test_counts_add_up_over_replicas_and_quantiles_lie_in_their_buckets():
    one, two = Stats(), Stats()
    for i, stats in enumerate((one, two, two)):
        stats.request("pets", "1", "oip", "200", 0.003 * (i + 1))
    total = Stats()
    total.replicas = 0
    total.add(one)
    total.add(two)
    assert total.requests == {("pets", "1", "oip", "200"): 3}
    assert total.replicas == 2
    counts = total.histograms["request_seconds"]["pets", "1"]
    assert sum(counts[:-1]) == 3
    assert counts[-1] == pytest.approx(0.018)
    assert 0.004 <= quantile(counts, 0.5) <= 0.008
    assert quantile([0.0] * (len(SECONDS) + 2), 0.5) == 0
    assert b'heliograph_requests_total{code="200",model="pets",protocol="oip",version="1"} 3.0' in total.page()


def test_a_sealed_model_answers_before_and_after_its_key_is_rotated_and_a_lost_key_is_named(tmp_path):
    room = Room(tmp_path)
    for name, weights in (("pets", TWO), ("birds", THREE)):
        room.add(name, TENSOR, weights, sealed=True)
    folder = room.registry.bundle("pets", 1)
    assert {f.name for f in folder.iterdir() if f.read_bytes().startswith(FORMAT)} == {
        "model.onnx", "schema.json", "preprocess.json", "metrics.json",
    }  # fmt: skip
    room.follow()
    assert version_of(room) == ("1", [2.0, 2.0])
    room.keys.rotate(SEALED_KEY)
    assert rewrap_all(room.registry.folder, room.keys) == 2
    room.keys.retire(SEALED_KEY)
    again = Room(tmp_path)
    again.follow()
    assert version_of(again) == ("1", [2.0, 2.0])
    shutil.copyfile(room.registry.bundle("birds", 1) / KEY_FILE, folder / KEY_FILE)  # another folder's key opens nothing
    with pytest.raises(SealError, match="was changed, cut or sealed as another file"):
        again.models.open(("pets", 1))
    (room.keys.folder / "sealed-2.key").unlink()
    with pytest.raises(KeyStoreError, match=r"sealed-2\.key: no such key"):
        again.models.open(("birds", 1))


def test_the_newest_that_reached_what_it_had_to_answers_and_no_other_is_promoted(room):
    room.add("pets", TENSOR, TWO, failed=("accuracy is 0.5, >= 0.9 is required",))
    room.follow()
    assert version_of(room)[0] == "1"
    for percent in (10, 100):
        with pytest.raises(RegistryError, match=r"pets@2 is not put into production: accuracy is 0.5.*--force"):
            begin(room.registry, "pets", 2, percent, 0, 1)
    begin(room.registry, "pets", 2, 100, 0, 1, force=True)
    room.follow()
    assert version_of(room)[0] == "2"


@pytest.mark.parametrize("guard", ["report", "refuse"])
def test_rows_unlike_the_training_rows_are_told_or_refused(tmp_path, guard):
    rows = np.random.default_rng(0).normal(size=(400, 2)).astype("f4")
    room = Room(tmp_path, guard=guard)
    room.add("pets", TENSOR, ONE, guard=Guard.fit({"x": rows[:300]}, {"x": rows[300:]}).dump())
    room.follow()
    assert version_of(room)[1] == [1.0, 1.0]
    answer = room.ask("POST", "/v1/models/pets:predict", b'{"instances": [[0, 0], [40, 0], [0.1, 0.2]]}')
    if guard == "refuse":
        assert answer.status == 422
        assert b"unlike what this model has learnt from: rows 1" in answer.body
    else:
        assert (answer.status, answer.headers["unfamiliar-rows"]) == (200, "1")
        assert json.loads(answer.body)["predictions"] == [[0.0, 0.0], [40.0, 0.0], [pytest.approx(0.1), pytest.approx(0.2)]]
    assert room.stats.unfamiliar == {("pets", "1"): 1}
    assert b'heliograph_unfamiliar_rows_total{model="pets",version="1"} 1.0' in room.stats.page()


def test_what_is_too_old_to_be_explained_says_so(room):
    room.follow()
    answer = room.ask("POST", "/v1/models/pets:explain", b'{"instances": [[1, 1]]}')
    assert answer.status == 501
    assert b"cannot be explained" in answer.body
    assert json.loads(room.ask("GET", "/v1/models/pets/drift").body) == {"features": []}
