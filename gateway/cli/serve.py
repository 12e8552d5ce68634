"""`gateway serve`: the gateway in front of servers that are configured. What a container or a unit file starts."""

import uvloop

from gateway import server
from gateway.config import Settings
from gateway.errors import ConfigError


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError when something only `gateway run` can start is asked for."""
    uvloop.run(server.serve(require_configured(settings)))


def require_configured(settings: Settings) -> Settings:
    """`settings`, with nothing left to an embedded server."""
    problems = []
    if settings.stores.redis == "embedded":
        problems.append("stores.redis is `embedded`: set REDIS_URL, or use `gateway run`")
    if settings.stores.postgres == "embedded":
        problems.append("stores.postgres is `embedded`: set DATABASE_URL, or use `gateway run`")
    for name, upstream in settings.upstreams.items():
        if "demo" in upstream.targets:
            problems.append(f"upstreams.{name} is `demo`: set AI_ROUTER_URL, or use `gateway run`")
    if problems:
        raise ConfigError(problems)
    return settings
