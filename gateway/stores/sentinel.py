"""Sentinels: who of their servers is the primary now.

They are asked in turn, on a connection of its own each time, because they are asked once per failover. The one that
answered is the first to be asked the next time.
"""

import asyncio

from gateway.redis_address import Place, RedisAddress, shown
from gateway.stores.link import NotSent, Reply
from gateway.stores.node import FAILURES, Server, Terms, connect


class Sentinels:
    """Those of one address, and the service it names."""

    def __init__(self, address: RedisAddress, terms: Terms) -> None:
        self._address = address
        self._terms = terms
        self._places = list(address.places)

    async def primary(self) -> RedisAddress:
        """Where the primary is, as the first sentinel that can tell says. Raises NotSent when none can."""
        troubles = []
        for place in tuple(self._places):
            found = await self.opinion(place)
            if isinstance(found, RedisAddress):
                self._places.remove(place)
                self._places.insert(0, place)
                return found
            troubles.append(f"{shown(place)}: {found}")
        raise NotSent("no sentinel names a primary: " + "; ".join(troubles))

    async def opinion(self, place: Place) -> RedisAddress | str:
        """Where this sentinel says that the primary is, or why it does not say."""
        try:
            found = await self._ask(place, "GET-MASTER-ADDR-BY-NAME")
        except FAILURES as exc:
            return str(exc) or f"no answer within {self._terms.connect_timeout_s * 1000:.0f} ms"
        return self._address.at(_place(*found)) if found else f"knows no service {self._address.service}"

    async def servers(self) -> tuple[Server, ...]:
        """The primary and its replicas. Raises NotSent when no sentinel can tell."""
        primary = await self.primary()
        try:
            replicas = await self._ask(self._places[0], "REPLICAS")
        except FAILURES as exc:
            raise NotSent(f"{shown(self._places[0])}: {exc}") from exc
        facts = [dict(zip(fields[::2], fields[1::2], strict=False)) for fields in replicas]
        others = (Server(self._address.at(_place(fact[b"ip"], fact[b"port"])), primary=False) for fact in facts)
        return (Server(primary), *others)

    async def _ask(self, place: Place, question: str) -> Reply:
        terms, greeting = self._terms, [("SENTINEL", question, self._address.service)]
        async with asyncio.timeout(terms.connect_timeout_s):
            link, [reply] = await connect(self._address.sentinel_at(place), terms.timeout_s, greeting)
        link.abort()
        return reply


def _place(host: bytes, port: bytes) -> Place:
    return host.decode(), int(port)
