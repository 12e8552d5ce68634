"""Clusters and services watched by sentinels, of real servers on this machine, gone with their block.

    with cluster(nodes=3, replicas=1) as handle:    # handle.url, handle.nodes, handle.kill(node), handle.owner(key)
    with sentinels(replicas=1) as handle:           # handle.url, handle.nodes, handle.sentinels, handle.primary

The servers are the embedded Valkey unless `binary` says otherwise; Redis from 6.2 on will do. Starting takes three to
six seconds, in which nothing else of the process runs: let a fixture of a module do it.
"""

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gateway.embedded.process import free_port
from tests import nodes as servers_of
from tests.authority import Pems
from tests.nodes import Node, redis_url, wait_until

SLOTS = 16384
#: What the sentinels call the primary they watch.
SERVICE = "money"
#: The port on which a cluster's node talks to the others, above the one for clients.
BUS_OFFSET = 10_000

_DATA = """\
masterauth {password}
save ""
appendonly no
repl-diskless-sync-delay 0
repl-ping-replica-period 1
"""
#: A replica stands for election whatever it missed: nothing here lives for longer than a test.
_CLUSTER = """\
cluster-enabled yes
cluster-config-file nodes.conf
cluster-node-timeout 1000
cluster-replica-validity-factor 0
cluster-require-full-coverage {full_coverage}
{tls}
"""
_SENTINEL = """\
sentinel monitor {service} 127.0.0.1 {port} {quorum}
sentinel auth-pass {service} {password}
sentinel sentinel-pass {password}
sentinel down-after-milliseconds {service} 1000
sentinel failover-timeout {service} 2000
"""


@dataclass
class Handle:
    """Servers of data; `role` of each says what it was started as."""

    url: str
    nodes: list[Node]

    @property
    def alive(self) -> list[Node]:
        return [node for node in self.nodes if node.alive]

    def kill(self, node: Node) -> None:
        node.kill()

    def at(self, port: int | str) -> Node:
        return next(node for node in self.nodes if node.port == int(port))


@dataclass
class ClusterHandle(Handle):
    """Servers that share the keys."""

    def slot(self, key: str) -> int:
        slot: int = self.alive[0].do("CLUSTER", "KEYSLOT", key)
        return slot

    def owner(self, key: str | int) -> Node:
        """The primary of a key, or of a slot, as the first server that lives has it."""
        slot = key if isinstance(key, int) else self.slot(key)
        ranges = self.alive[0].do("CLUSTER", "SLOTS")
        return self.at(next(servers[0][1] for first, last, *servers in ranges if first <= slot <= last))

    def key_of(self, node: Node, form: str = "key{}") -> str:
        """Some key that this primary owns."""
        return next(key for number in range(1000) if self.owner(key := form.format(number)) is node)

    def replica_of(self, primary: Node) -> Node:
        """One that follows it now."""
        primary_id = primary.do("CLUSTER", "MYID")
        return self.at(next(fields[1] for fields in _members(primary) if fields[3] == primary_id))

    def begin_move(self, slot: int, target: Node) -> Node:
        """The slot is on its way from its owner, which is returned, to `target`."""
        source = self.owner(slot)
        target.do("CLUSTER", "SETSLOT", slot, "IMPORTING", source.do("CLUSTER", "MYID"))
        source.do("CLUSTER", "SETSLOT", slot, "MIGRATING", target.do("CLUSTER", "MYID"))
        return source

    def end_move(self, slot: int, source: Node, target: Node) -> None:
        """The keys of the slot, and the slot itself, are the target's."""
        while keys := source.do("CLUSTER", "GETKEYSINSLOT", slot, 100):
            where = ("127.0.0.1", target.port, "", 0, 5_000)
            source.do("MIGRATE", *where, "AUTH", target.password, "KEYS", *keys)
        target_id = target.do("CLUSTER", "MYID")
        for node in (target, source):
            node.do("CLUSTER", "SETSLOT", slot, "NODE", target_id)

    def move(self, slot: int, target: Node) -> None:
        self.end_move(slot, self.begin_move(slot, target), target)

    @property
    def whole(self) -> bool:
        """Every server that lives says that the cluster is well, and they agree who has what."""
        infos = [dict(line.split(":", 1) for line in node.do("CLUSTER", "INFO").split()) for node in self.alive]
        views = [
            sorted((first, last, servers[0][1]) for first, last, *servers in node.do("CLUSTER", "SLOTS"))
            for node in self.alive
        ]
        well = all(info["cluster_state"] == "ok" and info["cluster_slots_assigned"] == str(SLOTS) for info in infos)
        return well and all(view == views[0] for view in views)


@contextmanager
def cluster(
    nodes: int = 3,
    replicas: int = 0,
    *,
    binary: Path | None = None,
    full_coverage: bool = True,
    tls: Pems | None = None,
) -> Iterator[ClusterHandle]:
    """`nodes` primaries that share the slots evenly, each with `replicas` replicas, and all of them agree on it.

    full_coverage: while one part is away, no part is served; what servers do unless told otherwise."""
    primaries = nodes
    with servers_of.nodes(binary, tls) as servers:
        more = _CLUSTER.format(
            full_coverage="yes" if full_coverage else "no", tls="tls-cluster yes" if tls else ""
        ) + _DATA.format(password=servers.password)
        for number in range(primaries * (1 + replicas)):
            servers.start("primary" if number < primaries else "replica", _free_pair(), more)
        handle = ClusterHandle(redis_url("+cluster", servers.started, ""), servers.started)
        _introduce(handle.nodes)
        for number, node in enumerate(handle.nodes[:primaries]):
            first, end = SLOTS * number // primaries, SLOTS * (number + 1) // primaries
            node.do("CLUSTER", "ADDSLOTS", *range(first, end))
        for number, node in enumerate(handle.nodes[primaries:]):
            node.do("CLUSTER", "REPLICATE", handle.nodes[number % primaries].do("CLUSTER", "MYID"))
        wait_until(lambda: all(_follows(node) for node in handle.nodes[primaries:]))
        wait_until(lambda: handle.whole and all(_sees(node, primaries, replicas) for node in handle.nodes))
        yield handle


@dataclass
class SentinelHandle(Handle):
    """A primary, its replicas, and the sentinels that watch them."""

    sentinels: list[Node] = field(default_factory=list)

    @property
    def primary(self) -> Node:
        """The one that all sentinels name that live, or else the one that the first of them does."""
        living = next(node for node in self.sentinels if node.alive)
        return self.at(living.do("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])


@contextmanager
def sentinels(
    replicas: int = 1, *, count: int = 3, binary: Path | None = None, tls: Pems | None = None
) -> Iterator[SentinelHandle]:
    """A primary with `replicas` replicas, and `count` sentinels who know them and one another; one password for all."""
    with servers_of.nodes(binary, tls) as servers:
        password = servers.password
        primary = servers.start("primary", free_port(), _DATA.format(password=password))
        for _ in range(replicas):
            more = _DATA.format(password=password) + f"replicaof 127.0.0.1 {primary.port}"
            servers.start("replica", free_port(), more)
        watched = servers.started[:]
        wait_until(lambda: all(_follows(node) for node in watched[1:]))
        facts = {"service": SERVICE, "port": primary.port, "password": password, "quorum": count // 2 + 1}
        watchers = [servers.start("sentinel", free_port(), _SENTINEL.format(**facts)) for _ in range(count)]
        wait_until(lambda: all(_knows(node, replicas, count - 1) for node in watchers))
        url = redis_url("+sentinel", watchers, f"/{SERVICE}", sentinel_password=password)
        yield SentinelHandle(url, watched, watchers)


def _introduce(servers: list[Node]) -> None:
    """Everybody is connected to everybody."""
    for number, node in enumerate(servers):
        node.do("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
    for node in servers:
        for other in servers:
            if other is not node:
                node.do("CLUSTER", "MEET", "127.0.0.1", other.port)
    ports = {node.port for node in servers}
    for node in servers:
        wait_until(lambda node=node: _connected_ports(node) == ports)  # type: ignore[misc]


def _members(node: Node) -> list[list[str]]:
    """CLUSTER NODES: id, port, flags, id of the primary or -, ..., state of the link."""
    rows = [line.split() for line in node.do("CLUSTER", "NODES").splitlines()]
    return [[row[0], row[1].partition("@")[0].rpartition(":")[2], *row[2:]] for row in rows]


def _connected_ports(node: Node) -> set[int]:
    return {int(row[1]) for row in _members(node) if row[7] == "connected" and "handshake" not in row[2]}


def _follows(replica: Node) -> bool:
    return replica.info("replication").get("master_link_status") == "up"


def _sees(node: Node, primaries: int, replicas: int) -> bool:
    rows = node.do("CLUSTER", "SLOTS")
    return len(rows) == primaries and all(len(row) == 3 + replicas for row in rows)


def _knows(sentinel: Node, replicas: int, others: int) -> bool:
    fields = sentinel.do("SENTINEL", "MASTER", SERVICE)
    facts = dict(zip(fields[::2], fields[1::2], strict=True))
    return (int(facts["num-slaves"]), int(facts["num-other-sentinels"])) == (replicas, others)


def _free_pair() -> int:
    """A port that is free, as the one is on which the node talks to the others."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError, OverflowError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port + BUS_OFFSET))
            return port
