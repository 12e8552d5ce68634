"""The composition root: opens the stores, wires the rooms, runs the background work, closes it all in order.

Nothing is decided here once and for all: the stores may be away at the start and come and go later, and the schema
is migrated as soon as PostgreSQL lets us.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import structlog
from prometheus_client import generate_latest
from starlette.applications import Starlette

from gateway import __version__, floodgate, limits, session
from gateway.config import RouteTable, Settings
from gateway.downstream import Receive, Send
from gateway.errors import ConfigError, StoreUnavailable
from gateway.identity import Identity, Powers, open_identity
from gateway.identity.api_key import CHANNEL as KEYS_CHANNEL
from gateway.identity.api_key import key_loader
from gateway.ledger import Binding, migrate, pending
from gateway.money import Money
from gateway.ops import Health, Probe, ops_app, watch_gauges
from gateway.overrides import CHANNEL as LIMITS_CHANNEL
from gateway.overrides import Overrides
from gateway.policy import PolicySet, claims_needed, headers_needed
from gateway.proxy import Proxy, Steps
from gateway.session import Sessions
from gateway.stores import Postgres, Redis, Script
from gateway.telemetry import AccessLog, Metrics, access_stream, configure_logging, wants_pretty
from gateway.upstream import Upstreams

#: Flushing, sweeping and installing balances may take longer than a request may wait.
BACKGROUND_TIMEOUT_MS = 5_000
RESTART_PAUSE_S = 1.0
CLOSE_TIMEOUT_S = 5.0
JWKS_BYTES_MAX = 1024 * 1024

log = structlog.get_logger("gateway.app")


class Gateway:
    """Everything one worker process runs. `open()` in the event loop, then `proxy` may be called; `close()` last."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        stores = settings.stores
        every = [Script(name, limits.script_text(name)) for name in (*limits.LOOPS, *limits.PLAIN)]
        connect_ms = stores.redis_connect_timeout_ms
        self.redis = Redis(
            stores.redis, timeout_ms=stores.redis_timeout_ms, connect_timeout_ms=connect_ms, scripts=every
        )
        # A second connection, so that a large batch never stands in front of an admission.
        self._background_redis = Redis(
            stores.redis, timeout_ms=BACKGROUND_TIMEOUT_MS, connect_timeout_ms=connect_ms, scripts=every
        )
        self.postgres = Postgres(
            stores.postgres, timeout_ms=stores.postgres_timeout_ms, pool_max=stores.postgres_pool_max
        )
        self.money = Money(settings, self.redis, self._background_redis, self.postgres)
        self.admission, self.settling = self.money.admission, self.money.settling
        self.overrides = Overrides(self.postgres, entries_max=settings.limits.overrides_max)
        self.upstreams = Upstreams(settings.upstreams)
        self.floodgate = floodgate.Floodgate(_floodgate_rules(settings), _monotonic_ms)
        self.metrics = Metrics()
        self.health = Health(self._probes())
        self._tasks: list[asyncio.Task[None]] = []
        self._pretty = wants_pretty(settings.log.format, access_stream())
        self._access_log = AccessLog(access_stream(), pretty=self._pretty)
        self._identity: Identity | None = None
        self._migrated = False
        #: PostgreSQL has answered about the schema, which is current or cannot be made so by us.
        self._schema_judged = asyncio.Event()

    async def open(self) -> Proxy:
        """Background work runs and requests may come. Needs no store to be there yet."""
        settings = self._settings
        self.redis.start()
        self._background_redis.start()
        await self.postgres.open()
        await self.money.open()
        self._identity = open_identity(
            settings.identity,
            Powers(
                load_key=key_loader(self.postgres),
                fetch=self._fetch,
                monotonic_ms=_monotonic_ms,
                wall_ms=_wall_ms,
                claims=claims_needed(settings),
            ),
        )
        self.postgres.listen(
            {
                KEYS_CHANNEL: self._identity.on_notification,
                LIMITS_CHANNEL: self.overrides.on_notification,
                **self.money.channels,
            },
            on_connect=self._announcements_may_be_missed,
        )
        for name, work in (
            ("migrate", self._migrate),
            *self.money.work,
            ("health checks", self.upstreams.run),
            ("overrides", self._follow_overrides),
        ):
            self._tasks.append(asyncio.create_task(_forever(name, work), name=name))
        watch_gauges(
            self.metrics,
            rooms=self.money,
            upstreams=self.upstreams,
            floodgate=self.floodgate,
            overrides=self.overrides,
        )
        return Proxy(
            Steps(
                routes=RouteTable.compile(settings.routes),
                floodgate=self.floodgate,
                identity=self._identity,
                policies=PolicySet.compile(settings),
                credits=settings.credits,
                overrides=self.overrides,
                admission=self.admission,
                sessions=Sessions(self.redis, _session_rules(settings)),
                upstreams=self.upstreams,
                metrics=self.metrics,
                access_log=self._access_log,
                trusted_proxies=settings.listen.trusted_proxies,
                noted_headers=frozenset(name.encode() for name in headers_needed(settings)),
                client_idle_ms=settings.listen.client_idle_ms,
                via=settings.listen.via,
                limit_headers=settings.limits.headers,
                idempotency=self.money.idempotency,
            )
        )

    async def close(self) -> None:
        """Requests have ended and are settled, the outbox is posted as far as the stores allow, nothing runs."""
        await self.money.drain(CLOSE_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.money.close()
        if self._identity is not None:
            await self._identity.close()
        await self.upstreams.aclose()
        await self.postgres.close()
        await self.redis.close()
        await self._background_redis.close()
        self._access_log.flush()

    def metrics_text(self) -> bytes:
        return generate_latest(self.metrics.registry)

    async def _migrate(self) -> None:
        """The schema is at this release's version, however long PostgreSQL makes us wait."""
        while not self._migrated:
            try:
                await migrate(self.postgres, Binding.of(self._settings.credits))
                self._migrated = True
            except StoreUnavailable as exc:
                log.warning("schema not migrated yet", error=str(exc))
                await asyncio.sleep(RESTART_PAUSE_S)
            except ConfigError:
                self._schema_judged.set()
                raise
        self._schema_judged.set()
        await asyncio.Event().wait()

    async def _follow_overrides(self) -> None:
        # Before the first migration there is nothing to read them from.
        await self._schema_judged.wait()
        await self.overrides.run()

    def _announcements_may_be_missed(self) -> None:
        if self._identity is not None:
            self._identity.drop_all()
        self.money.freshness.refresh_all()
        self.overrides.refresh_all()

    async def _fetch(self, url: str) -> bytes:
        return await self.upstreams.fetch(url, timeout_ms=BACKGROUND_TIMEOUT_MS, bytes_max=JWKS_BYTES_MAX)

    def _probes(self) -> tuple[Probe, ...]:
        async def ask_redis() -> str:
            await self.redis.call("PING")
            part = f", but {self.redis.trouble}" if self.redis.trouble else ""
            return f"answers at {self.redis.address}{part}"

        async def ask_postgres() -> str:
            try:
                todo = await pending(self.postgres)
            except ConfigError as exc:
                raise StoreUnavailable(str(exc)) from exc
            if todo:
                raise StoreUnavailable(f"{len(todo)} migrations are pending")
            if self.overrides.trouble is not None:
                raise StoreUnavailable(self.overrides.trouble)
            return "answers, schema is current"

        def ask_upstream(name: str) -> Callable[[], Awaitable[str]]:
            async def ask() -> str:
                await self.upstreams.probe(name)
                return "accepts connections"

            return ask

        return (
            Probe("redis", ask_redis, without=_without_redis(self._settings), or_else="postgres"),
            Probe("postgres", ask_postgres, without="degraded"),
            *(Probe(f"upstream:{name}", ask_upstream(name), without="degraded") for name in self._settings.upstreams),
        )


class App:
    """The ASGI application: the gateway's own pages below `/-/`, the walk for everything else."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.log.format, settings.log.level)
        self._settings = settings
        self._gateway: Gateway | None = None
        self._proxy: Proxy | None = None
        self._ops: Starlette | None = None
        self._lifespan = Starlette(lifespan=self._run)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["raw_path"].startswith(b"/-/"):
            assert self._proxy is not None  # servers send no request before the lifespan has started
            await self._proxy(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(dict(scope), receive, send)
        else:
            assert self._ops is not None
            await self._ops(dict(scope), receive, send)

    def begin_drain(self) -> None:
        """From now on `/-/ready` says no."""
        if self._gateway is not None:
            self._gateway.health.draining = True

    def note_refusal(self, status: int) -> None:
        """A connection has refused a request before there was one."""
        if self._gateway is not None:
            self._gateway.metrics.refused(status)

    def end_open(self) -> None:
        """Every open request ends now, is told so where it still can be, and is settled."""
        if self._proxy is not None:
            self._proxy.end_all()

    @asynccontextmanager
    async def _run(self, _: Starlette) -> AsyncIterator[None]:
        gateway = self._gateway = Gateway(self._settings)
        self._proxy = await gateway.open()
        self._ops = ops_app(gateway.health, gateway.metrics_text)
        log.info("gateway open", version=__version__)
        try:
            yield
        finally:
            await gateway.close()
            log.info("gateway closed")


def create_app(settings: Settings) -> App:
    return App(settings)


def _without_redis(settings: Settings) -> str:
    """What Redis's absence makes of the whole."""
    refused = "refuse" in (settings.credits.without_redis, settings.limits.without_redis)
    return "down" if refused else "degraded"


def _session_rules(settings: Settings) -> session.Rules:
    rules = settings.sessions
    return session.Rules(
        header=rules.header.encode(),
        mint=rules.mint,
        ttl_ms=rules.ttl_ms,
        absolute_ttl_ms=rules.absolute_ttl_ms,
        per_org_max=rules.per_org_max,
        signing_key=rules.signing_key,
    )


def _floodgate_rules(settings: Settings) -> floodgate.Rules:
    rules = settings.unauthenticated
    return floodgate.Rules(
        failures=rules.failures, window_ms=rules.window_ms, burst=rules.burst, networks_max=rules.networks_max
    )


async def _forever(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Background work outlives its own bugs: they are logged and it starts again."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("background work failed", work=name)
        await asyncio.sleep(RESTART_PAUSE_S)


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
