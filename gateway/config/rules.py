"""Rules over several keys of one section, as functions of plain values.

They are applied twice: by the models, so that no value can exist which breaks them, and by checks.py to the file as
written, so that they are reported together with every other mistake.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gateway.config.values import format_duration

#: 1 credit is 1,000,000 micro-credits, and Redis scripts compute exactly up to 2^53.
CREDITS_MAX = 9_000_000_000
LIMIT_MAX = 1_000_000_000_000
#: Of one policy, and of what all orgs share.
LIMITS_MAX = 16

ROUTE_PATH = r"/(?:[A-Za-z0-9._~!$&'()+,;=:@/-]*(?:(?<=/)\*)?)"
ROUTE_PATH_FORM = "a route path: it starts with '/', is written decoded, and may end in '/*' for everything below"
#: The gateway's own endpoints; no route may take them.
OWN_PREFIX = "/-/"

SQL_NAME = r"[A-Za-z_][A-Za-z0-9_]{0,62}"
SQL_NAME_FORM = "an SQL name: letters, digits and '_', at most 63"
SQL_TABLE = rf"(?:{SQL_NAME}\.)?{SQL_NAME}"
SQL_TABLE_FORM = "an SQL table: a name, or schema.name, of letters, digits and '_'"

#: What of a URL comes behind the host; RFC 3986 has no other characters there.
CHECK_PATH = r"/[A-Za-z0-9._~!$&'()*+,;=:@/?%-]*"
CHECK_PATH_FORM = "the path of a URL: it starts with '/', and other characters than RFC 3986's are escaped"

SECRET_CHARS_MIN = 32


@dataclass(frozen=True, slots=True)
class Mistake:
    """A broken rule; `field` is the YAML key to point at, empty for the whole section."""

    text: str
    field: str = ""


def heartbeat(heartbeat_ms: int, lease_ms: int) -> list[Mistake]:
    if heartbeat_ms < lease_ms:
        return []
    text = f"must be shorter than the lease of {format_duration(lease_ms)}, or a hold ends while its request runs"
    return [Mistake(text, "heartbeat")]


def session_ttl(ttl_ms: int, absolute_ttl_ms: int) -> list[Mistake]:
    if ttl_ms <= absolute_ttl_ms:
        return []
    return [Mistake(f"must not be longer than absolute_ttl, {format_duration(absolute_ttl_ms)}", "ttl")]


def signing_key(key: str | None) -> list[Mistake]:
    if key is None or len(key) >= SECRET_CHARS_MIN:
        return []
    return [Mistake(f"is too short to sign with: at least {SECRET_CHARS_MIN} characters", "signing_key")]


def jwt_key(key: Mapping[str, object]) -> list[Mistake]:
    """`key` maps jwks, secret and pem_file to their values, None or absent when not given."""
    given = [name for name in ("jwks", "secret", "pem_file") if key.get(name)]
    if len(given) != 1:
        return [Mistake(f"a key is exactly one of jwks, secret, pem_file, got {' and '.join(given) or 'none'}")]
    secret = key.get("secret")
    if not isinstance(secret, str):
        return []
    if secret.lstrip().startswith("-----BEGIN"):
        return [Mistake("this is a PEM key, not a shared secret: use pem_file", "secret")]
    if len(secret) < SECRET_CHARS_MIN:
        # RFC 7518 §3.2: a key at least as long as the hash output.
        return [Mistake(f"is too short for HS256: at least {SECRET_CHARS_MIN} characters (RFC 7518 §3.2)", "secret")]
    return []


def jwt_algorithms(keys: Sequence[Mapping[str, object]], algorithms: Sequence[object]) -> list[Mistake]:
    """One source verifies with shared secrets or with public keys, never both.

    A verifier that accepts both may be shown a token signed with HS256 under the *public* key as its secret.
    """
    secret = any(key.get("secret") for key in keys)
    public = any(key.get("jwks") or key.get("pem_file") for key in keys)
    if secret and public:
        return [
            Mistake("a secret and public keys in one source invite algorithm confusion: write two jwt sources", "keys")
        ]
    if secret and any(name in ("RS256", "ES256") for name in algorithms):
        return [Mistake("RS256 and ES256 need jwks or pem_file; a secret verifies only HS256", "algorithms")]
    if public and "HS256" in algorithms:
        return [Mistake("HS256 needs a secret; jwks and pem_file verify only RS256 and ES256", "algorithms")]
    return []


def plan_known(plan: object, default_plan: object) -> list[Mistake]:
    if plan or default_plan:
        return []
    return [Mistake("nothing says which plan its orgs have: give 'plan' or 'default_plan'")]


def trusts_everybody(networks: Sequence[str]) -> list[Mistake]:
    return [
        Mistake(f"{network} trusts everybody's headers: name the proxies' own networks", "from") for network in networks
    ]


def route_path(path: str) -> list[Mistake]:
    if path.startswith(OWN_PREFIX):
        return [Mistake(f"paths below {OWN_PREFIX} belong to the gateway itself", "path")]
    if any(segment in (".", "..") for segment in path.split("/")):
        return [Mistake("'.' and '..' cannot stand in a route path: such requests match no route", "path")]
    return []


def websocket_times(idle_ms: int, lifetime_ms: int) -> list[Mistake]:
    if idle_ms <= lifetime_ms:
        return []
    return [Mistake(f"must not be longer than the lifetime, {format_duration(lifetime_ms)}", "idle")]


def websocket_method(methods: Collection[str], has_websocket: bool) -> list[Mistake]:
    """`methods` is empty for a route that takes all of them."""
    if not has_websocket or not methods or "GET" in methods:
        return []
    return [Mistake("a WebSocket begins with a GET, which this route does not take", "websocket")]


def ejection(backoff_ms: int, backoff_max_ms: int) -> list[Mistake]:
    if backoff_ms <= backoff_max_ms:
        return []
    return [Mistake(f"must not be longer than backoff_max, {format_duration(backoff_max_ms)}", "backoff")]


def health_check(timeout_ms: int, interval_ms: int) -> list[Mistake]:
    if timeout_ms <= interval_ms:
        return []
    return [Mistake(f"must not be longer than the interval of {format_duration(interval_ms)}", "timeout")]


def requests_fit(requests_max: int | None, connections_max: int, targets: int) -> list[Mistake]:
    """A request in flight has a connection of its own."""
    connections = connections_max * targets
    if requests_max is None or requests_max <= connections:
        return []
    text = f"cannot be reached: connections_max allows {connections} to all targets, and each request needs one"
    return [Mistake(text, "requests_max")]


def targets_differ(targets: Sequence[object]) -> list[Mistake]:
    """Each would be counted, ejected and given connections as if it were alone."""
    urls = [target.rstrip("/").lower() for target in targets if isinstance(target, str)]
    twice = sorted({url for url in urls if urls.count(url) > 1})
    return [Mistake(f"'{url}' is there more than once", "targets") for url in twice]


def client_certificate(cert_file: object, key_file: object) -> list[Mistake]:
    if cert_file or not key_file:
        return []
    return [Mistake("a key proves nothing without its certificate: give client_cert_file", "client_key_file")]


#: Plans that are granted something again and again.
PERIODIC_GRANTS = ("top_up", "reset", "add")


def plan_grant(grant: object, written: Collection[str]) -> list[Mistake]:
    """`written` are the plan's YAML keys that are there with a value."""
    if grant not in ("none", "set_initial"):
        return []
    article = {"anchor": "an"}
    kinds = f"{', '.join(PERIODIC_GRANTS[:-1])} or {PERIODIC_GRANTS[-1]}"
    return [
        Mistake(f"only a plan with grant: {kinds} has {article.get(key, 'a')} {key}", key)
        for key in ("period", "zone", "anchor")
        if key in written
    ]
