"""API keys: `gw_` and 256 random bits, of which the gateway keeps only the SHA-256.

Owns the form of a key, the query that looks one up and the source that recognises one. Does not own the tables (the
ledger's migrations), who may make a key (the CLI) or the listening connection that brings the announcements.

A key has 256 bits of entropy, so a plain SHA-256 cannot be searched and needs no salt; and because only hashes are
compared, the time a comparison takes says nothing about a key that somebody else holds.
"""

import re
import secrets
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Protocol

import structlog

from gateway.errors import Unauthenticated
from gateway.identity.key_cache import KeyCache, KeyRecord, LoadKey
from gateway.identity.source import Clock, Source, bearer
from gateway.types import Facts, Principal

#: Channel on which changes are announced: the hex SHA-256 of a revoked key, or `org:<org_id>` of a changed org.
CHANNEL = "gateway_keys"

PREFIX = "gw_"
_PREFIX_BYTES = PREFIX.encode()
_SECRET = re.compile(rb"gw_[A-Za-z0-9_-]{43}")
_REVOKED = re.compile(r"[0-9a-f]{64}")

#: $1: the key's SHA-256 as bytea. An expired key is returned: that it has expired is judged when it is used.
LOAD_KEY_SQL = """
SELECT k.key_id, k.org_id, o.plan, k.user_id,
       CASE WHEN k.expires_at = 'infinity' THEN NULL
            WHEN k.expires_at = '-infinity' THEN 0
            ELSE floor(extract(epoch FROM k.expires_at) * 1000)::bigint
       END AS expires_at_ms
  FROM gateway.api_key AS k
  JOIN gateway.org AS o ON o.org_id = k.org_id
 WHERE k.sha256 = $1 AND k.revoked_at IS NULL
"""

_log = structlog.stdlib.get_logger(__name__)


class ApiKeyConfig(Protocol):
    """What this source reads of its part of `gateway.yaml`."""

    @property
    def headers(self) -> tuple[str, ...]: ...
    @property
    def cache_ttl_ms(self) -> int: ...
    @property
    def cache_stale_ms(self) -> int: ...
    @property
    def cache_entries_max(self) -> int: ...


class Row(Protocol):
    """One row, by column name."""

    def __getitem__(self, column: str, /) -> object: ...


class Rows(Protocol):
    """PostgreSQL, as far as this source needs it. Raises StoreUnavailable; has its own deadline."""

    async def row(self, sql: str, *args: object) -> Row | None: ...


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it was made: the one moment at which its secret is known."""

    #: Shown once, never stored or logged.
    secret: str = field(repr=False)
    #: Public: `key_` and 16 hex digits. Not derived from the secret.
    key_id: str
    #: What is stored, 32 bytes.
    sha256: bytes


def new_key() -> ApiKey:
    """A new key from the system's random source."""
    secret = PREFIX + urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    return ApiKey(secret, f"key_{secrets.token_hex(8)}", key_sha256(secret))


def key_sha256(secret: str) -> bytes:
    """What is stored for a key: the SHA-256 of the whole text, prefix included."""
    return sha256(secret.encode()).digest()


def key_loader(postgres: Rows) -> LoadKey:
    """The lookup that asks PostgreSQL."""

    async def load(digest: bytes) -> KeyRecord | None:
        row = await postgres.row(LOAD_KEY_SQL, digest)
        if row is None:
            return None
        user_id, expires_at_ms = row["user_id"], row["expires_at_ms"]
        return KeyRecord(
            key_id=str(row["key_id"]),
            org_id=str(row["org_id"]),
            plan=str(row["plan"]),
            user_id=None if user_id is None else str(user_id),
            expires_at_ms=expires_at_ms if isinstance(expires_at_ms, int) else None,
        )

    return load


class ApiKeySource(Source):
    """Recognises `gw_...` in the configured fields, plain or as a `Bearer` token.

    Values of another form are not ours: they may be another source's credential, or the upstream's.
    """

    def __init__(self, config: ApiKeyConfig, load: LoadKey, *, monotonic_ms: Clock, wall_ms: Clock) -> None:
        self._headers = frozenset(name.lower().encode() for name in config.headers)
        self._wall_ms = wall_ms
        self.cache = KeyCache(
            load,
            ttl_ms=config.cache_ttl_ms,
            stale_ms=config.cache_stale_ms,
            entries_max=config.cache_entries_max,
            monotonic_ms=monotonic_ms,
        )

    async def identify(self, facts: Facts) -> Principal | None:
        secrets_found = {secret for _, secret in self._presented(facts)}
        if not secrets_found:
            return None
        if len(secrets_found) > 1:
            raise Unauthenticated("Different API keys were presented; send one.")
        secret = secrets_found.pop()
        if _SECRET.fullmatch(secret) is None:
            raise Unauthenticated("The API key is malformed.")
        record = await self.cache.get(sha256(secret).digest())
        if record is None:
            raise Unauthenticated("The API key is unknown or was revoked.")
        if self._has_expired(record):
            raise Unauthenticated("The API key has expired.")
        return Principal(record.org_id, record.plan, record.user_id, record.key_id, "api_key")

    def remembers(self, facts: Facts) -> bool | None:
        secrets_found = {secret for _, secret in self._presented(facts)}
        if len(secrets_found) != 1:
            return False if secrets_found else None
        # A stale record will do: it is looked up again, once for all who wait. Were it not enough, a flood would shut
        # out each of its neighbours as soon as their key's time to live is over.
        record = self.cache.recall(sha256(secrets_found.pop()).digest())
        return record is not None and not self._has_expired(record)

    def credential_headers(self, facts: Facts) -> frozenset[bytes]:
        return frozenset([name for name, _ in self._presented(facts)])

    def _has_expired(self, record: KeyRecord) -> bool:
        return record.expires_at_ms is not None and self._wall_ms() >= record.expires_at_ms

    def _presented(self, facts: Facts) -> list[tuple[bytes, bytes]]:
        """Field name and value of everything that means to be a gateway key, well formed or not."""
        found = []
        for name, value in facts.headers:
            if name in self._headers:
                value = value.strip(b" \t")
                token = bearer(value)
                secret = value if token is None else token
                if secret.startswith(_PREFIX_BYTES):
                    found.append((name, secret))
        return found

    def on_notification(self, payload: str) -> None:
        kind, colon, org_id = payload.partition(":")
        if _REVOKED.fullmatch(payload):
            self.cache.drop(bytes.fromhex(payload))
        elif kind == "org" and colon:
            self.cache.drop_org(org_id)
        else:
            # A newer gateway may announce what this one does not know. Asking again is always right.
            _log.warning("key_announcement_not_understood", payload_chars=len(payload))
            self.cache.drop_all()

    def drop_all(self) -> None:
        self.cache.drop_all()

    async def close(self) -> None:
        await self.cache.close()
