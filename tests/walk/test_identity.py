"""Who asks, proved over a real socket: tokens, headers of a trusted proxy, keys, and everything that only looks so."""

import base64
import json
import time
from typing import Any

import httpx
import jwt
import pytest

from tests.walk.house import CREDIT, House, in_process

SECRET = "an-hmac-secret-of-at-least-32-bytes!"
ISSUER, AUDIENCE = "https://login.example", "gateway"
API_KEY = "api_key: {}"
JWT = (
    f'jwt: {{ keys: [ {{ secret: "{SECRET}" }} ], issuer: "{ISSUER}", audience: {AUDIENCE}, '
    "org: org_id, user: sub, plan: plan }"
)
ECHO_ROUTES = """
  - {{ path: /echo, upstream: ai_router, forward_credential: {forwarded} }}
"""


def trusted_header(network: str) -> str:
    return f"trusted_header: {{ org: x-tenant, user: x-person, plan: x-tier, from: [{network}] }}"


def token(secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    every = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "exp": int(time.time()) + 60,
        "org_id": "acme",
        "sub": "auth0|ada",
        "plan": "pro",
        **claims,
    }
    return jwt.encode({name: claim for name, claim in every.items() if claim is not None}, secret, algorithm=algorithm)


def unsigned(algorithm: str) -> str:
    def segment(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    claims = jwt.decode(token(), options={"verify_signature": False})
    return f"{segment({'alg': algorithm, 'typ': 'JWT'})}.{segment(claims)}."


def use(house: House, *sources: str, forward_credential: bool = False) -> None:
    house.settings["identity"] = f"[ {', '.join(sources)} ]"
    house.settings["routes"] = ECHO_ROUTES.format(forwarded=str(forward_credential).lower())


def bearer(credential: str) -> dict[str, str]:
    return {"authorization": f"Bearer {credential}"}


async def echo(client: httpx.AsyncClient, fields: dict[str, str]) -> dict[str, str]:
    """The header fields the upstream got."""
    answer = await client.get("/echo", headers=fields)
    assert answer.status_code == 200, answer.text
    seen: list[list[str]] = answer.json()["headers"]
    names = [name for name, _ in seen]
    assert len(names) == len(set(names))
    return dict((name, value) for name, value in seen)


def who(seen: dict[str, str]) -> tuple[str | None, str | None, str | None]:
    return seen.get("x-org-id"), seen.get("x-user-id"), seen.get("x-plan")


async def test_a_token_says_who_asks_and_pays(house: House) -> None:
    use(house, JWT)
    await house.credits(5)
    async with in_process(house) as gateway, httpx.AsyncClient(base_url=gateway.address) as client:
        seen = await echo(client, bearer(token()))
        assert who(seen) == ("acme", "auth0|ada", "pro")
        assert "authorization" not in seen
        await house.settled()
    assert await house.charges() == [("settle", CREDIT)]


async def test_a_token_that_proves_nothing_is_401(house: House) -> None:
    use(house, JWT)
    house.price = 0
    good = token()
    head, payload, signature = good.split(".")
    other_payload = token(org_id="globex").split(".")[1]
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        too_strong = token(algorithm="HS512")
    bad = {
        "another secret": token("another-secret-of-at-least-32-bytes!!"),
        "another algorithm": too_strong,
        "none": unsigned("none"),
        "None": unsigned("None"),
        "no algorithm": unsigned(""),
        "none with a signature": unsigned("none") + signature,
        "another payload": f"{head}.{other_payload}.{signature}",
        "no signature": f"{head}.{payload}.",
        "expired": token(exp=int(time.time()) - 120),
        "not yet": token(nbf=int(time.time()) + 120),
        "never ends": token(exp=None),
        "another issuer": token(iss="https://evil.example"),
        "another audience": token(aud="something-else"),
        "no org": token(org_id=None),
        "no plan": token(plan=None),
        "an org that is no name": token(org_id="acme}\r\nx-plan: pro"),
        "not a token": "a.b.c",
    }
    async with in_process(house) as gateway, httpx.AsyncClient(base_url=gateway.address) as client:
        for why, credential in bad.items():
            answer = await client.get("/echo", headers=bearer(credential))
            assert (answer.status_code, answer.json()["code"]) == (401, "invalid_api_key"), why
            assert answer.headers["www-authenticate"] == "Bearer"
            assert credential not in answer.text
        assert who(await echo(client, bearer(good))) == ("acme", "auth0|ada", "pro")
        # Only as a Bearer token: the same text elsewhere is not a credential.
        for fields in ({"authorization": good}, {"x-api-key": good}, {"cookie": f"authorization=Bearer {good}"}):
            assert (await client.get("/echo", headers=fields)).status_code == 401


async def test_a_plan_that_nobody_configured_is_403(house: House) -> None:
    use(house, JWT)
    async with in_process(house) as gateway, httpx.AsyncClient(base_url=gateway.address) as client:
        answer = await client.get("/echo", headers=bearer(token(plan="platinum")))
        assert (answer.status_code, answer.json()["code"]) == (403, "unknown_plan")


PROXY_SAYS = {"x-tenant": "acme", "x-person": "ada", "x-tier": "pro"}


async def test_a_trusted_proxys_headers_say_who_asks(house: House) -> None:
    use(house, trusted_header("127.0.0.0/8"))
    house.price = 0
    async with in_process(house) as gateway, httpx.AsyncClient(base_url=gateway.address) as client:
        seen = await echo(client, {**PROXY_SAYS, "x-org-id": "globex", "x-plan": "enterprise"})
        assert who(seen) == ("acme", "ada", "pro")
        assert not PROXY_SAYS.keys() & seen.keys()
        # Said twice, it cannot be told which of them the proxy said.
        twice = [*PROXY_SAYS.items(), ("x-tenant", "globex")]
        assert (await client.get("/echo", headers=twice)).status_code == 401
        assert (await client.get("/echo")).status_code == 401


@pytest.mark.parametrize("trusted_proxies", ["[]", "[127.0.0.0/8]"], ids=["at the edge", "behind a proxy"])
async def test_a_forwarded_address_makes_nobody_trusted(
    house: House, monkeypatch: pytest.MonkeyPatch, trusted_proxies: str
) -> None:
    """The peer is the socket's, whatever a header says: not even where addresses of clients are read from headers,
    and not where the environment would have uvicorn rewrite the peer."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    use(house, trusted_header("10.0.0.0/8"))
    house.price, house.settings["trusted"] = 0, trusted_proxies
    async with in_process(house) as gateway, httpx.AsyncClient(base_url=gateway.address) as client:
        for forged in (
            {"x-forwarded-for": "10.1.2.3"},
            {"x-forwarded-for": "10.1.2.3, 127.0.0.1"},
            {"forwarded": "for=10.1.2.3"},
            {"x-real-ip": "10.1.2.3"},
            {"true-client-ip": "10.1.2.3", "cf-connecting-ip": "10.1.2.3"},
        ):
            answer = await client.get("/echo", headers={**PROXY_SAYS, **forged})
            assert answer.status_code == 401, forged


async def test_the_first_source_that_recognises_a_credential_decides(house: House) -> None:
    house.price = 0
    both = {"x-api-key": house.secret, **bearer(token(org_id="globex")), **PROXY_SAYS, "x-tenant": "initech"}
    key, jot, header = API_KEY, JWT, trusted_header("127.0.0.0/8")
    for order, expected in (
        ((key, jot, header), ("acme", "ann", "pro")),
        ((jot, key, header), ("globex", "auth0|ada", "pro")),
        ((header, jot, key), ("initech", "ada", "pro")),
    ):
        use(house, *order)
        async with in_process(house) as gateway, httpx.AsyncClient(base_url=gateway.address) as client:
            seen = await echo(client, both)
            assert who(seen) == expected
            # Whichever decided, none of the others' credentials goes further.
            assert not {"authorization", "x-api-key", *PROXY_SAYS} & seen.keys()


async def test_a_bad_credential_is_not_made_good_by_another(house: House) -> None:
    house.price = 0
    use(house, API_KEY, JWT)
    async with in_process(house) as gateway, httpx.AsyncClient(base_url=gateway.address) as client:
        bad_key = {"x-api-key": "gw_" + "x" * 43, **bearer(token())}
        assert (await client.get("/echo", headers=bad_key)).status_code == 401
        # What is no credential of ours is the upstream's, and stays.
        seen = await echo(client, {"x-api-key": house.secret, "authorization": "Basic dXBzdHJlYW0="})
        assert seen["authorization"] == "Basic dXBzdHJlYW0="
        assert "x-api-key" not in seen
        seen = await echo(client, {"x-api-key": "sk-of-the-upstream", **bearer(token())})
        assert seen["x-api-key"] == "sk-of-the-upstream"
        assert "authorization" not in seen


@pytest.mark.parametrize("source", [API_KEY, JWT], ids=["api key", "jwt"])
async def test_a_route_may_forward_the_credential(house: House, source: str) -> None:
    house.price = 0
    use(house, source, forward_credential=True)
    credential = house.secret if source == API_KEY else token()
    async with in_process(house) as gateway, httpx.AsyncClient(base_url=gateway.address) as client:
        seen = await echo(client, {**bearer(credential), "x-org-id": "globex"})
    assert seen["authorization"] == f"Bearer {credential}"
    assert seen["x-org-id"] == "acme"


async def test_what_a_trusted_proxy_asserts_is_never_forwarded_as_sent(house: House) -> None:
    """From a peer that is not trusted the headers prove nothing here, and must not prove anything behind us."""
    house.price = 0
    use(house, API_KEY, trusted_header("10.0.0.0/8"), forward_credential=True)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        seen = await echo(client, {**PROXY_SAYS, "x_tenant": "disguised"})
    assert who(seen) == ("acme", "ann", "pro")
    assert not {*PROXY_SAYS, "x_tenant"} & seen.keys()
