"""The servers behind the gateway: do the targets take connections, can the signing keys of tokens be read?"""

import time
from collections.abc import AsyncIterator, Iterable, Mapping

from gateway.cli.diagnosis.finding import ASK_TIMEOUT_MS, Finding, ok, problem, reason, warning
from gateway.config import IdentitySource, JwtSource, Upstream
from gateway.errors import GatewayError
from gateway.identity.verify_key import DOCUMENT_BYTES_MAX, parse_jwks
from gateway.upstream import Upstreams


async def examine_targets(configured: Mapping[str, Upstream]) -> AsyncIterator[Finding]:
    """Each target by itself: an upstream of which one target is dead still serves, and hides it."""
    for name, upstream in configured.items():
        for target in upstream.targets:
            yield await _target(f"upstream.{name}", target, upstream)


async def _target(name: str, target: str, upstream: Upstream) -> Finding:
    if target == "demo":
        says = "the target is the demo AI router, and `gateway run` is not running here"
        return warning(name, says, "start `gateway run`, or set AI_ROUTER_URL to your own router")
    started = time.perf_counter()
    try:
        upstreams = Upstreams({name: upstream.model_copy(update={"targets": (target,)})})
        try:
            await upstreams.probe(name)
        finally:
            await upstreams.aclose()
    except GatewayError as exc:
        says = f"{target} takes no connection: {_cause(exc)}"
        return problem(name, says, "start it, or correct the target in gateway.yaml (AI_ROUTER_URL)")
    return ok(name, f"{target} takes connections, in {(time.perf_counter() - started) * 1000:.0f} ms")


async def examine_jwks(sources: Iterable[IdentitySource]) -> AsyncIterator[Finding]:
    """Every JWKS document that some source verifies tokens with."""
    urls = {key.jwks for source in sources if isinstance(source, JwtSource) for key in source.keys if key.jwks}
    if not urls:
        return
    upstreams = Upstreams({})
    try:
        for url in sorted(urls):
            yield await _document(upstreams, url)
    finally:
        await upstreams.aclose()


async def _document(upstreams: Upstreams, url: str) -> Finding:
    # A query may carry a credential; nobody needs to see it here.
    shown = url.partition("?")[0]
    hint = "see identity.jwt.keys in gateway.yaml: without these keys no token is accepted"
    try:
        body = await upstreams.fetch(url, timeout_ms=ASK_TIMEOUT_MS, bytes_max=DOCUMENT_BYTES_MAX)
        found = parse_jwks(body)
    except GatewayError as exc:
        return problem("identity.jwks", f"{shown} cannot be read: {_cause(exc)}", hint)
    except ValueError as exc:
        return problem("identity.jwks", f"{shown}: {exc}", hint)
    return ok("identity.jwks", f"{shown} holds {len(found)} usable keys")


def _cause(exc: GatewayError) -> str:
    """The library's own words: they name the address and the reason."""
    cause = exc.__cause__
    return str(cause) if cause is not None and str(cause) else reason(exc)
