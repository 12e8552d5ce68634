"""Limits used up without a gateway: what admission takes, as an org's requests take it."""

import asyncio
from contextlib import AsyncExitStack

from gateway import policy
from gateway.admission import Admission, Hold, Rules, Settling
from gateway.config import load
from gateway.policy import Asking, PolicySet
from gateway.stores import Redis
from gateway.types import Charge, Facts, Peek, Principal, Quote
from tests.cli.conftest import CommandLine
from tests.limits.rooms import ledgerless

KEPT = Charge(0, None, keep_requests=True, basis="exact")


def use(
    gateway: CommandLine,
    requests: int,
    *,
    org: str = "acme",
    plan: str = "trial",
    user: str | None = None,
    path: str = "/v1/chat/completions",
    peek: Peek | None = None,
    client_ip: str = "192.0.2.1",
) -> None:
    """So many requests of this kind have been admitted, and have ended."""
    settings = load(gateway.config, gateway.env)
    rules = PolicySet.compile(settings).plans[plan]
    (route,) = (route for route in settings.routes if route.path == path)
    facts = Facts("r", (route.method or ("GET",))[0], path, path.encode(), (), client_ip=client_ip, peer_ip=client_ip)
    principal = Principal(org, plan, user, None, "api_key")
    demands = policy.demands(rules, Asking(principal, facts, route, peek or Peek(40, max_output_tokens=90)))

    async def take() -> None:
        redis = Redis(gateway.env["REDIS_URL"], timeout_ms=5_000, connect_timeout_ms=5_000)
        redis.start()
        terms, powers = Rules(30_000, 10_000, 5_000, 1_000, 60), ledgerless(redis)
        desk = Admission(redis, terms, Settling(redis, terms, powers), powers)
        for number in range(requests):
            async with AsyncExitStack() as stack:
                holding = desk.hold(f"{org}-{user}-{number}", principal, demands, Quote.flat(0))
                hold = await stack.enter_async_context(holding)
                assert isinstance(hold, Hold), hold
                hold.charge = KEPT
        await redis.close()

    asyncio.run(take())
