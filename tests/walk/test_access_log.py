"""One line per request, whatever became of it, with what an operator asks for and nothing that must stay secret."""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import jwt
import pytest

from gateway.ledger import grant
from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, REFUSE, House, Process, chat_body
from tests.walk.raw import Relay, Visit

CHAT = "/v1/chat/completions"
JWT_SECRET, SIGNING_KEY = "jwt-secret-of-at-least-32-bytes-okapi", "signing-key-of-32-bytes-or-more-quagga"
SESSION, QUESTION, ANSWER, QUERY = "talk-capybara", "question-zanzibar", "answer-quokka", "query-pangolin"
UNKNOWN_KEY = "gw_" + "unknown-tapir" + "x" * 30
COMPLETION = json.dumps(
    {
        "object": "chat.completion",
        "model": "demo-small-2026",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": ANSWER}}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
    }
).encode()
SETTINGS = {
    "trusted": "[127.0.0.0/8]",
    "client_idle": "300ms",
    "first_byte": "500ms",
    "idle": "300ms",
    "signing_key": SIGNING_KEY,
    "identity": f"[ api_key: {{}}, jwt: {{ keys: [ secret: {JWT_SECRET} ], org: org, user: sub, plan: plan }} ]",
    "routes": f"""
  - {{ path: {CHAT}, method: POST, upstream: ai_router, dialect: openai, usage: openai_chat, body_bytes_max: 64KiB }}
  - {{ path: /get-only, method: GET, upstream: ai_router }}
  - {{ path: /up/*, upstream: ai_router }}
""",
    **REFUSE,
}
LIMITS = [
    {"name": "per-talk", "count": "requests", "limit": 1, "window": "1h", "per": "session"},
    {"name": "tph", "count": "tokens", "limit": 100_000, "window": "1h", "per": "org"},
]


async def by_path(visit: Visit) -> None:
    """An upstream that does what the path says."""
    path = (await visit.read_head()).split(b" ")[1].partition(b"?")[0]
    if path == b"/up/hangs-up":
        return
    if path in (b"/up/stalls", b"/up/breaks"):
        await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf")
    elif path != b"/up/silent":
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        status = b"418 I'm a teapot" if path == b"/up/teapot" else b"200 OK"
        await visit.send(head % (status, len(COMPLETION)) + COMPLETION)
    if path != b"/up/breaks":
        await visit.until_closed()


@dataclass
class Told:
    """A gateway whose stores and upstream can be taken away, and what each request's line must say."""

    house: House
    process: Process
    client: httpx.AsyncClient
    redis: Relay
    upstream: Relay
    visits: list[Visit]
    #: Name of the request -> the status and the decision of its line.
    expected: dict[str, tuple[int, str]] = field(default_factory=dict)
    #: Every credential that was sent.
    credentials: set[str] = field(default_factory=set)

    async def ask(self, name: str, status: int, decision: str, path: str = CHAT, **request: Any) -> None:
        """One request that is answered."""
        self.expected[name] = (status, decision)
        given = request.pop("headers", {})
        fields = {"x-request-id": name, "x-session-id": f"{SESSION}-{name}", **given}
        if "content" not in request:
            request.setdefault("json", chat_body(QUESTION))
        answer = await self.client.post(f"{path}?q={QUERY}", headers=fields, **request)
        assert answer.status_code == status, answer.text

    async def ask_as(self, credential: str, name: str, status: int, decision: str) -> None:
        self.credentials.add(credential)
        await self.ask(name, status, decision, headers={"authorization": f"Bearer {credential}"})

    async def be_cut_off(self, name: str, decision: str, path: str) -> None:
        """An answer that does not come to its end."""
        self.expected[name] = (200, decision)
        with pytest.raises(httpx.RemoteProtocolError):
            await self.client.post(f"{path}?q={QUERY}", headers={"x-request-id": name}, content=b"{}")

    async def leave(self, name: str, path: str, secret: str) -> None:
        """A client that leaves: before the first byte of the answer, or after the first bytes if there are any."""
        self.expected[name] = (499, "client_left")
        seen = len(self.visits)
        async with raw.connection(self.process.address) as (reader, writer):
            writer.write(named(raw.request(secret, f"{path}?q={QUERY}"), name))
            await until(lambda: len(self.visits) > seen and self.visits[-1].head)
            if path == "/up/stalls":
                await reader.readuntil(b"half")
            elif name == "holder":
                await self.ask_as(secret, "in-flight", 429, "credits_in_flight")
        # The relay between makes no difference: the gateway has closed its side.
        await until(lambda: self.visits[seen].closed_at)

    async def stop_sending(self, name: str) -> None:
        self.expected[name] = (408, "request_timeout")
        async with raw.connection(self.process.address) as (reader, writer):
            writer.write(named(raw.request(self.house.secret, CHAT, body=QUESTION.encode() * 9), name)[:-5])
            assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")

    def line(self, name: str) -> Mapping[str, Any]:
        (line,) = [line for line in self.process.events("request") if line["request_id"] == name]
        return line


def named(request: bytes, name: str) -> bytes:
    return request.replace(b"Host:", f"X-Request-Id: {name}\r\nHost:".encode(), 1)


def token(**claims: Any) -> str:
    every = {"exp": int(time.time()) + 60, "org": "acme", "sub": "ada@example.com", "plan": "pro", **claims}
    return jwt.encode(every, JWT_SECRET, algorithm="HS256")


@pytest.fixture
async def told(house: House) -> AsyncIterator[Told]:
    house.settings.update(SETTINGS)
    house.limits = LIMITS
    await house.credits(100)
    async with (
        raw.upstream(by_path) as scripted,
        raw.relay(scripted.url) as upstream,
        raw.relay(house.redis_url) as redis,
    ):
        house.upstream_url, house.settings["redis"] = upstream.url, redis.url
        async with Process(house) as process, house.client(process.address) as client:
            yield Told(house, process, client, redis, upstream, scripted.visits)


async def ask_everything(told: Told) -> None:
    house = told.house
    told.credentials.add(house.secret)
    poor, one_credit = await house.add_key("globex"), await house.add_key("initech")
    await grant(house.postgres, "initech", 1, grant_id="grant:test")
    by_token = token()

    await told.ask("plain", 200, "admitted")
    await told.ask_as(by_token, "by-token", 200, "admitted")
    await told.ask("other-path", 200, "admitted", path="/up/path", content=b"{}")
    await told.ask("refused-there", 418, "admitted", path="/up/teapot", content=b"{}")
    await told.ask("malformed", 400, "bad_request", content=b'{"model": ' + QUESTION.encode())
    await told.ask("bad-session", 400, "bad_request", headers={"x-session-id": f"{SESSION} with spaces"})
    await told.ask("never-fits", 400, "request_exceeds_limit", json=chat_body(QUESTION, max_tokens=999_999))
    await told.ask_as(UNKNOWN_KEY, "no-key", 401, "invalid_api_key")
    await told.ask_as(by_token[:-4] + "AAAA", "bad-token", 401, "invalid_api_key")
    await told.ask_as(poor, "no-credits", 402, "insufficient_credits")
    await told.ask_as(token(plan="platinum"), "no-plan", 403, "unknown_plan")
    await told.ask("no-route", 404, "unknown_route", path="/nowhere", content=b"")
    await told.ask("wrong-method", 405, "method_not_allowed", path="/get-only", content=b"")
    await told.stop_sending("slow-body")
    await told.ask("too-large", 413, "body_too_large", content=b"x" * 70_000)
    talk = {"x-session-id": f"{SESSION}-twice"}
    await told.ask("first-turn", 200, "admitted", headers=talk)
    await told.ask("over-limit", 429, "rate_limit_exceeded", headers=talk)
    await told.leave("holder", "/up/silent", one_credit)
    await told.leave("left-waiting", "/up/silent", house.secret)
    await told.leave("left-midway", "/up/stalls", house.secret)
    await told.ask("late", 504, "upstream_timeout", path="/up/silent", content=b"{}")
    await told.ask("hung-up", 502, "upstream_broke", path="/up/hangs-up", content=b"{}")
    await told.be_cut_off("broke", "upstream_broke", "/up/breaks")
    await told.be_cut_off("stalled", "upstream_timeout", "/up/stalls")
    await told.upstream.close()
    await told.ask("unreachable", 502, "upstream_unreachable", path="/up/path", content=b"{}")
    await told.redis.close()
    await told.ask("no-store", 503, "store_unavailable")
    await told.redis.open()


async def test_each_request_has_one_line_that_tells_all_and_betrays_nothing(told: Told) -> None:
    await ask_everything(told)
    await until(lambda: len(told.process.events("request")) >= len(told.expected))
    await told.house.settled()
    names = Counter(line["request_id"] for line in told.process.events("request"))
    assert names == dict.fromkeys(told.expected, 1)
    found = {name: (line["status"], line["decision"]) for name in told.expected for line in [told.line(name)]}
    assert found == told.expected
    check_what_is_told(told)
    check_that_nothing_is_betrayed(told)


def check_what_is_told(told: Told) -> None:
    plain = told.line("plain")
    said = {name: plain[name] for name in ("method", "path", "route", "outcome", "org", "user", "plan", "identity")}
    assert said == {
        "method": "POST",
        "path": CHAT,
        "route": f"POST {CHAT}",
        "outcome": "complete",
        "org": "acme",
        "user": "ann",
        "plan": "pro",
        "identity": "api_key",
    }
    assert plain["key"].startswith("key_")
    assert plain["client_ip"] == "127.0.0.1"
    assert (plain["model"], plain["input_tokens"], plain["output_tokens"]) == ("demo-small-2026", 7, 5)
    assert (plain["charged_ucredits"], plain["basis"], plain["available_ucredits"]) == (CREDIT, "exact", 99 * CREDIT)
    assert (plain["response_bytes"], plain["turn"]) == (len(COMPLETION), 1)
    phases = plain["ms"]
    assert 0 < phases["identify"] <= phases["admit"] <= phases["first_byte"] <= phases["total"]

    by_token = told.line("by-token")
    assert (by_token["identity"], by_token["user"]) == ("jwt", "ada@example.com")
    assert told.line("over-limit")["limit"] == "per-talk"
    assert told.line("never-fits")["limit"] == "tph"
    # A refusal charges nothing and says nothing of an upstream; who asked is told as far as it was known.
    for name in ("malformed", "no-key", "no-credits", "no-route", "too-large", "over-limit", "in-flight", "no-store"):
        line = told.line(name)
        assert not {"outcome", "charged_ucredits", "hold_id"} & line.keys(), name
        assert "first_byte" not in line["ms"]
    assert "org" not in told.line("no-key")
    assert told.line("no-credits")["org"] == "globex"
    assert "identify" in told.line("no-credits")["ms"] and "identify" not in told.line("no-route")["ms"]
    assert told.line("no-store")["error"] != told.line("unreachable")["error"]
    ends = {
        "refused-there": ("upstream_refused", 0),
        "unreachable": ("never_reached", 0),
        "late": ("upstream_refused", 0),
        "hung-up": ("upstream_refused", 0),
        "broke": ("upstream_broke", CREDIT),
        "stalled": ("upstream_broke", CREDIT),
        "left-waiting": ("client_left", CREDIT),
        "left-midway": ("client_left", CREDIT),
    }
    found = {name: (told.line(name)["outcome"], told.line(name)["charged_ucredits"]) for name in ends}
    assert found == ends


def check_that_nothing_is_betrayed(told: Told) -> None:
    """In nothing the process wrote, to standard output or error, at any time."""
    everything = json.dumps(told.process.output, ensure_ascii=False)
    for secret in (SESSION, QUESTION, ANSWER, QUERY, JWT_SECRET, SIGNING_KEY):
        assert secret not in everything
    for credential in told.credentials:
        for part in credential.split("."):
            assert part not in everything
    for url in (told.house.redis_url, told.house.database_url):
        password = url.partition("@")[0].rpartition(":")[2]
        assert len(password) > 8 and password not in everything


async def test_a_line_leads_to_its_conversation_and_its_ledger_entry(house: House) -> None:
    house.settings["trusted"] = "[127.0.0.0/8]"
    await house.credits(5)
    async with Process(house) as process, house.client(process.address) as client:
        for talk in ("talk-1", "talk-2", "talk-1"):
            answer = await client.get("/echo", headers={"x-session-id": talk, "x-request-id": "of-a-proxy"})
            assert answer.status_code == 200
            await house.settled()
        await until(lambda: len(process.events("request")) == 3)
    one, two, again = process.events("request")
    assert one["session"] == again["session"] != two["session"]
    assert [line["turn"] for line in (one, two, again)] == [1, 1, 2]
    # The proxy named all three alike; the ledger knows them by ids of their own.
    for line in (one, two, again):
        row = await house.postgres.row("SELECT amount FROM gateway.ledger WHERE request_id = $1", line["hold_id"])
        assert row is not None and row["amount"] == -line["charged_ucredits"] == -CREDIT
