"""A run that is put away and taken out again."""

import contextlib
from pathlib import Path

import pytest
from heliograph.cluster.keys import KeyStore
from heliograph.errors import RunError, SealError
from heliograph.jobs import archive
from heliograph.jobs.archive import seal, unseal


@contextlib.contextmanager
def progress(what: str, total: int):
    done: list[int] = []
    yield done.append
    assert done, what


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "default"
    for name in ("train/checkpoints/step-1/state.npz", "report.html", ".work/prepare-1/rows", "keys/data-1.key"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 10_000)
    return folder


def test_what_was_put_away_comes_out_again(run):
    keys, before = KeyStore(run / "keys"), content(run)
    assert "heliograph unseal" in seal(run, keys, progress)
    kept = content(run)
    assert set(kept) == {"run.sealed", "key.wrapped", "keys/data-1.key", "keys/sealed-1.key"}
    assert b"report.html" not in kept["run.sealed"]
    seal(run, keys, progress)  # again: nothing to do
    unseal(run, keys, progress)
    after = content(run)
    assert after.pop("keys/sealed-1.key")
    assert after.pop("key.wrapped")
    assert after == before


@pytest.mark.parametrize("way", ["seal", "unseal"])
def test_stopped_at_any_point_the_same_command_goes_on(run, way, monkeypatch):
    """Each time one file operation further, until it gets through."""
    keys, before = KeyStore(run / "keys"), content(run)
    if way == "unseal":
        seal(run, keys, progress)
    work = {"seal": seal, "unseal": unseal}[way]
    for allowed in range(100):
        left = [allowed]

        def counted(real, left=left):
            def act(*given, **named):
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return real(*given, **named)

            return act

        with monkeypatch.context() as patched:
            for owner, name in ((Path, "unlink"), (Path, "replace"), (Path, "rename"), (archive.shutil, "rmtree")):
                patched.setattr(owner, name, counted(getattr(owner, name)))
            with contextlib.suppress(KeyboardInterrupt):
                work(run, keys, progress)
                break
    assert allowed >= 3
    if way == "seal":
        unseal(run, keys, progress)
    assert {n: c for n, c in content(run).items() if "sealed-1" not in n and n != "key.wrapped"} == before


def test_what_cannot_be_put_away_or_taken_out_is_one_line(run, tmp_path):
    keys = KeyStore(run / "keys")
    with pytest.raises(RunError, match="no such run"):
        seal(tmp_path / "other", keys, progress)
    with pytest.raises(RunError, match="nothing was put away"):
        unseal(run, keys, progress)
    seal(run, keys, progress)
    sealed = run / "run.sealed"
    sealed.write_bytes(sealed.read_bytes()[:-100])
    with pytest.raises(SealError, match=r"run\.sealed: was changed, cut"):
        unseal(run, keys, progress)
    assert not (run / "report.html").exists()
