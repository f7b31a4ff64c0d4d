"""Access tokens: who may ask an endpoint what.

    hg_ID_SECRET    ID: 8 hexadecimal digits, which name the token; SECRET: 32 random bytes in base64url, shown once

The list is `tokens.json` in the key store's folder. It has a SHA-256 of each secret: the secret is random, so no slow hash is
needed, and who reads the list has no token. Replicas look at the list's time at every request, so what is added or revoked
counts from the next request on.
"""

import hashlib
import hmac
import os
import re
import secrets
import time

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ..cluster import storage
from ..cluster.audit import Audit
from ..cluster.keys import KeyStore
from ..errors import AccessError, KeyStoreError, Overloaded, RequestError
from ..names import Verb
from ..project import Jwt
from .client import TOKEN_VARIABLE
from .issuer import Issuer

FORM = re.compile(r"Bearer +hg_([0-9a-f]{8})_([A-Za-z0-9_-]{43})", re.IGNORECASE)
LONGEST, LONGEST_FOREIGN = 200, 8192


class Token(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    """Whose it is."""
    sha256: str
    models: tuple[str, ...]
    """What it is for; all models where none is named."""
    verbs: tuple[Verb, ...]
    expires: float | None = None
    """Seconds since 1970."""
    rate: float | None = None
    """Requests a second, of each replica."""


TOKENS = TypeAdapter(list[Token])


class Tokens:
    """The list. Raises KeyStoreError where it is damaged."""

    def __init__(self, keys: KeyStore):
        self.file, self._audit = keys.folder / "tokens.json", Audit(keys)

    def all(self) -> list[Token]:
        try:
            return TOKENS.validate_json(self.file.read_bytes()) if self.file.exists() else []
        except (OSError, ValidationError) as error:
            raise KeyStoreError(f"{self.file}: cannot be read: {str(error).splitlines()[0]}") from None

    def add(self, name: str, models: list[str], verbs: list[Verb], days: float | None, rate: float | None) -> str:
        """The new token, which is nowhere else."""
        identity, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
        expires = time.time() + 86_400 * days if days is not None else None
        digest = hashlib.sha256(secret.encode()).hexdigest()
        token = Token(id=identity, name=name, sha256=digest, models=tuple(models), verbs=tuple(verbs), expires=expires, rate=rate)
        with self._alone():
            self._write([*self.all(), token])
        self._audit.write("token add", identity, name=name)
        return f"hg_{identity}_{secret}"

    def revoke(self, identity: str) -> Token:
        """Remove a token, by its id. Raises KeyStoreError when there is none."""
        with self._alone():
            listed = self.all()
            found = next((t for t in listed if t.id == identity), None)
            if found is None:
                raise KeyStoreError(f"{self.file}: has no token {identity}: `heliograph token list` shows what there is")
            self._write([t for t in listed if t.id != identity])
        self._audit.write("token revoke", identity, name=found.name)
        return found

    def _alone(self):
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return storage.exclusive(self.file.parent)

    def _write(self, tokens: list[Token]) -> None:
        storage.write_bytes(self.file, TOKENS.dump_json(tokens, indent=1))


def require_role(keys: KeyStore, verb: Verb, model: str) -> str:
    """Whose token HELIOGRAPH_TOKEN is, for what is done with this key store at hand rather than by asking an endpoint.

    Asked for once any token is for this verb; until then whoever has the key store may. Raises AccessError.
    """
    if not any(verb in token.verbs for token in Tokens(keys).all()):
        return ""
    try:
        return Guard(keys, None).check(f"Bearer {os.environ.get(TOKEN_VARIABLE, '')}", verb, model)
    except RequestError as error:
        Audit(keys).write("refused", f"{verb} {model}", status=error.status)
        raise AccessError(f"{verb} {model}: needs a token for it in {TOKEN_VARIABLE}: {keys.folder} has people who may") from None


class Guard:
    """Lets requests pass by their tokens. Its list may be changed by others meanwhile. jwt: whose tokens count, too."""

    def __init__(self, keys: KeyStore, jwt: Jwt | None):
        self._list = Tokens(keys)
        self.issuer = Issuer(jwt, keys.folder) if jwt else None
        self._changed: tuple[int, int] | None = None
        """The list's inode and time when it was read; each writing makes a new file."""
        self._known: dict[str, Token] = {}
        self._budgets: dict[str, tuple[float, float]] = {}
        """For each token with a rate: requests left, and when that was."""

    def check(self, authorization: str, verb: Verb, model: str | None) -> str:
        """Whose token it is. Raises RequestError: 401 where there is no valid one, 403 where it is for something else, 429."""
        token = self._own(authorization) or self._foreign(authorization)
        if token is None:
            # The same whether there was none, it is unknown, expired or revoked.
            raise RequestError("a valid token is needed: `Authorization: Bearer …`, inside the capsule of a sealed request", 401)
        if verb not in token.verbs or (model is not None and token.models and model not in token.models):
            raise RequestError(f"this token is not for {f'`{model}`, ' if model else ''}{verb}", 403)
        if token.rate is not None:
            self._spend(token.id, token.rate)
        return token.name

    def _own(self, authorization: str) -> Token | None:
        self._look()
        found = FORM.fullmatch(authorization.strip()) if len(authorization) < LONGEST else None
        if found is None:
            return None
        token = self._known.get(found[1].lower())
        digest = hashlib.sha256(found[2].encode()).hexdigest()
        valid = hmac.compare_digest(digest, token.sha256 if token else "0" * 64)
        if token is None or not valid or (token.expires is not None and time.time() > token.expires):
            return None
        return token

    def _foreign(self, authorization: str) -> Token | None:
        kind, _, text = authorization.strip().partition(" ")
        if self.issuer is None or kind.lower() != "bearer" or len(text) > LONGEST_FOREIGN:
            return None
        found = self.issuer.check(text.strip())
        if found is None:
            return None
        name, verbs, models = found
        return Token(id="", name=name, sha256="", models=tuple(models), verbs=tuple(verbs))

    def _spend(self, identity: str, rate: float) -> None:
        """A bucket of one second's requests, at least one."""
        now, most = time.monotonic(), max(1.0, rate)
        left, at = self._budgets.get(identity, (most, now))
        left = min(most, left + rate * (now - at))
        self._budgets[identity] = (max(0.0, left - 1) if left >= 1 else left, now)
        if left < 1:
            raise Overloaded(f"this token is for {rate:g} requests a second", 429)

    def _look(self) -> None:
        try:
            stat = self._list.file.stat()
            changed = stat.st_ino, stat.st_mtime_ns
        except FileNotFoundError:
            changed = 0, 0
        if changed != self._changed:
            self._known = {token.id: token for token in self._list.all()}
            self._changed = changed
