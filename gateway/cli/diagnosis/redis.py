"""Redis or Valkey: is it there, all of it, fit to hold money, and doing what our scripts ask?"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from gateway import keys, limits
from gateway.cli.diagnosis.finding import (
    ASK_TIMEOUT_MS,
    Finding,
    clock_finding,
    latency_finding,
    ok,
    problem,
    reason,
    warning,
)
from gateway.cli.diagnosis.redis_server import examine_server
from gateway.config import Stores
from gateway.errors import GatewayError, StoreUnavailable
from gateway.redis_address import RedisAddress, shown
from gateway.stores import Redis, Script, Sentinels, Server, Terms

SLOTS = 16384
PINGS = 5

#: A key of the form that all others have, so that access rules by key pattern are tried as well.
PROBE_KEY = keys.tombstone("-", "doctor")
PROBE = Script(
    "doctor",
    "redis.call('SET', KEYS[1], ARGV[1], 'PX', 1000)\n"
    "local read = redis.call('GET', KEYS[1])\n"
    "redis.call('DEL', KEYS[1])\n"
    "return read",
)


async def examine_redis(url: str, stores: Stores, flush_ms: int) -> AsyncIterator[Finding]:
    """flush_ms: how long a charge waits there at most before it is posted. Raises GatewayError when it goes away."""
    async with AsyncExitStack() as opened:
        try:
            redis = _open(opened, url)
        except GatewayError as exc:
            yield problem("redis.reachable", reason(exc), "correct stores.redis in gateway.yaml, or REDIS_URL")
            return
        try:
            await redis.call("PING")
        except StoreUnavailable as exc:
            yield problem("redis.reachable", reason(exc), _why_unreachable(reason(exc)))
            return
        yield ok("redis.reachable", f"answers at {redis.address}")
        yield await _latency(redis, stores)
        servers = await redis.servers()
        async for finding in _topology(redis.address, servers):
            yield finding
        each = [redis] if redis.address.topology == "single" else [_open(opened, server.address) for server in servers]
        found = await asyncio.gather(
            *(_examine(one, redis, server, flush_ms) for one, server in zip(each, servers, strict=True))
        )
        for finding in _together(servers, found):
            yield finding
        primaries = [one for one, server in zip(each, servers, strict=True) if server.primary and one.usable]
        yield await _scripts(redis, primaries)
        yield await _clock(primaries or [redis])


def _open(opened: AsyncExitStack, address: str | RedisAddress) -> Redis:
    redis = Redis(address, timeout_ms=ASK_TIMEOUT_MS, connect_timeout_ms=ASK_TIMEOUT_MS)
    redis.start()
    opened.push_async_callback(redis.close)
    return redis


async def _examine(one: Redis, redis: Redis, server: Server, flush_ms: int) -> list[Finding]:
    """One server of those behind `redis`; it may be away without the others."""
    try:
        return await examine_server(one, redis.address.topology, server.primary, flush_ms)
    except StoreUnavailable as exc:
        if one is redis:
            raise
        return [problem("redis.reachable", reason(exc), _why_unreachable(reason(exc)))]


async def _topology(address: RedisAddress, servers: Sequence[Server]) -> AsyncIterator[Finding]:
    name, primaries = "redis.topology", [server for server in servers if server.primary]
    replicas_count = len(servers) - len(primaries)
    count = f"{len(primaries)} primaries, {replicas_count} replicas"
    if address.topology == "single":
        yield ok(name, "a single server")
        return
    if replicas_count < len(primaries):
        says = f"{count}: when a primary without a replica is lost, nothing takes its place"
        yield warning(name, says, "give every primary a replica on another machine")
    else:
        yield ok(name, f"{address.topology}: {count}")
    if address.topology == "sentinel":
        async for finding in _sentinels(address, primaries[0].address):
            yield finding
    elif unserved := SLOTS - sum(server.slots for server in servers):
        says = f"{unserved} of {SLOTS} slots are served by nobody: orgs that are kept there are refused"
        yield problem(name, says, "bring back the servers that are missing; redis-cli --cluster check says more")


async def _sentinels(address: RedisAddress, primary: RedisAddress) -> AsyncIterator[Finding]:
    sentinels = Sentinels(address, Terms(ASK_TIMEOUT_MS / 1000, ASK_TIMEOUT_MS / 1000))
    opinions = await asyncio.gather(*map(sentinels.opinion, address.places))
    for place, opinion in zip(address.places, opinions, strict=True):
        if isinstance(opinion, str):
            hint = "a failover needs a majority of the sentinels: start it, or correct stores.redis"
            yield warning("redis.sentinels", f"{shown(place)}: {opinion}", hint)
        elif opinion != primary:
            says = f"{shown(place)} names another primary ({opinion}) than the others ({primary})"
            yield problem("redis.sentinels", says, "in the midst of a failover ask again; else look at its log")
    agreeing = opinions.count(primary)
    if agreeing == len(opinions):
        yield ok("redis.sentinels", f"all {agreeing} name {primary}")


def _together(servers: Sequence[Server], found: Sequence[list[Finding]]) -> Iterator[Finding]:
    """What was found of each server, said once where it is the same."""
    whose: dict[Finding, list[str]] = {}
    for server, findings in zip(servers, found, strict=True):
        for finding in findings:
            whose.setdefault(finding, []).append(shown(server.address.places[0]) if server.address.places else "")
    for finding, places in whose.items():
        if len(servers) == 1:
            yield finding
        else:
            whom = f"all {len(servers)} servers" if len(places) == len(servers) else ", ".join(places)
            yield replace(finding, says=f"{whom}: {finding.says}")


def _why_unreachable(trouble: str) -> str:
    text = trouble.lower()
    if "noauth" in text or "wrongpass" in text or "without any password" in text:
        return "the password or user name in the URL is not the server's: redis://user:password@host:6379/0"
    if "noperm" in text:
        return "the user in the URL may not do what the gateway needs: docs/operations.md has the line that allows it"
    if "ssl" in text or "certificate" in text:
        return "TLS fails: rediss:// for a server with TLS, redis:// without; ?ssl_ca_certs=FILE for your own authority"
    if "name or service" in text or "resolution" in text or "nodename" in text:
        return "the host name in the URL is not known here: correct stores.redis, or REDIS_URL"
    return "start the server, or correct stores.redis in gateway.yaml (REDIS_URL); without it no request is admitted"


async def _latency(redis: Redis, stores: Stores) -> Finding:
    times_ms = []
    for _ in range(PINGS):
        started = time.perf_counter()
        await redis.call("PING")
        times_ms.append((time.perf_counter() - started) * 1000)
    return latency_finding(
        "redis.latency", statistics.median(times_ms), stores.redis_timeout_ms, "stores.redis_timeout"
    )


async def _scripts(redis: Redis, primaries: Sequence[Redis]) -> Finding:
    """EVALSHA runs and may write, and every primary understands every script of this release."""
    token = str(time.time_ns())
    try:
        read = await redis.run(PROBE, [PROBE_KEY], [token])
        for name in (*limits.LOOPS, *limits.PLAIN):
            for one in primaries:
                await one.call("SCRIPT", "LOAD", limits.script_text(name))
    except StoreUnavailable as exc:
        return problem("redis.scripts", f"scripts do not run: {reason(exc)}", _why_no_scripts(reason(exc)))
    if read != token.encode():
        return problem(
            "redis.scripts", "a script did not read what it had written", "is this really a Redis or Valkey?"
        )
    return ok("redis.scripts", "EVALSHA runs, writes, and knows this release's scripts")


def _why_no_scripts(trouble: str) -> str:
    if "NOPERM" in trouble:
        return "this user may not: allow it what docs/operations.md says, on ~{ai_credits:* and the other keys"
    if "READONLY" in trouble:
        return "this is a replica: name the primary in stores.redis"
    if "OOM" in trouble:
        return "the server's memory is full: give it more"
    if "MISCONF" in trouble or "NOREPLICAS" in trouble:
        return "the server refuses writes until its disk or its replicas are in order; see its log"
    return "the gateway admits through scripts; see the server's log"


async def _clock(servers: Sequence[Redis]) -> Finding:
    """The one that differs most."""
    offsets_ms = []
    for redis in servers:
        before = time.time_ns()
        seconds, microseconds = await redis.call("TIME")
        middle_ms = (before + time.time_ns()) // 2_000_000
        offsets_ms.append(middle_ms - int(seconds) * 1000 - int(microseconds) // 1000)
    return clock_finding("redis.clock", "Redis's", max(offsets_ms, key=abs))
