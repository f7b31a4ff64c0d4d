"""Programs of the system that some tests need; `.ci/run` puts them into `.ci/tools`."""

import shutil

import pytest

from .conftest import ROOT


def tool(name: str) -> str:
    """Its path; the test is skipped where it is not there."""
    found = shutil.which(name) or shutil.which(name, path=str(ROOT / ".ci" / "tools" / "usr" / "bin"))
    if found is None:
        pytest.skip(f"{name} is not installed: Debian has it in the package prometheus")
    return found
