"""From a line of the access log to what its request was to a policy: the same slots, conditions and costs.

What the log cannot give back: a path whose bytes are no UTF-8 stands in it with marks in their place.
"""

from urllib.parse import quote

from gateway.config import Route, Settings
from gateway.insight.logline import Line
from gateway.policy import Asking
from gateway.types import Facts, Peek, Principal


class Askings:
    """Lines as requests under one configuration."""

    def __init__(self, settings: Settings) -> None:
        self._routes = {route.name: route for route in settings.routes}

    def of(self, line: Line) -> Asking | None:
        """What the request was; None when no org is known of it, or no route of the configuration has its name."""
        route = self._routes.get(line.route or "")
        if route is None or line.org is None:
            return None
        principal = Principal(
            line.org, line.plan or "", line.user, line.key, source=line.identity or "", claims=line.claims
        )
        return Asking(principal, _facts(line), route, peek_of(line, route), line.session, line.overrides)


def peek_of(line: Line, route: Route) -> Peek | None:
    """What the gateway had read of the body; None where it had read nothing that a limit could depend on."""
    if line.stream is None or route.usage is None:
        return None
    return Peek(line.body_bytes or 0, line.asked_model, line.stream, line.max_output_tokens)


def _facts(line: Line) -> Facts:
    path = line.path
    plain = path.isascii() and not any(char in path for char in "%?#")
    fields = tuple(
        (name.encode("latin-1", "replace"), value.encode("latin-1", "replace")) for name, value in line.headers.items()
    )
    return Facts(
        request_id=line.request_id,
        method=line.method,
        path=path,
        target=(path if plain else quote(path)).encode(),
        headers=fields,
        client_ip=line.client_ip,
        peer_ip="",
    )
