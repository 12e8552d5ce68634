"""The customers of a run: plain answers and streams, some leave, some try again with an Idempotency-Key."""

import asyncio
import contextlib
import random
import uuid
from collections import Counter
from dataclasses import dataclass, field

from tests.chaos.upstream import WORD
from tests.chaos.world import Org, World, body

ANSWER_TIMEOUT_S = 15.0
ATTEMPTS = 4
#: Words of a plain answer, and of a stream; the longest takes 4 s, so that heartbeats tell of it.
PLAIN_WORDS = (10, 100)
STREAM_WORDS = (20, 20, 60, 60, 200, 200, 400, 400, 4_000)


@dataclass
class Seen:
    """What a customer has seen of one sending of a request."""

    key: str = ""
    #: The status; `cut` for an answer that broke off, `ran out` for one that said so, `left` when the customer did,
    #: `refused` when nobody listened.
    end: str = ""
    words: int = 0


@dataclass
class Customers:
    """`run()` asks until `stop` is set."""

    world: World
    dice: random.Random
    stop: asyncio.Event
    statuses: Counter[str] = field(default_factory=Counter)
    #: By the name that the customer gave the sending.
    seen: dict[str, Seen] = field(default_factory=dict)

    async def run(self, count: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(self._one())

    async def _one(self) -> None:
        busy = [org for org in self.world.orgs if not org.idle]
        while not self.stop.is_set():
            org = self.dice.choice(busy)
            stream = self.dice.random() < 0.5
            words = self.dice.choice(STREAM_WORDS if stream else PLAIN_WORDS)
            leaves = self.dice.random() < 0.15
            key = str(uuid.UUID(int=self.dice.getrandbits(128))) if self.dice.random() < 0.25 else ""
            for _ in range(ATTEMPTS if key else 1):
                seen = Seen(key)
                attempt = str(len(self.seen))
                self.seen[attempt] = seen
                await self._ask(org, words, stream, leaves, attempt, seen)
                self.statuses[seen.end] += 1
                if seen.end not in ("cut", "refused", "left", "503", "409"):
                    break
                leaves = False
                await asyncio.sleep(self.dice.uniform(0, 0.3))
            await asyncio.sleep(self.dice.uniform(0.01, 0.05))

    async def _ask(self, org: Org, words: int, stream: bool, leaves: bool, attempt: str, seen: Seen) -> None:
        seen.end = "refused"
        address = self.dice.choice([seat.address for seat in self.world.seats])
        if address is None:
            await asyncio.sleep(0.05)
            return
        host, _, port = address.removeprefix("http://").rpartition(":")
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, int(port))
        except (OSError, TimeoutError):
            return
        answer = bytearray()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                writer.write(_request(org, body(words, stream), attempt, seen.key))
                enough = self.dice.choice((1, 400, 4_000, 20_000)) if leaves else 0
                while data := await reader.read(enough or 65_536):
                    answer += data
                    if 0 < enough <= len(answer):
                        seen.end = "left"
                        break
                else:
                    seen.end = _judged(bytes(answer))
        except OSError:
            seen.end = "cut"
        except TimeoutError:
            seen.end = "left"
        finally:
            writer.transport.abort()
            seen.words = answer.count(WORD.encode())


def _judged(answer: bytes) -> str:
    status = answer[9:12].decode("latin-1")
    if not status:
        return "cut"
    if status == "200" and b"insufficient_credits" in answer:
        return "ran out"
    return status if status != "200" or _is_whole(answer) else "cut"


def _request(org: Org, content: bytes, attempt: str, key: str) -> bytes:
    path = "/once" if key else "/v1/chat/completions"
    once = f"Idempotency-Key: {key}\r\n" if key else ""
    return (
        f"POST {path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {org.secret}\r\nX-Attempt: {attempt}\r\n{once}"
        f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    ).encode() + content


def _is_whole(answer: bytes) -> bool:
    """A stream that ends in good order may still have been cut: then its last event says why."""
    head, _, content = answer.partition(b"\r\n\r\n")
    if b"chunked" in head.lower():
        return b"data: [DONE]" in content and content.endswith(b"0\r\n\r\n")
    with contextlib.suppress(ValueError, IndexError):
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return len(content) == length
    return False
