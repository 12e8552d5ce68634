"""What reaches the upstream, and what comes back."""

import base64
import hashlib
import hmac
import json

import pytest

from tests.walk.house import CREDIT, House, chat_body, in_process


async def test_a_chat_call_is_answered_charged_and_given_a_session(house: House) -> None:
    await house.credits(5)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answer = await client.post("/v1/chat/completions", json=chat_body("one two three"))
        assert answer.status_code == 200
        assert answer.json()["usage"]["total_tokens"] > 0
        assert answer.headers["x-session-id"].startswith("ses_")
        assert answer.headers["x-request-id"]
        await house.settled()
    assert await house.charges() == [("settle", CREDIT)]
    assert await house.balance() == 4 * CREDIT


async def test_the_turn_grows_and_the_context_says_who_asks(house: House) -> None:
    await house.credits(5)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        for turn in (1, 2, 3):
            answer = await client.get("/echo", headers={"x-session-id": "talk-1"})
            seen = dict(answer.json()["headers"])
            assert (seen["x-session-id"], seen["x-session-turn"]) == ("talk-1", str(turn))
            assert (seen["x-org-id"], seen["x-user-id"], seen["x-plan"]) == ("acme", "ann", "pro")
            context = json.loads(base64.urlsafe_b64decode(seen["x-session-context"] + "=="))
            assert (context["org_id"], context["turn"], context["new"]) == ("acme", turn, turn == 1)
            await house.settled()


async def test_another_orgs_session_is_simply_a_new_one(house: House) -> None:
    house.price = 0
    other = await house.add_key("globex")
    async with in_process(house) as gateway:
        async with house.client(gateway.address) as client:
            for _ in range(2):
                await client.get("/echo", headers={"x-session-id": "shared"})
        async with house.client(gateway.address, other) as client:
            answer = await client.get("/echo", headers={"x-session-id": "shared"})
    assert dict(answer.json()["headers"])["x-session-turn"] == "1"


async def test_what_the_gateway_attaches_cannot_be_forged(house: House) -> None:
    house.price = 0
    forged = {
        name: "forged"
        for name in (
            "x-org-id",
            "x-user-id",
            "x-plan",
            "x-session-turn",
            "x-session-context",
            "x-session-signature",
            "x-session-new",
            "x-session-status",
            "x-request-id",
        )
    }
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answer = await client.get("/echo", headers={**forged, "x-forwarded-for": "1.2.3.4"})
    seen = answer.json()["headers"]
    assert "forged" not in [value for _, value in seen]
    assert dict(seen)["x-forwarded-for"] == "127.0.0.1"


async def test_the_upstream_never_sees_the_key_unless_the_route_says_so(house: House) -> None:
    house.price = 0
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        seen = dict((await client.get("/echo")).json()["headers"])
        assert "authorization" not in seen
        assert house.secret not in json.dumps(seen)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_method_target_and_body_arrive_as_sent(house: House, method: str) -> None:
    house.price = 0
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answer = await client.request(method, "/echo?a=%2F&b=&c=%C3%BC", content=b"\x00\xffbody")
    seen = answer.json()
    assert (seen["method"], seen["query"], seen["body_bytes"]) == (method, "a=%2F&b=&c=%C3%BC", 6)


async def test_a_signed_context_can_be_verified_by_the_upstream(house: House) -> None:

    key = "k" * 32
    house.price, house.settings["signing_key"] = 0, key
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answer = await client.get("/echo?x=1", headers={"x-session-id": "talk"})
    seen = dict(answer.json()["headers"])
    version, seconds, signature = seen["x-session-signature"].split(";")
    said = [seconds[2:], "GET", "/echo?x=1", seen["x-request-id"], "acme", "talk", seen["x-session-context"]]
    expected = hmac.new(key.encode(), "|".join(said).encode(), hashlib.sha256).hexdigest()
    assert (version, signature) == ("v1", f"sig={expected}")


async def test_a_bad_session_id_is_refused_not_replaced(house: House) -> None:
    house.price = 0
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answer = await client.get("/echo", headers={"x-session-id": "no spaces please"})
    assert answer.status_code == 400
    assert "x-session-id" in answer.json()["detail"]


async def test_upstream_errors_pass_untouched_and_cost_nothing(house: House) -> None:
    await house.credits(5)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answer = await client.post("/v1/chat/completions", json=chat_body(), headers={"x-demo-status": "529"})
        assert answer.status_code == 529
        assert "x-gateway" not in answer.text
        await house.settled()
    assert await house.charges() == []


async def test_the_upstream_is_addressed_by_its_own_name(house: House) -> None:
    house.price = 0
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        seen = dict((await client.get("/echo", headers={"host": "ai.example"})).json()["headers"])
    assert seen["host"] == house.upstream_url.removeprefix("http://")
    assert seen["x-forwarded-host"] == "ai.example"
