"""Compiled modules are kept, also where a machine was told to keep none beside their sources.

Container images set PYTHONDONTWRITEBYTECODE so as to stay small. There each of Ray's processes would compile all that it imports
anew: 10 s of a core for TensorFlow alone, half of the time of a small run. The sources stay alone; what is compiled has a folder
of its own, which Python itself keeps up to date.
"""

import importlib.util
import os
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heliograph"
"""What this machine may forget."""
OFF, FOLDER = "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"


def variables(package: str = "ray") -> dict[str, str]:
    """For the processes that this one starts; empty where the compiled package is there, or will be, as is usual."""
    if not sys.dont_write_bytecode:
        return {}
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None or Path(importlib.util.cache_from_source(found.origin)).exists():
        return {}
    return {OFF: "", FOLDER: str(CACHE / "bytecode")}


def keep() -> None:
    """For this process too: it is ours alone, a command."""
    if wanted := variables():
        os.environ.update(wanted)
        sys.dont_write_bytecode, sys.pycache_prefix = False, wanted[FOLDER]
