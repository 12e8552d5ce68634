"""Who may ask for what: identity, plans and routes; and the settings as a whole, frozen.

A YAML key is the field's alias; the attribute adds the unit. Rules over several keys of one section are in rules.py,
rules between sections in checks.py, the sections that tell the machine how to run in sections.py.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from gateway.config import rules
from gateway.config.addresses import JwksUrl, NetworkText
from gateway.config.limit_values import GrantAnchor, Zone
from gateway.config.policies import Policy, SharedLimit
from gateway.config.sections import (
    Credits,
    LimitsRules,
    Listen,
    Log,
    OptionalFile,
    OptionalName,
    OptionalText,
    Section,
    Sessions,
    Stores,
    Unauthenticated,
    Upstream,
)
from gateway.config.values import Flag, HeaderName, Method, Name, Text, duration, empty_is_none, matching, size, whole


class ApiKeySource(Section):
    """Keys that the gateway issued itself; PostgreSQL holds their SHA-256."""

    headers: tuple[HeaderName, ...] = Field(default=("authorization", "x-api-key"), min_length=1, max_length=8)
    cache_ttl_ms: Annotated[int, duration("0s", "1h")] = Field(default=10_000, alias="cache_ttl")
    #: How long past its TTL a cached key still serves while PostgreSQL is away.
    cache_stale_ms: Annotated[int, duration("0s", "24h")] = Field(default=60_000, alias="cache_stale")
    cache_entries_max: Annotated[int, whole(1, 10_000_000)] = 10_000


class JwtKey(Section):
    """Where one or more verification keys come from: exactly one of the three."""

    jwks: Annotated[JwksUrl | None, BeforeValidator(empty_is_none)] = Field(default=None, repr=False)
    secret: OptionalText = Field(default=None, repr=False)
    pem_file: OptionalFile = None

    def mistakes(self) -> list[rules.Mistake]:
        return rules.jwt_key({"jwks": self.jwks, "secret": self.secret, "pem_file": self.pem_file})


JwtAlgorithm: TypeAlias = Literal["HS256", "RS256", "ES256"]


def _algorithms_of_the_keys(validated: Mapping[str, object]) -> tuple[JwtAlgorithm, ...]:
    keys = validated.get("keys")
    shared = isinstance(keys, tuple) and all(isinstance(key, JwtKey) and key.secret is not None for key in keys)
    return ("HS256",) if shared else ("RS256", "ES256")


class JwtSource(Section):
    """Tokens that somebody else issued. `org`, `user` and `plan` name the claims."""

    keys: tuple[JwtKey, ...] = Field(min_length=1, max_length=16)
    issuer: OptionalText = None
    audience: OptionalText = None
    org: Text
    user: OptionalText = None
    plan: OptionalText = None
    default_plan: OptionalName = None
    header: HeaderName = "authorization"
    leeway_ms: Annotated[int, duration("0s", "10m")] = Field(default=30_000, alias="leeway")
    jwks_ttl_ms: Annotated[int, duration("1s", "24h")] = Field(default=600_000, alias="jwks_ttl")
    #: Left out: HS256 for a `secret`, RS256 and ES256 for `jwks` and `pem_file`.
    algorithms: tuple[JwtAlgorithm, ...] = Field(default_factory=_algorithms_of_the_keys, min_length=1)

    def mistakes(self) -> list[rules.Mistake]:
        keys = [{"jwks": k.jwks, "secret": k.secret, "pem_file": k.pem_file} for k in self.keys]
        return [*rules.jwt_algorithms(keys, list(self.algorithms)), *rules.plan_known(self.plan, self.default_plan)]


class TrustedHeaderSource(Section):
    """Headers set by a proxy in front of the gateway, believed only from `from`."""

    org: HeaderName
    user: Annotated[HeaderName | None, BeforeValidator(empty_is_none)] = None
    plan: Annotated[HeaderName | None, BeforeValidator(empty_is_none)] = None
    default_plan: OptionalName = None
    from_networks: tuple[NetworkText, ...] = Field(alias="from", min_length=1, max_length=64)

    def mistakes(self) -> list[rules.Mistake]:
        everybody = [str(network) for network in self.from_networks if network.prefixlen == 0]
        return [*rules.trusts_everybody(everybody), *rules.plan_known(self.plan, self.default_plan)]


class _Under:
    """Reads `{key: {...}}` as the section below `key`; `key:` alone means all defaults."""

    def __init__(self, key: str, *, may_be_empty: bool = False) -> None:
        self.key = key
        self.may_be_empty = may_be_empty

    def _unwrap(self, value: object) -> object:
        if isinstance(value, dict):
            below = value[self.key]
            return {} if below is None else below
        return value

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._unwrap, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        below = handler(schema)
        if self.may_be_empty:
            below = {"anyOf": [below, {"type": "null"}]}
        return {
            "type": "object",
            "properties": {self.key: below},
            "required": [self.key],
            "additionalProperties": False,
        }


def _source_kind(value: object) -> str | None:
    match value:
        case ApiKeySource():
            return "api_key"
        case JwtSource():
            return "jwt"
        case TrustedHeaderSource():
            return "trusted_header"
        case dict() if len(value) == 1:
            return str(next(iter(value)))
        case _:
            return None


IdentitySource: TypeAlias = Annotated[
    Annotated[ApiKeySource, _Under("api_key", may_be_empty=True), Tag("api_key")]
    | Annotated[JwtSource, _Under("jwt"), Tag("jwt")]
    | Annotated[TrustedHeaderSource, _Under("trusted_header"), Tag("trusted_header")],
    Discriminator(_source_kind),
]


class Plan(Section):
    """What an org bought: the credits of a new period and the policy it lives under."""

    credits: Annotated[int, whole(0, rules.CREDITS_MAX)]
    policy: Name
    #: What a period brings: nothing; `credits` once, to a new org (`gateway orgs add`, or `credits.provision`); as much
    #: as is missing to `credits`; `credits` in place of what is left of the last ones; `credits` on top.
    grant: Literal["none", "set_initial", "top_up", "reset", "add"] = "set_initial"
    #: For `top_up`, `reset` and `add`.
    period: Literal["hour", "day", "week", "month"] = "month"
    zone: Zone = "UTC"
    #: Minutes from the natural beginning of the period; in YAML as a calendar limit's. None (`created` in YAML): the
    #: periods of an org begin when it was created.
    anchor_minutes: GrantAnchor = Field(default=0, alias="anchor")

    @property
    def is_periodic(self) -> bool:
        return self.grant in rules.PERIODIC_GRANTS

    def mistakes(self) -> list[rules.Mistake]:
        written = {type(self).model_fields[name].alias or name for name in self.model_fields_set}
        return rules.plan_grant(self.grant, written)


#: YAML 1.1 reads a bare `off` as false.
_OffIsWord = BeforeValidator(
    lambda value: "off" if value is False else value, json_schema_input_type=Literal["off", "inject"]
)


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _none_is_none(value: object) -> object:
    return None if value == "none" else value


class WebSocket(Section):
    """What a WebSocket on a route may do."""

    #: Silence in both directions, pings included.
    idle_ms: Annotated[int, duration("1s", "24h")] = Field(default=300_000, alias="idle")
    lifetime_ms: Annotated[int, duration("1s", "30d")] = Field(default=86_400_000, alias="lifetime")
    message_bytes_max: Annotated[int, size("1B", "1GiB")] = 16 << 20
    #: true: every message of the client is admitted on its own and costs the policy's `price.per_message`.
    count_messages: Flag = False
    #: For the closing handshake, once the gateway has begun it.
    close_timeout_ms: Annotated[int, duration("100ms", "1m")] = Field(default=5_000, alias="close_timeout")

    def mistakes(self) -> list[rules.Mistake]:
        return rules.websocket_times(self.idle_ms, self.lifetime_ms)


class Route(Section):
    """Which requests go where. `path` is exact, or a prefix when it ends in `/*`; no `method` means all."""

    path: Annotated[str, matching(rules.ROUTE_PATH, rules.ROUTE_PATH_FORM)]
    method: Annotated[
        tuple[Method, ...] | None,
        Field(min_length=1),
        BeforeValidator(_one_or_more, json_schema_input_type=str | list[str] | None),
    ] = None
    upstream: Name
    #: Whose error bodies a refusal imitates.
    dialect: Literal["openai", "anthropic", "problem"] = "problem"
    #: The format an answer reports its tokens in; None: tokens are not counted here.
    usage: Annotated[
        Literal["openai_chat"] | None,
        BeforeValidator(_none_is_none, json_schema_input_type=Literal["openai_chat", "none"] | None),
    ] = None
    forward_credential: Flag = False
    body_bytes_max: Annotated[int, size("1B", "1TiB")] = 10 << 20
    #: Which failures are tried again: connecting alone; also connections that broke before any answer, which may have
    #: been acted on (`idempotent`: the upstream takes a repetition for one); or nothing.
    retry: Literal["connect", "idempotent", "never"] = "connect"
    #: A client that leaves ends its request at once, or lets it finish within the two bounds so that it is charged in
    #: full for what it really used.
    on_disconnect: Literal["abort", "drain"] = "abort"
    drain_timeout_ms: Annotated[int, duration("100ms", "1h")] = Field(default=30_000, alias="drain_timeout")
    drain_bytes_max: Annotated[int, size("1KiB", "1GiB")] = 1 << 20
    #: A request that names an Idempotency-Key is run and charged once, however often it is sent.
    idempotency: Flag = False
    #: A client that allows more output than its credits pay for: the upstream decides, or its request is changed.
    enforce_max_tokens: Annotated[Literal["off", "inject"], _OffIsWord] = "off"
    #: None: a WebSocket handshake is refused here.
    websocket: WebSocket | None = None

    def mistakes(self) -> list[rules.Mistake]:
        return [*rules.route_path(self.path), *rules.websocket_method(self.method or (), self.websocket is not None)]

    @property
    def name(self) -> str:
        """`POST /v1/chat/completions`, or the path alone when every method is taken."""
        return f"{'|'.join(self.method)} {self.path}" if self.method else self.path


class Settings(Section):
    """Everything that is configured: gateway.yaml and the policies beside it. Frozen and picklable."""

    listen: Listen = Field(default_factory=Listen)
    stores: Stores = Field(default_factory=Stores)
    upstreams: dict[Name, Upstream] = Field(min_length=1, max_length=256)
    identity: tuple[IdentitySource, ...] = Field(min_length=1, max_length=16)
    plans: dict[Name, Plan] = Field(min_length=1, max_length=256)
    routes: tuple[Route, ...] = Field(min_length=1, max_length=1_000)
    sessions: Sessions = Field(default_factory=Sessions)
    credits: Credits = Field(default_factory=Credits)
    #: What all orgs share; a policy's limits are each org's own.
    shared_limits: tuple[SharedLimit, ...] = Field(default=(), max_length=rules.LIMITS_MAX)
    limits: LimitsRules = Field(default_factory=LimitsRules)
    unauthenticated: Unauthenticated = Field(default_factory=Unauthenticated)
    log: Log = Field(default_factory=Log)
    #: By policy name. In YAML this key names their directory; the loader reads it.
    policies: dict[str, Policy] = Field(default_factory=dict)
