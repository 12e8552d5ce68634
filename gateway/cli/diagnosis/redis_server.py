"""One server of Redis or Valkey: is it fit to hold money?"""

import re
from collections.abc import Iterator, Mapping

from gateway.cli.diagnosis.finding import Finding, ok, problem, warning
from gateway.config import format_duration
from gateway.errors import StoreUnavailable
from gateway.redis_address import Topology
from gateway.stores import Redis

REDIS_VERSION_MIN = (6, 2)
VALKEY_VERSION_MIN = (7, 2)
MEMORY_SHARE_WARNING, MEMORY_SHARE_PROBLEM = 0.8, 0.95

Info = Mapping[str, str]


async def examine_server(redis: Redis, topology: Topology, primary: bool, flush_ms: int) -> list[Finding]:
    """redis: this server alone. topology, primary: what it is meant to be. Raises GatewayError when it goes away."""
    info = await _info(redis)
    asked = (_version(info), _role(info, topology, primary), *_memory(info), _last_save(info))
    return [*(finding for finding in asked if finding is not None), await _persistence(redis, info, flush_ms)]


async def _info(redis: Redis) -> Info:
    text: bytes = await redis.call("INFO")
    lines = text.decode(errors="replace").splitlines()
    return {name: value for name, colon, value in (line.partition(":") for line in lines) if colon}


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


def _role(info: Info, topology: Topology, primary: bool) -> Finding:
    name, hint = "redis.role", "name the primary in stores.redis"
    if "sentinel" in (info.get("redis_mode"), info.get("server_mode")):
        return problem(
            name, "this is a Sentinel, not a server of data", "redis+sentinel://HOST:26379,.../SERVICE asks it for one"
        )
    if topology != "cluster" and info.get("cluster_enabled") == "1":
        return problem(
            name, "this is a node of a cluster: keys of other nodes are refused", "redis+cluster://HOST:6379 finds them"
        )
    if info.get("role") == "master":
        return ok(name, "a primary") if primary else problem(name, "a primary where a replica is expected", hint)
    if primary:
        return problem(name, "this is a replica: it takes no writes", hint)
    if info.get("master_link_status") != "up":
        return problem(name, "a replica that has lost its primary", "see its log: it would take over with old data")
    return ok(name, "a replica, in touch with its primary")


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


def _number(info: Info, field: str) -> int:
    text = info.get(field, "")
    return int(text) if text.isdigit() else 0
