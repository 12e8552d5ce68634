"""A cluster: one connection per primary, every command to the one that serves its key.

The map of slots is read from any server of the cluster: at the start, when a server says that a slot is elsewhere or
that the cluster is down, when a connection is lost, all the time while a part is away, and now and then. MOVED and ASK
say that a command did not run, so it is sent once more, to the server that they name. Nothing else is sent twice.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import hiredis
import structlog

from gateway.redis_address import Place, RedisAddress, shown
from gateway.stores.link import LinkLost, LinkTimeout, NotSent, Reply, Waiting
from gateway.stores.node import FAILURES, Node, Server, Terms, connect, error_kind
from gateway.stores.slots import SLOTS, SlotRange, count_slots, read_redirect, read_slots, slot_of_command

#: Between two readings of the map; doubled while reading it changes nothing.
PAUSE_MIN_S = 0.05
PAUSE_MAX_S = 1.0
#: The map is read so often even when nothing calls for it: of a server that froze nothing else may tell.
QUIET_S = 10.0
#: A server that takes over a slot (ASK) but has none yet stays connected so long after it was last named.
GUEST_S = 60.0

log = structlog.get_logger("gateway.redis")


class Cluster:
    """`start()` begins connecting; `link` is where commands go while any primary is connected; `close()` ends it."""

    def __init__(self, address: RedisAddress, terms: Terms, on_change: Callable[[], None]) -> None:
        self._address = address
        self._terms = terms
        self._on_change = on_change
        self._ranges: list[SlotRange] = []
        self._owners: list[Node | None] = [None] * SLOTS
        self._nodes: dict[Place, Node] = {}
        self._guests: dict[Place, float] = {}
        self._stale = asyncio.Event()
        self._settled = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        #: Commands that were sent again -> for which replies.
        self._followed: dict[asyncio.Future[Reply], tuple[str, ...]] = {}
        self._map_trouble: str | None = "not connected yet"

    @property
    def link(self) -> "Cluster | None":
        return self if self._any() is not None else None

    @property
    def trouble(self) -> str | None:
        """What cannot be used right now, if it is only a part of it; None while all of it is connected."""
        if self._map_trouble is not None:
            return self._map_trouble
        away = [f"{shown(place)} is away: {node.trouble}" for place, node in self._nodes.items() if node.link is None]
        if unserved := SLOTS - count_slots(self._ranges):
            away.append(f"{unserved} of {SLOTS} slots are served by nobody")
        return "; ".join(away) or None

    def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep_map(), name="redis-cluster-map")

    async def close(self) -> None:
        tasks = [*self._tasks, *([self._keeper] if self._keeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._keeper = None
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    def servers(self) -> tuple[Server, ...]:
        """Every server of the map, the primaries first."""
        slots: Counter[Place] = Counter()
        for part in self._ranges:
            slots[part.places[0]] += count_slots([part])
        replicas = {place for part in self._ranges for place in part.places[1:]} - slots.keys()
        primaries = (Server(self._address.at(place), slots=count) for place, count in slots.items())
        return (*primaries, *(Server(self._address.at(place), primary=False) for place in sorted(replicas)))

    async def connected(self) -> None:
        """A primary is connected. Waits and gives up as a Node does."""
        if self.link is None and not self._settled.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), self._terms.timeout_s)
        if self.link is None:
            raise NotSent(self.trouble)

    # Sending

    def send(self, *args: bytes | str | int) -> asyncio.Future[Reply]:
        """Like a Link's, to the server of the command's first key. A server whose reconnect has just begun is waited
        for, at most the command's deadline; NotSent when it is away."""
        slot = slot_of_command(args)
        node = self._any() if slot is None else self._owners[slot]
        if node is not None and node.link is not None:
            return node.link.send(*args)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Reply] = loop.create_future()
        if node is None:
            self._stale.set()
            answer.set_exception(NotSent("no server is connected" if slot is None else f"slot {slot} has no server"))
        else:
            self._deliver(node, (loop.time() + self._terms.timeout_s, answer, args))
        return answer

    def _any(self) -> Node | None:
        return next((node for node in self._nodes.values() if node.link is not None), None)

    def _deliver(self, node: Node, waiting: Waiting, reasons: tuple[str, ...] = ()) -> None:
        self._begin(self._send_to(node, waiting, reasons))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_to(self, node: Node, waiting: Waiting, reasons: tuple[str, ...]) -> None:
        """The caller has its reply, or learns in time why there is none. reasons: why it was sent before."""
        deadline, answer, args = waiting
        failure: Exception = NotSent(f"no connection within {self._terms.timeout_s * 1000:.0f} ms")
        try:
            async with asyncio.timeout_at(deadline):
                link = await node.connected()
                if answer.done():  # the caller has left
                    return
                failure = LinkTimeout(f"no reply within {self._terms.timeout_s * 1000:.0f} ms")
                if reasons[-1:] == ("ASK",):
                    link.send("ASKING").add_done_callback(_ignore)
                sent = link.send(*args)
                self._followed[sent] = reasons
                sent.add_done_callback(lambda done: self._followed.pop(done, None))
                reply = await sent
        except TimeoutError:
            pass
        except (LinkLost, LinkTimeout) as exc:
            failure = exc
        else:
            if not answer.done():
                answer.set_result(reply)
            return
        if not answer.done():
            answer.set_exception(failure)

    def _refused(self, node: Node, waiting: Waiting, error: hiredis.ReplyError) -> bool:
        """Whether the command goes elsewhere."""
        kind, answer = error_kind(error), waiting[1]
        if kind == "CLUSTERDOWN":
            self._stale.set()
        if kind not in ("MOVED", "ASK") or node.address is None:
            return False
        slot, place = read_redirect(str(error), node.address.host)
        other = self._node_at(place)
        if kind == "MOVED":
            self._owners[slot] = other
            self._stale.set()
        else:
            self._guests[place] = asyncio.get_running_loop().time()
        reasons = self._followed.get(answer, ())
        if kind in reasons or answer.done():
            return False
        self._deliver(other, waiting, (*reasons, kind))
        return True

    # The map

    async def _keep_map(self) -> None:
        pause_s = PAUSE_MIN_S
        while True:
            self._stale.clear()
            changed = False
            try:
                changed = self._take(await self._read_map())
                self._map_trouble = None
            except NotSent as exc:
                if self._map_trouble != str(exc):
                    log.warning("redis cluster unreachable", address=str(self._address), error=str(exc))
                self._map_trouble = str(exc)
                self._settled.set()
            pause_s = PAUSE_MIN_S if changed else min(pause_s * 2, PAUSE_MAX_S)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            if self.trouble is None:
                try:
                    async with asyncio.timeout(QUIET_S):
                        await self._stale.wait()
                except TimeoutError:
                    pause_s = PAUSE_MIN_S

    async def _read_map(self) -> list[SlotRange]:
        """The map as the first server has it that can tell, connected ones first. Raises NotSent when none can."""
        known = (place for part in self._ranges for place in part.places)
        places = list(dict.fromkeys((*self._nodes, *self._address.places, *known)))
        random.shuffle(places)
        places.sort(key=lambda place: place not in self._nodes or self._nodes[place].link is None)
        troubles = []
        for place in places:
            try:
                async with asyncio.timeout(self._terms.connect_timeout_s):
                    ranges = read_slots(await self._ask(place, "CLUSTER", "SLOTS"), place[0])
            except FAILURES as exc:
                reason = str(exc) or f"no answer within {self._terms.connect_timeout_s * 1000:.0f} ms"
                troubles.append(f"{shown(place)}: {reason}")
                continue
            if ranges:
                return ranges
            troubles.append(f"{shown(place)}: its cluster serves no slots")
        raise NotSent("; ".join(troubles))

    async def _ask(self, place: Place, *question: str) -> Reply:
        """The reply of the server there, on a connection of its own if it has none. Raises one of FAILURES."""
        node = self._nodes.get(place)
        if node is not None and node.link is not None:
            reply = await node.link.send(*question)
            if isinstance(reply, hiredis.ReplyError):
                raise reply
            return reply
        link, [reply] = await connect(self._address.at(place), self._terms.timeout_s, [question])
        link.abort()
        return reply

    def _take(self, ranges: list[SlotRange]) -> bool:
        """Slots belong to whom the map says, and who serves none is left; whether that changes anything."""
        before, self._ranges = self._owners, ranges
        self._owners = [None] * SLOTS
        for part in ranges:
            self._owners[part.first : part.last + 1] = [self._node_at(part.places[0])] * (part.last - part.first + 1)
        oldest = asyncio.get_running_loop().time() - GUEST_S
        self._guests = {place: named_at for place, named_at in self._guests.items() if named_at > oldest}
        wanted = {part.places[0] for part in ranges} | self._guests.keys()
        for place in self._nodes.keys() - wanted:
            self._begin(self._part_with(self._nodes.pop(place)))
        changed = before != self._owners
        if changed:
            primaries = sorted({shown(part.places[0]) for part in ranges})
            log.info("redis cluster map", primaries=primaries, slots=count_slots(ranges))
            self._on_change()
        return changed

    async def _part_with(self, node: Node) -> None:
        """Nothing new goes there; what is under way has its time."""
        try:
            await asyncio.sleep(self._terms.timeout_s)
        finally:
            await node.close()

    def _node_at(self, place: Place) -> Node:
        node = self._nodes.get(place)
        if node is None:

            async def find() -> RedisAddress:
                return self._address.at(place)

            node = self._nodes[place] = Node(find, self._terms, self._node_changed, on_refused=self._refused)
            node.start()
        return node

    def _node_changed(self) -> None:
        nodes = self._nodes.values()
        if any(node.link is None for node in nodes):
            self._stale.set()
        if self.link is not None or all(node.settled for node in nodes):
            self._settled.set()
        else:
            self._settled.clear()
        self._on_change()


def _ignore(future: asyncio.Future[Reply]) -> None:
    if not future.cancelled():
        future.exception()
