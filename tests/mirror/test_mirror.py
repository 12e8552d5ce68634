"""`ai_credits:org_<id>` as an application in Node sees it, whatever the gateway does to the org's credits."""

import httpx

from tests import servers
from tests.mirror.conftest import Application
from tests.waiting import until
from tests.walk.house import House, chat_body, in_process

TTL_MS = 3_600_000


async def ask(client: httpx.AsyncClient, status: int = 200) -> None:
    """One request, which costs a credit when it is admitted."""
    answer = await client.post("/v1/chat/completions", json=chat_body())
    assert answer.status_code == status, answer.text


async def shows(application: Application, org_id: str, credits: int) -> None:
    """The application comes to read `credits`, as a plain decimal number that lives for about an hour."""

    async def read() -> bool:
        found = await application.read(org_id)
        if found["miss"]:
            return False
        assert found["text"] == str(found["credits"]), found
        assert found["type"] == "string"
        # 5 % around the hour, and half of that may have passed since it was written.
        assert TTL_MS * 0.95 / 2 - 1_000 < found["ttlMs"] <= TTL_MS * 1.05, found
        return bool(found["credits"] == credits)

    await until(read)


async def test_the_application_reads_what_a_grant_a_charge_and_a_top_up_by_sql_leave(
    house: House, application: Application
) -> None:
    await house.credits(5)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        assert await application.read(house.org_id) == {"miss": True}  # nobody has asked the gateway yet
        await ask(client)
        await shows(application, house.org_id, 4)
        await house.credits(10, "grant:more")
        await shows(application, house.org_id, 14)
        await servers.execute(
            house.database_url,
            f"UPDATE ai_credits SET credits = credits + 500 WHERE organization_id = '{house.org_id}'",
        )
        await shows(application, house.org_id, 514)
        await ask(client)
        await shows(application, house.org_id, 513)


async def test_an_org_that_has_spent_everything_reads_zero_and_is_no_miss(
    house: House, application: Application
) -> None:
    await house.credits(2)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        await ask(client)
        await ask(client)
        await shows(application, house.org_id, 0)
        await ask(client, status=402)
        await shows(application, house.org_id, 0)
        assert (await application.read(house.org_id))["text"] == "0"


async def test_a_debt_reads_zero(house: House, application: Application) -> None:
    await house.credits(2)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        await ask(client)
        await house.settled()  # else it is posted after one of these, and takes a credit more
        await servers.execute(house.database_url, "UPDATE ai_credits SET credits = -3")
        await shows(application, house.org_id, 0)
        await servers.execute(house.database_url, "UPDATE ai_credits SET credits = 7")
        await shows(application, house.org_id, 7)


async def test_a_part_of_a_credit_is_not_shown(house: House, application: Application) -> None:
    await house.credits(5)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        await ask(client)
        await house.postgres.row(
            "SELECT 1 FROM gateway.post(ARRAY[$1], ARRAY['r1'], ARRAY['correction'], ARRAY[-1::bigint], ARRAY['{}'])",
            house.org_id,
        )
        await house.credits(1, "grant:more")  # which is announced, and brings the correction along
        await shows(application, house.org_id, 4)


async def test_the_time_to_live_differs_from_org_to_org(house: House, application: Application) -> None:
    """Otherwise all that were written in one moment would be missing in one moment."""
    orgs = [f"org_{number}" for number in range(12)]
    secrets = {org: await house.add_key(org) for org in orgs}
    for org in orgs:
        await house.postgres.row("SELECT 1 FROM gateway.grant_credits($1, 'grant:test', 5000000, '{}')", org)
    async with in_process(house) as gateway:
        for org in orgs:
            async with house.client(gateway.address, secrets[org]) as client:
                await ask(client)
    ttls_ms = [(await application.read(org))["ttlMs"] for org in orgs]
    assert all(TTL_MS * 0.95 - 60_000 < ttl_ms <= TTL_MS * 1.05 for ttl_ms in ttls_ms)
    assert max(ttls_ms) - min(ttls_ms) > 60_000, ttls_ms
