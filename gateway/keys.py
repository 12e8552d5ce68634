"""Every Redis key name, in one place.

All keys of an org carry the hash tag `{ai_credits:org_<id>}`. It hashes to the same Redis Cluster slot as the
application's own, untagged key `ai_credits:org_<id>`, so one script may touch them all.
Client-supplied text never stands in a key: it is hashed to a fixed length.
"""

from base64 import urlsafe_b64encode
from hashlib import blake2b

#: Orgs that may have open holds or an unposted outbox: zset, member org id, score last activity in ms.
ACTIVE_ORGS = "gateway:active"

#: Stands for an org where limits are kept that no org owns; no org id can be this.
SHARED = "*"


def mirror(org_id: str) -> str:
    """Whole credits for the application to read: string, EX 3600. Written here, never read; never at all of SHARED,
    whose name only has to lie in its slot."""
    return f"{tag(SHARED)}:m" if org_id == SHARED else f"ai_credits:org_{org_id}"


def tag(owner: str) -> str:
    return "{gateway:shared}" if owner == SHARED else f"{{ai_credits:org_{owner}}}"


def account(org_id: str) -> str:
    """Hash: PostgreSQL's state of the org, and what only Redis knows; field by field in limits/prelude.lua."""
    return f"{tag(org_id)}:a"


def holds(org_id: str) -> str:
    """Hash: request id -> `amount:used` in micro-credits."""
    return f"{tag(org_id)}:h"


def deadlines(org_id: str) -> str:
    """Zset: request id -> end of the hold's lease in ms."""
    return f"{tag(org_id)}:d"


def outbox(org_id: str) -> str:
    """Stream of settled charges on their way to PostgreSQL."""
    return f"{tag(org_id)}:o"


def tombstone(org_id: str, request_id: str) -> str:
    """String: how the request's hold ended; makes every script idempotent for 15 minutes."""
    return f"{tag(org_id)}:t:{request_id}"


def counter(owner: str, name: str) -> str:
    """The counter of one limit for one subject, of the org `owner` or of SHARED; `name` is `limits.counter_name`'s."""
    return f"{tag(owner)}:l:{name}"


def session(org_id: str, session_id: str) -> str:
    """Hash: the conversation's record."""
    return session_record(org_id, digest(session_id))


def session_record(org_id: str, session_digest: str) -> str:
    """The same, for whoever knows only the digest of the id."""
    return f"{tag(org_id)}:s:{session_digest}"


def session_index(org_id: str) -> str:
    """Zset: session key -> time last seen, bounding the sessions of one org."""
    return f"{tag(org_id)}:si"


def turn(work: str) -> str:
    """String with a TTL: one of the gateways does this work now, the others need not."""
    return f"{tag(SHARED)}:turn:{work}"


def digest(text: str) -> str:
    """22 characters of base64url: 128 bits of BLAKE2b."""
    return urlsafe_b64encode(blake2b(text.encode(), digest_size=16).digest())[:22].decode()
