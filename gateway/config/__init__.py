"""The configuration: gateway.yaml and policies/*.yaml as frozen values, or every mistake in them at once."""

from gateway.config.addresses import Network
from gateway.config.effective import REFUSED_PATHS_NOTE, EffectiveLimit, EffectiveRow, effective
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
from gateway.config.policies import Limit, Policy, Price, Tokens
from gateway.config.routes import MethodMismatch, RouteTable
from gateway.config.schema import json_schema
from gateway.config.sections import Credits, Ejection, HealthCheck, Listen, Log, Sessions, Stores, Timeouts, Upstream
from gateway.config.values import format_duration, format_size, parse_duration, parse_size

__all__ = [
    "REFUSED_PATHS_NOTE",
    "ApiKeySource",
    "Credits",
    "EffectiveLimit",
    "EffectiveRow",
    "Ejection",
    "HealthCheck",
    "IdentitySource",
    "JwtKey",
    "JwtSource",
    "Limit",
    "Listen",
    "Log",
    "MethodMismatch",
    "Network",
    "Plan",
    "Policy",
    "Price",
    "Route",
    "RouteTable",
    "Sessions",
    "Settings",
    "Stores",
    "Timeouts",
    "Tokens",
    "TrustedHeaderSource",
    "Upstream",
    "WebSocket",
    "effective",
    "format_duration",
    "format_size",
    "json_schema",
    "load",
    "load_text",
    "parse_duration",
    "parse_size",
]
