"""The sections that tell the machine how to run: connections, stores, upstreams, sessions, credits, log.

Who may ask for what (identity, plans, routes) is in models.py. A YAML key is the field's alias; the attribute adds the
unit. Every default stands here and, with a comment, in the shipped gateway.yaml.
"""

from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from gateway.config import rules
from gateway.config.addresses import NetworkText, PostgresUrl, RedisUrl, Target
from gateway.config.problems import cross_field
from gateway.config.values import Flag, HeaderName, Name, Text, duration, empty_is_none, matching, whole


class Section(BaseModel):
    """A mapping of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def mistakes(self) -> list[rules.Mistake]:
        """Rules over several keys of this section that it breaks."""
        return []

    @model_validator(mode="after")
    def _whole_section(self) -> Self:
        for mistake in self.mistakes():
            raise cross_field(mistake.text, mistake.field)
        return self


def _beside_the_config(value: object, info: ValidationInfo) -> object:
    """A relative file name is relative to gateway.yaml, whose directory is the validation context."""
    if isinstance(value, str) and value and isinstance(info.context, Path):
        file = info.context / value
        if not file.is_file():
            raise ValueError(f"no such file: {file}")
        return str(file.absolute())
    return empty_is_none(value)


OptionalText: TypeAlias = Annotated[Text | None, BeforeValidator(empty_is_none)]
OptionalName: TypeAlias = Annotated[Name | None, BeforeValidator(empty_is_none)]


def _directory_beside_the_config(value: object, info: ValidationInfo) -> object:
    """The same for a directory, which need not be there yet."""
    if isinstance(value, str) and value and isinstance(info.context, Path):
        return str((info.context / value).absolute())
    return empty_is_none(value)


OptionalFile: TypeAlias = Annotated[Text | None, BeforeValidator(_beside_the_config, json_schema_input_type=str | None)]


class Listen(Section):
    """Where and how the gateway accepts connections."""

    host: Text = "127.0.0.1"
    port: Annotated[int, whole(0, 65_535)] = 8080
    workers: Annotated[int, whole(1, 256)] = 1
    #: After SIGTERM: readiness is off but connections are still accepted, until balancers have noticed.
    grace_ms: Annotated[int, duration("0s", "10m")] = Field(default=0, alias="grace")
    #: Then: requests in flight may finish.
    drain_timeout_ms: Annotated[int, duration("0s", "1h")] = Field(default=30_000, alias="drain_timeout")
    #: How long a client may neither send nor take a byte that the gateway waits for.
    client_idle_ms: Annotated[int, duration("100ms", "24h")] = Field(default=60_000, alias="client_idle")
    #: From a request's head to the last byte of its body, however steadily it drips.
    body_timeout_ms: Annotated[int, duration("100ms", "24h")] = Field(default=300_000, alias="body_timeout")
    #: Clients connected at once, per process; more are answered 503.
    connections_max: Annotated[int, whole(1, 1_000_000)] = 10_000
    #: The name in `Via` (RFC 9110 §7.6.3) both ways; None adds no such field.
    via: Annotated[
        Annotated[str, matching(r"[A-Za-z0-9._-]{1,64}", "a name for Via: letters, digits, '.', '_' and '-'")] | None,
        BeforeValidator(empty_is_none),
    ] = None
    #: Peers whose X-Forwarded-For and X-Request-Id are believed.
    trusted_proxies: tuple[NetworkText, ...] = ()


class Stores(Section):
    """Redis and PostgreSQL: a URL each, or `embedded` for the servers that `gateway run` starts itself."""

    redis: RedisUrl = Field(default="embedded", repr=False)
    postgres: PostgresUrl = Field(default="embedded", repr=False)
    redis_timeout_ms: Annotated[int, duration("1ms", "10s")] = Field(default=100, alias="redis_timeout")
    redis_connect_timeout_ms: Annotated[int, duration("1ms", "30s")] = Field(default=200, alias="redis_connect_timeout")
    postgres_timeout_ms: Annotated[int, duration("1ms", "1m")] = Field(default=200, alias="postgres_timeout")
    postgres_pool_max: Annotated[int, whole(1, 1_000)] = 8


class Timeouts(Section):
    """How long the upstream may take for each step."""

    connect_ms: Annotated[int, duration("1ms", "5m")] = Field(default=2_000, alias="connect")
    #: From the request's last byte to the answer's first.
    first_byte_ms: Annotated[int, duration("1ms", "24h")] = Field(default=120_000, alias="first_byte")
    #: Silence inside an answer.
    idle_ms: Annotated[int, duration("1ms", "24h")] = Field(default=60_000, alias="idle")
    #: Silence while the upstream takes the request's body.
    write_ms: Annotated[int, duration("1ms", "24h")] = Field(default=60_000, alias="write")


class Ejection(Section):
    """When a target that cannot be connected to is left alone, and for how long."""

    #: Connections that failed in a row.
    failures: Annotated[int, whole(1, 1_000)] = 3
    #: The first pause; each further failure doubles it, up to backoff_max.
    backoff_ms: Annotated[int, duration("10ms", "1h")] = Field(default=1_000, alias="backoff")
    backoff_max_ms: Annotated[int, duration("10ms", "1h")] = Field(default=30_000, alias="backoff_max")

    def mistakes(self) -> list[rules.Mistake]:
        return rules.ejection(self.backoff_ms, self.backoff_max_ms)


class HealthCheck(Section):
    """A request that each target must answer with 2xx to be given others."""

    path: Annotated[str, matching(rules.CHECK_PATH, rules.CHECK_PATH_FORM)]
    interval_ms: Annotated[int, duration("100ms", "1h")] = Field(default=5_000, alias="interval")
    timeout_ms: Annotated[int, duration("10ms", "1m")] = Field(default=1_000, alias="timeout")
    #: Checks that failed in a row before a target is left alone; one that succeeds brings it back.
    failures: Annotated[int, whole(1, 1_000)] = 2

    def mistakes(self) -> list[rules.Mistake]:
        return rules.health_check(self.timeout_ms, self.interval_ms)


class Upstream(Section):
    """A service requests are forwarded to."""

    targets: tuple[Target, ...] = Field(min_length=1, max_length=64)
    timeouts: Timeouts = Field(default_factory=Timeouts)
    #: What the upstream sees as Host: its own name from the target's URL, or the one that the client used.
    host: Literal["target", "client"] = "target"
    #: To each target, per process.
    connections_max: Annotated[int, whole(1, 65_535)] = 256
    #: In flight to all targets, per process; None: as many as there may be connections.
    requests_max: Annotated[int, whole(1, 1_000_000)] | None = None
    #: Waiting beyond requests_max; more are answered 503.
    queue_max: Annotated[int, whole(0, 1_000_000)] = 1_024
    queue_timeout_ms: Annotated[int, duration("0s", "10m")] = Field(default=2_000, alias="queue_timeout")
    ejection: Ejection = Field(default_factory=Ejection)
    health_check: HealthCheck | None = None
    #: Idle connections are closed after this; shorter than the upstream's own limit (Node closes after 5 s).
    keepalive_ms: Annotated[int, duration("0s", "1h")] = Field(default=4_000, alias="keepalive")
    tls_verify: Flag = True
    ca_file: OptionalFile = None
    #: PEM files with which the gateway proves who it is: a certificate (chain), and its key if that is elsewhere.
    client_cert_file: OptionalFile = None
    client_key_file: OptionalFile = None

    def mistakes(self) -> list[rules.Mistake]:
        return [
            *rules.targets_differ(self.targets),
            *rules.requests_fit(self.requests_max, self.connections_max, len(self.targets)),
            *rules.client_certificate(self.client_cert_file, self.client_key_file),
        ]


class Sessions(Section):
    """How a conversation is recognised and how long it is remembered."""

    header: HeaderName = "x-session-id"
    mint: Flag = True
    #: Since its last request.
    ttl_ms: Annotated[int, duration("1s", "365d")] = Field(default=86_400_000, alias="ttl")
    #: Since its first request.
    absolute_ttl_ms: Annotated[int, duration("1s", "365d")] = Field(default=30 * 86_400_000, alias="absolute_ttl")
    per_org_max: Annotated[int, whole(1, 10_000_000)] = 10_000
    signing_key: OptionalText = Field(default=None, repr=False)

    def mistakes(self) -> list[rules.Mistake]:
        return [*rules.session_ttl(self.ttl_ms, self.absolute_ttl_ms), *rules.signing_key(self.signing_key)]


_Identifier = matching(rules.SQL_NAME, rules.SQL_NAME_FORM)


class Credits(Section):
    """The machinery of holds and the ledger; prices are in policies, amounts in plans."""

    #: The application's table, its columns, and what the gateway may do to it besides changing balances: `managed`
    #: creates it when it is missing and gives it a trigger, `attach` only the trigger, `readonly` neither.
    table: Annotated[str, matching(rules.SQL_TABLE, rules.SQL_TABLE_FORM)] = "ai_credits"
    org_column: Annotated[str, _Identifier] = "organization_id"
    credits_column: Annotated[str, _Identifier] = "credits"
    schema_: Literal["managed", "attach", "readonly"] = Field(default="managed", alias="schema")
    #: How much of an estimate is held: all of it or nothing; what there is of it; or what is used, ahead of need.
    hold: Literal["full", "clamp", "incremental"] = "clamp"
    #: What a request used beyond its hold is owed, or forgiven.
    overrun: Literal["debt", "absorb"] = "debt"
    #: Charges reach PostgreSQL by way of Redis, or are written through to it.
    write: Literal["behind", "through"] = "behind"
    #: Directory in which each process notes holds and charges before they count; None: it does not.
    journal: Annotated[
        Text | None, BeforeValidator(_directory_beside_the_config, json_schema_input_type=str | None)
    ] = None
    #: When Redis lost its state: `cap` leaves to it what it may owe, `optimistic` forgets about that.
    on_state_loss: Literal["cap", "optimistic"] = "cap"
    #: The least that Redis may owe at once for an org, in whole credits, and in percent of its balance: what can be
    #: spent while PostgreSQL is away.
    cap_floor: Annotated[int, whole(1, rules.CREDITS_MAX)] = 10
    cap_percent: Annotated[int, whole(0, 100)] = 50
    #: How long what a lost state may have owed is left alone when some gateway cannot be asked.
    loss_grace_ms: Annotated[int, duration("1s", "24h")] = Field(default=120_000, alias="loss_grace")
    #: Holds while Redis is away: in PostgreSQL, or none.
    without_redis: Literal["postgres", "refuse"] = "postgres"
    #: Charges in memory that PostgreSQL does not have yet, per worker; beyond it 503.
    unconfirmed_entries_max: Annotated[int, whole(1, 100_000_000)] = 100_000

    lease_ms: Annotated[int, duration("1s", "10m")] = Field(default=30_000, alias="lease")
    heartbeat_ms: Annotated[int, duration("100ms", "10m")] = Field(default=10_000, alias="heartbeat")
    sweep_ms: Annotated[int, duration("100ms", "10m")] = Field(default=5_000, alias="sweep")
    flush_ms: Annotated[int, duration("1ms", "1m")] = Field(default=200, alias="flush")
    #: What a request whose gateway died costs: its last checkpoint, the whole hold, or nothing.
    on_expiry: Literal["checkpoint", "hold", "release"] = "checkpoint"
    batch_max: Annotated[int, whole(1, 10_000)] = 500
    outbox_entries_max: Annotated[int, whole(1, 100_000_000)] = 1_000_000
    mirror_ttl_ms: Annotated[int, duration("1s", "30d")] = Field(default=3_600_000, alias="mirror_ttl")
    provision: Flag = False
    settle_timeout_ms: Annotated[int, duration("100ms", "1m")] = Field(default=2_000, alias="settle_timeout")

    def mistakes(self) -> list[rules.Mistake]:
        return rules.heartbeat(self.heartbeat_ms, self.lease_ms)


class LimitsRules(Section):
    """How limits are answered and remembered; the limits themselves are in policies and under shared_limits."""

    #: What is left of the limits is said in RateLimit, RateLimit-Policy and the fields of the route's dialect.
    #: Retry-After is there in any case.
    headers: Flag = True
    #: How long a denial is remembered at most, so that whoever keeps asking costs no round trip; 0s: not at all. What
    #: is given back in another process meanwhile is not seen for so long.
    deny_cache_ms: Annotated[int, duration("0s", "10s")] = Field(default=1_000, alias="deny_cache")
    #: Denials remembered at once, per worker.
    deny_cache_entries_max: Annotated[int, whole(1, 10_000_000)] = 10_000
    #: Overrides of orgs in memory, per worker.
    overrides_max: Annotated[int, whole(1, 10_000_000)] = 100_000
    #: While Redis is away: each worker counts its share by itself, or every request that meets a limit is refused.
    without_redis: Literal["local", "refuse"] = "local"


class Unauthenticated(Section):
    """What one client network may get wrong before anybody is known: per process, an IPv4 address or an IPv6 /64."""

    #: Refused for the lack of a good credential or of a route, per window; 0: not counted.
    failures: Annotated[int, whole(0, 1_000_000)] = 60
    window_ms: Annotated[int, duration("1s", "24h")] = Field(default=60_000, alias="window")
    #: At once.
    burst: Annotated[int, whole(1, 1_000_000)] = 30
    #: Networks remembered at once; when they get too many, newcomers share an entry with their neighbours.
    networks_max: Annotated[int, whole(1, 10_000_000)] = 65_536


class Log(Section):
    """How the gateway speaks to its operator."""

    #: `auto`: pretty on a terminal, JSON elsewhere.
    format: Literal["auto", "json", "pretty"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"
