"""Tokens of somebody else's identity provider: JSON web tokens (RFC 7519), checked against its public keys (RFC 7517).

Only signatures of a private key count: `alg: none` and a shared secret (which the public key could be taken for) do not. A token
needs `exp`, `iss` and `aud`; its `scope` names verbs (`predict read metrics`), its `models`, where it has them, the models.
"""

import logging
from pathlib import Path
from typing import Any

import httpx
import jwt

from ..names import Verb
from ..project import Jwt

log = logging.getLogger("heliograph")
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
LEEWAY = 30
"""Seconds that its clock and ours may differ."""


class Issuer:
    """base: what the keys' file is relative to."""

    def __init__(self, options: Jwt, base: Path):
        self._options, self._base = options, base
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self.refresh()

    def refresh(self) -> None:
        """Fetch the keys anew; those that are held stay where that fails."""
        try:
            text = self._fetch()
            self._keys = {key.key_id: key for key in jwt.PyJWKSet.from_json(text).keys}
        except (OSError, httpx.HTTPError, jwt.PyJWTError, ValueError, AttributeError) as error:
            log.error("serve.jwt.keys: %s: cannot be read: %s", self._options.keys, error)

    def check(self, token: str) -> tuple[str, list[Verb], list[str]] | None:
        """(whose it is, its verbs, its models: none for all); None where it is not valid."""
        try:
            key = self._keys.get(jwt.get_unverified_header(token).get("kid"))
            if key is None:
                return None
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(ALGORITHMS),
                audience=self._options.audience,
                issuer=self._options.issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud"]},
            )
            scope, models = str(claims.get("scope", "")).split(), claims.get("models") or []
            return str(claims.get("sub", "-")), [v for v in Verb if v in scope], [str(m) for m in models]
        except (jwt.PyJWTError, ValueError, TypeError):
            return None

    def _fetch(self) -> str:
        if self._options.keys.startswith("https://"):
            answer = httpx.get(self._options.keys, timeout=10, follow_redirects=False)
            return answer.raise_for_status().text
        return (self._base / self._options.keys).read_text()
