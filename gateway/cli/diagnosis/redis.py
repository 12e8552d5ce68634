"""Redis or Valkey: is it there, fit to hold money, and doing what our scripts ask?"""

import re
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping

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
from gateway.config import Stores, format_duration
from gateway.errors import GatewayError, StoreUnavailable
from gateway.stores import Redis, Script

REDIS_VERSION_MIN = (6, 2)
VALKEY_VERSION_MIN = (7, 2)
MEMORY_SHARE_WARNING, MEMORY_SHARE_PROBLEM = 0.8, 0.95
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

Info = Mapping[str, str]


async def examine_redis(url: str, stores: Stores, flush_ms: int) -> AsyncIterator[Finding]:
    """flush_ms: how long a charge waits there at most before it is posted. Raises GatewayError when it goes away."""
    try:
        redis = Redis(url, timeout_ms=ASK_TIMEOUT_MS, connect_timeout_ms=ASK_TIMEOUT_MS)
    except GatewayError as exc:
        yield problem("redis.reachable", reason(exc), "correct stores.redis in gateway.yaml, or REDIS_URL")
        return
    redis.start()
    try:
        try:
            await redis.call("PING")
        except StoreUnavailable as exc:
            yield problem("redis.reachable", reason(exc), _why_unreachable(reason(exc)))
            return
        yield ok("redis.reachable", f"answers at {redis.address}")
        yield await _latency(redis, stores)
        info = await _info(redis)
        if info is None:
            yield _must_not("INFO")
        else:
            for finding in (_version(info), _role(info), *_memory(info), _last_save(info)):
                if finding is not None:
                    yield finding
            yield await _persistence(redis, info, flush_ms)
        yield await _scripts(redis)
        yield await _clock(redis)
    finally:
        await redis.close()


def _why_unreachable(trouble: str) -> str:
    text = trouble.lower()
    if "noauth" in text or "wrongpass" in text or "without any password" in text:
        return "the password or user name in the URL is not the server's: redis://user:password@host:6379/0"
    if "noperm" in text:
        return "the user in the URL may not do what the gateway needs: allow it all commands on ~{ai_credits:* keys"
    if "ssl" in text or "certificate" in text:
        return "TLS fails: rediss:// for a server with TLS, redis:// without; ?ssl_ca_certs=FILE for your own authority"
    if "name or service" in text or "resolution" in text or "nodename" in text:
        return "the host name in the URL is not known here: correct stores.redis, or REDIS_URL"
    return "start the server, or correct stores.redis in gateway.yaml (REDIS_URL); without it no request is admitted"


def _must_not(command: str) -> Finding:
    return warning(
        "redis.access",
        f"{command} is refused",
        "allow this user to ask it for a full examination; requests do not need it",
    )


async def _info(redis: Redis) -> Info | None:
    try:
        text: bytes = await redis.call("INFO")
    except StoreUnavailable:
        # While the connection stands it was the server that refused: no right, or a renamed command.
        if not redis.usable:
            raise
        return None
    lines = text.decode(errors="replace").splitlines()
    return {name: value for name, colon, value in (line.partition(":") for line in lines) if colon}


async def _latency(redis: Redis, stores: Stores) -> Finding:
    times_ms = []
    for _ in range(PINGS):
        started = time.perf_counter()
        await redis.call("PING")
        times_ms.append((time.perf_counter() - started) * 1000)
    return latency_finding(
        "redis.latency", statistics.median(times_ms), stores.redis_timeout_ms, "stores.redis_timeout"
    )


def _version(info: Info) -> Finding:
    valkey = info.get("valkey_version")
    name, text, least = (
        ("Valkey", valkey, VALKEY_VERSION_MIN)
        if valkey
        else ("Redis", info.get("redis_version", ""), REDIS_VERSION_MIN)
    )
    numbers = tuple(int(part) for part in re.findall(r"\d+", text)[:2])
    wanted = ".".join(map(str, least))
    if numbers >= least:
        return ok("redis.version", f"{name} {text}")
    return problem("redis.version", f"{name} {text or 'of unknown version'}", f"{name} {wanted} or later is needed")


def _role(info: Info) -> Finding:
    if info.get("redis_mode") == "sentinel":
        return problem(
            "redis.role", "this is a Sentinel, not a server of data", "name the primary itself in stores.redis"
        )
    if info.get("cluster_enabled") == "1":
        return problem(
            "redis.role",
            "this is a node of a cluster: keys of other nodes are refused",
            "use a server without cluster mode",
        )
    if info.get("role") != "master":
        return problem("redis.role", "this is a replica: it takes no writes", "name the primary in stores.redis")
    return ok("redis.role", "a primary")


def _memory(info: Info) -> Iterator[Finding]:
    policy = info.get("maxmemory_policy", "")
    if policy.startswith("allkeys"):
        yield problem(
            "redis.eviction",
            f"maxmemory-policy is {policy}: holds and charges that are not posted may be evicted",
            "CONFIG SET maxmemory-policy noeviction, and in the server's configuration too",
        )
    else:
        yield ok("redis.eviction", f"maxmemory-policy is {policy or 'not told'}")
    used_bytes, bytes_max = _number(info, "used_memory"), _number(info, "maxmemory")
    used = f"{used_bytes / (1 << 20):.1f} MiB used"
    if bytes_max == 0:
        yield ok("redis.memory", f"{used}, maxmemory is not set")
        return
    share = used_bytes / bytes_max
    says = f"{used} of {bytes_max / (1 << 20):.1f} MiB ({share:.0%})"
    hint = "give it more memory: when it is full no request is admitted"
    if share >= MEMORY_SHARE_PROBLEM:
        yield problem("redis.memory", says, hint)
    elif share >= MEMORY_SHARE_WARNING:
        yield warning("redis.memory", says, hint)
    else:
        yield ok("redis.memory", says)


def _last_save(info: Info) -> Finding | None:
    failed = [
        what
        for field, what in (
            ("rdb_last_bgsave_status", "the last snapshot failed"),
            ("aof_last_write_status", "the last write to the append-only file failed"),
            ("aof_last_bgrewrite_status", "the last rewrite of the append-only file failed"),
        )
        if info.get(field, "ok") != "ok"
    ]
    if not failed:
        return None
    return problem("redis.disk", " and ".join(failed), "look at the server's log and its disk: it may refuse writes")


async def _persistence(redis: Redis, info: Info, flush_ms: int) -> Finding:
    if info.get("aof_enabled") == "1":
        return ok("redis.persistence", "append-only file on: a restart loses at most what appendfsync allows")
    try:
        saves = await redis.call("CONFIG", "GET", "save")
    except StoreUnavailable:
        # Hosted servers refuse CONFIG, whoever asks.
        saves = None
    lost = (
        f"the counters of every limit, open holds, conversations, and charges not yet posted "
        f"(normally those of the last {format_duration(flush_ms)})"
    )
    hint = "CONFIG SET appendonly yes, and in the server's configuration too; balances themselves are in PostgreSQL"
    if saves is None:
        return warning("redis.persistence", f"no append-only file; without snapshots a restart loses {lost}", hint)
    if len(saves) > 1 and saves[1]:
        return warning("redis.persistence", f"snapshots only: a crash loses, since the last one, {lost}", hint)
    return warning("redis.persistence", f"neither append-only file nor snapshots: a restart loses {lost}", hint)


async def _scripts(redis: Redis) -> Finding:
    """EVALSHA runs and may write, and the server understands every script of this release."""
    token = str(time.time_ns())
    try:
        read = await redis.run(PROBE, [PROBE_KEY], [token])
        for name in (*limits.LOOPS, *limits.PLAIN):
            await redis.call("SCRIPT", "LOAD", limits.script_text(name))
    except StoreUnavailable as exc:
        return problem("redis.scripts", f"scripts do not run: {reason(exc)}", _why_no_scripts(reason(exc)))
    if read != token.encode():
        return problem(
            "redis.scripts", "a script did not read what it had written", "is this really a Redis or Valkey?"
        )
    return ok("redis.scripts", "EVALSHA runs, writes, and knows this release's scripts")


def _why_no_scripts(trouble: str) -> str:
    if "NOPERM" in trouble:
        return "this user may not: allow it EVALSHA, EVAL and SCRIPT LOAD, and ~{ai_credits:* keys"
    if "READONLY" in trouble:
        return "this is a replica: name the primary in stores.redis"
    if "OOM" in trouble:
        return "the server's memory is full: give it more"
    if "MISCONF" in trouble or "NOREPLICAS" in trouble:
        return "the server refuses writes until its disk or its replicas are in order; see its log"
    return "the gateway admits through scripts; see the server's log"


async def _clock(redis: Redis) -> Finding:
    before = time.time_ns()
    seconds, microseconds = await redis.call("TIME")
    middle_ms = (before + time.time_ns()) // 2_000_000
    return clock_finding("redis.clock", "Redis's", middle_ms - int(seconds) * 1000 - int(microseconds) // 1000)


def _number(info: Info, field: str) -> int:
    text = info.get(field, "")
    return int(text) if text.isdigit() else 0
