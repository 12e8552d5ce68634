"""The configuration: gateway.yaml and policies/*.yaml as frozen values, or every mistake in them at once."""

from gateway.config.addresses import Network
from gateway.config.effective import (
    REFUSED_PATHS_NOTE,
    EffectiveGrant,
    EffectiveLimit,
    EffectivePrice,
    EffectiveRow,
    effective,
    effective_grants,
)
from gateway.config.load import load, load_text
from gateway.config.models import (
    ApiKeySource,
    IdentitySource,
    JwtKey,
    JwtSource,
    Plan,
    Route,
    Settings,
    TrustedHeaderSource,
    WebSocket,
)
from gateway.config.policies import Limit, ModelPrice, Policy, Price, SharedLimit, Tokens, When
from gateway.config.routes import MethodMismatch, RouteTable
from gateway.config.rules import CREDITS_MAX
from gateway.config.schema import json_schema
from gateway.config.sections import (
    Credits,
    Ejection,
    HealthCheck,
    LimitsRules,
    Listen,
    Log,
    Sessions,
    Stores,
    Timeouts,
    Unauthenticated,
    Upstream,
)
from gateway.config.values import format_duration, format_size, parse_duration, parse_size

__all__ = [
    "CREDITS_MAX",
    "REFUSED_PATHS_NOTE",
    "ApiKeySource",
    "Credits",
    "EffectiveGrant",
    "EffectiveLimit",
    "EffectivePrice",
    "EffectiveRow",
    "Ejection",
    "HealthCheck",
    "IdentitySource",
    "JwtKey",
    "JwtSource",
    "Limit",
    "LimitsRules",
    "Listen",
    "Log",
    "MethodMismatch",
    "ModelPrice",
    "Network",
    "Plan",
    "Policy",
    "Price",
    "Route",
    "RouteTable",
    "Sessions",
    "Settings",
    "SharedLimit",
    "Stores",
    "Timeouts",
    "Tokens",
    "TrustedHeaderSource",
    "Unauthenticated",
    "Upstream",
    "WebSocket",
    "When",
    "effective",
    "effective_grants",
    "format_duration",
    "format_size",
    "json_schema",
    "load",
    "load_text",
    "parse_duration",
    "parse_size",
]
