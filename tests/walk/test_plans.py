"""Plans over a whole gateway: an org runs dry, its period ends, and its next request finds new credits."""

import asyncio

import httpx

from gateway.ledger import grants
from tests.ledger.planned import begin_the_hour_before, end_the_hour_before, pockets
from tests.ledger.planned import plan as planned
from tests.waiting import until
from tests.walk.house import CREDIT, House, Process, in_process

PLAN = "{ credits: 5, policy: pro, grant: reset, period: hour }"


async def entries(house: House, org_id: str | None = None) -> list[tuple[str, int]]:
    rows = await house.postgres.rows(
        "SELECT kind, amount FROM gateway.ledger WHERE org_id = $1 ORDER BY seq", org_id or house.org_id
    )
    return [(row["kind"], row["amount"]) for row in rows]


async def test_an_org_that_ran_dry_is_admitted_again_when_its_period_is_over(house: House) -> None:
    house.settings["plan"] = PLAN
    house.price = 2
    await house.postgres.rows("INSERT INTO ai_credits (organization_id, credits) VALUES ('acme', 0)")
    await begin_the_hour_before(house.postgres, "pro", planned(credits=5))
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        assert [(await client.get("/echo")).status_code for _ in range(3)] == [200, 200, 402]
        await house.settled()
        assert await pockets(house.postgres) == (CREDIT, 0)
        await end_the_hour_before(house.postgres)

        async def redis_knows() -> bool:
            noted = (await grants.look(house.postgres, house.org_id)).period
            return noted is not None and (await house.account())["pe"] == noted.ends_ms

        await until(redis_knows)
        assert (await client.get("/echo")).status_code == 200
        await house.settled()
    assert (await entries(house))[1:] == [
        ("grant", 5 * CREDIT),
        ("settle", -2 * CREDIT),
        ("settle", -2 * CREDIT),
        ("expire", -CREDIT),
        ("grant", 5 * CREDIT),
        ("settle", -2 * CREDIT),
    ]
    assert await pockets(house.postgres) == (3 * CREDIT, 0)


async def test_an_unknown_org_is_given_its_plans_credits_over_two_gateways(house: House) -> None:
    """Its users come with tokens of the application's; here, with the word of a proxy."""
    house.settings |= {
        "plan": PLAN,
        "credits": ", provision: true",
        "identity": "[ trusted_header: { org: x-org-id, plan: x-plan, from: [127.0.0.0/8] } ]",
    }
    fresh = {"x-org-id": "fresh", "x-plan": "pro"}

    async def ask(client: httpx.AsyncClient) -> int:
        return (await client.get("/echo", headers=fresh)).status_code

    async with Process(house) as one, Process(house) as two:
        async with house.client(one.address) as first, house.client(two.address) as second:
            statuses = await asyncio.gather(*(ask((first, second)[number % 2]) for number in range(30)))
        assert statuses.count(200) == 5
        assert set(statuses) <= {200, 402, 429}

        async def all_charged() -> bool:
            return len([kind for kind, _ in await entries(house, "fresh") if kind == "settle"]) == 5

        await until(all_charged)
    assert [amount for kind, amount in await entries(house, "fresh") if kind == "grant"] == [5 * CREDIT]
    assert await pockets(house.postgres, "fresh") == (0, 0)
