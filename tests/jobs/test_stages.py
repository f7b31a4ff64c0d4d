"""Done once, reused while the fingerprint holds, and whole or not there at every moment."""

import pytest
from heliograph.cluster.runtime import LocalCluster
from heliograph.cluster.storage import read_json, write_json
from heliograph.jobs.display import Display
from heliograph.jobs.stages import Run, Stage
from rich.console import Console


class NoCluster(LocalCluster):
    """These stages need no Ray."""

    def start(self) -> None: ...


@pytest.fixture
def opened(tmp_path):
    return lambda: Run(tmp_path, NoCluster(), Display(Console(quiet=True)))


class Steps:
    """Two stages that count how often they work; the second reads the first."""

    def __init__(self):
        self.worked: list[str] = []

    def execute(self, run: Run, first: object = 1, second: object = 1) -> list[str]:
        self.worked = []
        run.execute(Stage("first", (), first, lambda folder: self._work("first", folder, str(first))))
        run.execute(Stage("second", ("first",), second, lambda folder: self._copy(run["first"] / "out", folder)))
        return self.worked

    def _copy(self, source, folder) -> None:
        self._work("second", folder, source.read_text())

    def _work(self, name: str, folder, text: str) -> None:
        self.worked.append(name)
        (folder / "out").write_text(text)


def test_a_change_reruns_what_depends_on_it_and_nothing_else(opened, tmp_path):
    steps = Steps()
    assert steps.execute(opened()) == ["first", "second"]
    assert steps.execute(opened()) == []
    assert steps.execute(opened(), second=2) == ["second"]
    assert steps.execute(opened(), first=2, second=2) == ["first", "second"]
    assert (tmp_path / "second" / "out").read_text() == "2"
    assert steps.execute(opened(), second=2) == ["first", "second"]


def test_a_failing_stage_leaves_no_output_and_finds_its_work_again(opened, tmp_path):
    def fail(folder):
        (folder / "checkpoint").write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        opened().execute(Stage("x", (), 1, fail))
    assert not (tmp_path / "x").exists()
    seen = []
    opened().execute(Stage("x", (), 1, lambda folder: seen.extend(p.name for p in folder.iterdir())))
    assert seen == ["checkpoint"]
    assert (tmp_path / "x" / "checkpoint").exists()


def test_work_of_another_fingerprint_is_not_found(opened, tmp_path):
    def fail(folder):
        (folder / "checkpoint").write_text("old")
        raise OSError

    with pytest.raises(OSError):
        opened().execute(Stage("x", (), 1, fail))
    seen = []
    opened().execute(Stage("x", (), 2, lambda folder: seen.extend(folder.iterdir())))
    assert seen == []
    assert list((tmp_path / ".work").iterdir()) == []


@pytest.mark.parametrize("moment", ["announced", "old moved away", "new in place", "recorded"])
def test_a_kill_at_any_moment_of_the_commit_changes_nothing(opened, tmp_path, moment):
    steps = Steps()
    steps.execute(opened())
    record = read_json(tmp_path / "stages" / "first.json") | {"fingerprint": "f" * 64}
    work = tmp_path / ".work" / ("first-" + "f" * 16)
    work.mkdir(parents=True)
    (work / "out").write_text("new")
    write_json(work.with_name(work.name + ".done"), record)
    if moment != "announced":
        (tmp_path / "first").rename(tmp_path / ".first.old")
    if moment in ("new in place", "recorded"):
        work.rename(tmp_path / "first")
    if moment == "recorded":
        write_json(tmp_path / "stages" / "first.json", record)
    opened()
    assert (tmp_path / "first" / "out").read_text() == "new"
    assert read_json(tmp_path / "stages" / "first.json")["fingerprint"] == "f" * 64
    assert list((tmp_path / ".work").iterdir()) == []
