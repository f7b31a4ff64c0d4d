"""The audit log: who did what with models, keys and doors, in lines that nobody can change unseen.

    audit.jsonl    in the key store's folder; a line: time, who, what, of, previous, mac

`mac` is HMAC-SHA256 over the line without it, with a key of the key store (`audit-1`); `previous` is the `mac` of the line
before. A line that is changed, left out, added or moved breaks the chain there (`heliograph verify-audit`). Cut at its end a
chain is whole still: note the count and the last `mac` elsewhere, and verify against them. No input, no key and no token is
ever written: a line names things.
"""

import fcntl
import getpass
import hashlib
import hmac
import json
import logging
import os
import time

from ..errors import AuditError, KeyStoreError
from .keys import KeyStore

log = logging.getLogger("heliograph")
AUDIT_KEY = "audit-1"
TAIL = 64 << 10


class Audit:
    def __init__(self, keys: KeyStore):
        self._keys, self.file = keys, keys.folder / "audit.jsonl"

    def write(self, what: str, of: str, *, must: bool = True, **more: str | int | float) -> None:
        """Append a line. what: `deploy`, `refused`, …; of: a model, a key, a token's id. must: whether to raise AuditError where
        it cannot be written, and not to say so in the log only."""
        try:
            key = self._keys.secret(AUDIT_KEY, create=True)
            with self.file.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                end = file.read()
                previous = _mac_of(end)
                line = {"time": round(time.time(), 3), "who": _who(), "what": what, "of": of, **more, "previous": previous}
                torn = b"" if end.endswith(b"\n") or not end else b"\n"
                file.write(torn + json.dumps(line | {"mac": _mac(key, line)}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except (OSError, KeyStoreError) as error:
            if must:
                raise AuditError(f"{self.file}: cannot be written: {error}") from None
            log.error("%s: cannot be written: %s", self.file, error)

    def verify(self, count: int = 0, mac: str = "") -> tuple[int, str]:
        """(lines, the last one's mac) of a log that is whole. count, mac: what was noted before: the log had so many lines then,
        and the last one that mac. Raises AuditError, which says where it is broken."""
        if not self.file.exists():
            if count:
                raise AuditError(f"{self.file}: is gone: it had {count} lines")
            return 0, ""
        key, previous, found = self._keys.secret(AUDIT_KEY), "", 0
        for found, text in enumerate(self.file.read_bytes().splitlines(), 1):
            given = ""
            try:
                line = json.loads(text)
                given = line.pop("mac")
                whole = line["previous"] == previous and hmac.compare_digest(given, _mac(key, line))
            except (ValueError, KeyError, TypeError, AttributeError):
                whole = False
            if not whole:
                raise AuditError(f"{self.file}: line {found} was changed, or a line before it left out, added or moved")
            previous = given
            if found == count and mac and given != mac:
                raise AuditError(f"{self.file}: line {count} is not the one that was noted: the log was written anew")
        if found < count:
            raise AuditError(f"{self.file}: has {found} lines; it had {count}: its end was cut off")
        return found, previous


def _mac_of(end: bytes) -> str:
    """Of the last line; none where that is damaged, which verification finds."""
    try:
        return json.loads(end.splitlines()[-1])["mac"]
    except (ValueError, KeyError, TypeError, IndexError):
        return ""


def _mac(key: bytes, line: dict) -> str:
    return hmac.new(key, json.dumps(line, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _who() -> str:
    """The account that does it, and the person behind `sudo`."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = str(os.getuid())
    behind = os.environ.get("SUDO_USER")
    return f"{behind} as {name}" if behind else name
