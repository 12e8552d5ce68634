"""Which route a request takes: pure matching of method and decoded path. It knows nothing of what a route does."""

from dataclasses import dataclass
from typing import Self

from gateway.config.models import Route


@dataclass(frozen=True, slots=True)
class MethodMismatch:
    """The path belongs to routes, none of which takes this method."""

    #: What a 405 says in its Allow field, sorted.
    allowed: tuple[str, ...]
    #: Of the first of these routes: whoever calls its path speaks it, with the wrong method too.
    dialect: str = "problem"


@dataclass(frozen=True, slots=True)
class RouteTable:
    """The routes in order, arranged so that an exact path costs one lookup and any other a short scan of prefixes."""

    #: Exact path -> every route that takes it, prefix routes included, in the order of the configuration.
    exact: dict[str, tuple[Route, ...]]
    #: (`/trpc/`, the route of `/trpc/*`), in the order of the configuration.
    prefixes: tuple[tuple[str, Route], ...]

    @classmethod
    def compile(cls, routes: tuple[Route, ...]) -> Self:
        paths = {route.path for route in routes if not route.path.endswith("/*")}
        exact = {path: tuple(route for route in routes if covers(route.path, path)) for path in paths}
        prefixes = tuple((route.path[:-1], route) for route in routes if route.path.endswith("/*"))
        return cls(exact, prefixes)

    def match(self, method: str, path: str) -> Route | MethodMismatch | None:
        """The first route in order that takes `method` on the decoded `path`.

        MethodMismatch when only the method is wrong, None when no route knows the path. A path with dot segments has
        no route: the upstream might resolve `/trpc/../admin` to a place that this route never meant to open.
        """
        candidates = self.exact.get(path)
        if candidates is None:
            if _has_dot_segment(path):
                return None
            candidates = tuple(route for prefix, route in self.prefixes if path.startswith(prefix))
        for route in candidates:
            if route.method is None or method in route.method:
                return route
        if candidates:
            allowed = {name for route in candidates for name in route.method or ()}
            return MethodMismatch(tuple(sorted(allowed)), candidates[0].dialect)
        return None


def covers(pattern: str, path: str) -> bool:
    """Every request for `path` (exact, or itself ending in `/*`) is also one for `pattern`."""
    return pattern == path or (pattern.endswith("/*") and path.startswith(pattern[:-1]))


def _has_dot_segment(path: str) -> bool:
    """Some segment means `.` or `..` to somebody: URL parsers read `\\` as `/`, servlet containers ignore `;...`."""
    if "." not in path:
        return False
    return any(segment.partition(";")[0] in (".", "..") for segment in path.replace("\\", "/").split("/"))
