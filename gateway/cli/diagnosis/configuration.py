"""The configuration itself: valid, but is it wise? Weak secrets and doors left open."""

from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from gateway.cli.diagnosis.finding import Finding, ok, problem, warning
from gateway.config import JwtSource, Settings
from gateway.redis_address import RedisAddress

#: A random secret of 32 characters has about this many different ones even in hexadecimal.
DIFFERENT_CHARS_MIN = 10
_PLACEHOLDERS = ("change", "secret", "example", "password", "0123456789", "abcdef0123", "your-", "test")
_MAKE_ONE = "make one: python3 -c 'import secrets; print(secrets.token_urlsafe(48))'"


async def examine_configuration(settings: Settings) -> AsyncIterator[Finding]:
    yield ok("config.valid", f"{len(settings.routes)} routes, {len(settings.plans)} plans, no mistakes")
    for examined in (_secrets(settings), _stores(settings), _upstreams(settings), _listen(settings)):
        for finding in examined:
            yield finding


def _secrets(settings: Settings) -> Iterator[Finding]:
    signing_key = settings.sessions.signing_key
    if signing_key is None:
        yield ok("config.signing_key", "none: the context sent upstream is not signed")
    else:
        yield _strength("config.signing_key", signing_key)
    for source in settings.identity:
        if isinstance(source, JwtSource):
            for key in source.keys:
                if key.secret is not None:
                    yield _strength("config.jwt_secret", key.secret)


def _strength(name: str, secret: str) -> Finding:
    """Never says anything of the secret but how it looks."""
    lowered = secret.lower()
    found = next((word for word in _PLACEHOLDERS if word in lowered), None)
    if len(set(secret)) < DIFFERENT_CHARS_MIN:
        return problem(name, f"is made of only {len(set(secret))} different characters: it can be guessed", _MAKE_ONE)
    if found is not None:
        return warning(name, f"looks like a placeholder (it contains '{found}')", _MAKE_ONE)
    return ok(name, f"{len(secret)} characters, looks random")


def _stores(settings: Settings) -> Iterator[Finding]:
    if settings.stores.redis == "embedded":
        return
    address = RedisAddress.parse(settings.stores.redis)
    elsewhere = [host for host, _ in address.places if not _is_here(host)]
    public = [host for host in elsewhere if _is_public(host)]
    if elsewhere and not address.login.password:
        says = f"no password for Redis at {elsewhere[0]}"
        yield warning("config.redis", says, "anybody on that network can change balances: set requirepass")
    if public and not address.tls:
        says = f"Redis at {public[0]} is reached over the internet without TLS"
        yield problem("config.redis", says, "use TLS: rediss instead of redis")


def _upstreams(settings: Settings) -> Iterator[Finding]:
    for name, upstream in settings.upstreams.items():
        if not upstream.tls_verify:
            says = f"upstream '{name}' is believed without checking its certificate"
            yield warning("config.tls_verify", says, "name its authority in ca_file instead of tls_verify: false")
        for target in upstream.targets:
            host = urlsplit(target).hostname
            if target.startswith("http://") and host is not None and _is_public(host):
                says = f"upstream '{name}' is reached over the internet without TLS ({host})"
                yield warning("config.upstream_tls", says, "use https://")


def _listen(settings: Settings) -> Iterator[Finding]:
    wide = [str(network) for network in settings.listen.trusted_proxies if network.prefixlen == 0]
    if wide:
        says = f"listen.trusted_proxies holds {wide[0]}: any client can choose the address it is known by"
        yield problem("config.trusted_proxies", says, "name the proxies' own networks")


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_public(host: str) -> bool:
    """An address of the internet. Of a name nothing is known here, so it is given the benefit of the doubt."""
    try:
        return ip_address(host).is_global
    except ValueError:
        return False
