"""Which route a request takes: pure matching of method and target. It knows nothing of what a route does.

A request is matched on one form of its path (percent-decoded, once) and forwarded as it was written. So that no way of
writing a path reaches, at an upstream, what another route guards, a request is only matched when every reading of its
path (readings.py) leads to the same route: with the case of its letters and without, and to no page of the gateway.
"""

import re
from dataclasses import dataclass
from typing import Self

from gateway.config.models import Route
from gateway.config.readings import decoded, folded, readings
from gateway.config.rules import OWN_PREFIX
from gateway.errors import AmbiguousPath, BadRequest

#: Paths that everybody reads alike: no escape, no parameter, no empty or dotted segment, no upper case, no slash at the
#: end. Nearly all are.
_UNMISTAKABLE = re.compile(rb"(?:/[a-z0-9_~!$&'()*+,=:@-][a-z0-9_~!$&'()*+,=:@.-]*)+")


@dataclass(frozen=True, slots=True)
class MethodMismatch:
    """The path belongs to routes, none of which takes this method."""

    #: What a 405 says in its Allow field, sorted.
    allowed: tuple[str, ...]
    #: Of the first of these routes: whoever calls its path speaks it, with the wrong method too.
    dialect: str = "problem"


@dataclass(frozen=True, slots=True)
class _Paths:
    """Patterns in order, arranged so that an exact path costs one lookup and any other a short scan of prefixes."""

    #: Exact path -> every route that takes it, prefix routes included, in the order of the configuration.
    exact: dict[bytes, tuple[Route | None, ...]]
    #: (`/trpc/`, the route of `/trpc/*`), in the order of the configuration; None: the gateway's own pages.
    prefixes: tuple[tuple[bytes, Route | None], ...]

    @classmethod
    def of(cls, patterns: list[tuple[bytes, Route | None]]) -> Self:
        exact = {
            path: tuple(route for pattern, route in patterns if _covers(pattern, path))
            for path, _ in patterns
            if not path.endswith(b"/*")
        }
        return cls(exact, tuple((path[:-1], route) for path, route in patterns if path.endswith(b"/*")))

    def find(self, method: str, path: bytes) -> Route | MethodMismatch | None:
        """The first route in order that takes both."""
        known = []
        candidates = self.exact.get(path)
        if candidates is None:
            for prefix, route in self.prefixes:
                if path.startswith(prefix):
                    if route is None:
                        return None
                    if route.method is None or method in route.method:
                        return route
                    known.append(route)
        else:
            for route in candidates:
                if route is None:
                    return None
                if route.method is None or method in route.method:
                    return route
                known.append(route)
        if not known:
            return None
        allowed = {name for route in known for name in route.method or ()}
        return MethodMismatch(tuple(sorted(allowed)), known[0].dialect)


@dataclass(frozen=True, slots=True)
class RouteTable:
    """The routes in order."""

    _written: _Paths
    #: Every pattern in lower case.
    _folded: _Paths
    #: What the patterns themselves may be read as: `/trpc` for `/trpc/*`. Whoever opened the one opened the other,
    #: unless a route says otherwise.
    _implied: _Paths
    #: Some pattern has upper-case letters, so lower-case paths may be other routes' too.
    _has_upper_case: bool

    @classmethod
    def compile(cls, routes: tuple[Route, ...]) -> Self:
        # First in order, so that no reading of a forwarded path is one of the gateway's own pages.
        own: list[tuple[bytes, Route | None]] = [(OWN_PREFIX.encode() + b"*", None)]
        written = [(route.path.encode(), route) for route in routes]
        implied = [(folded(pattern), route) for path, route in written for pattern in _pattern_readings(path)]
        in_lower_case = [(folded(path), route) for path, route in written]
        return cls(
            _Paths.of([*own, *written]),
            _Paths.of([*own, *in_lower_case]),
            _Paths.of([*own, *implied]),
            in_lower_case != written,
        )

    def match(self, method: str, target: bytes) -> Route | MethodMismatch | None:
        """The first route in order that takes `method` on the path of `target`, the raw request target.

        MethodMismatch when only the method is wrong, None when no route knows the path. Raises AmbiguousPath when
        another reading of the path is not this route's, or could be no good to anybody (see `readings`); BadRequest
        for what is no path with a query: absolute and authority form, `*`, a fragment.
        """
        if b"#" in target:
            raise BadRequest("The request target must not have a fragment.")
        path = target.partition(b"?")[0]
        if _UNMISTAKABLE.fullmatch(path) and not self._has_upper_case:
            return self._written.find(method, path)
        if path[:1] != b"/":
            raise BadRequest("The request target must begin with '/'.")
        every = readings(path)
        found = self._written.find(method, decoded(path))
        if isinstance(found, Route) and not all(self._leads_to(found, method, reading) for reading in every):
            raise AmbiguousPath
        return found

    def _leads_to(self, route: Route, method: str, reading: bytes) -> bool:
        """Whoever reads the path as `reading`, in this case or in any, finds what `route` opened."""
        lower = folded(reading)
        return all(
            (found if found is not None else self._implied.find(method, lower)) is route
            for found in (self._written.find(method, reading), self._folded.find(method, lower))
        )


def covers(pattern: str, path: str) -> bool:
    """Every request for `path` (exact, or itself ending in `/*`) is also one for `pattern`."""
    return _covers(pattern.encode(), path.encode())


def overlaps(pattern: str, path: str) -> bool:
    """`pattern` means some of the requests that the route at `path` takes: all of them or, regardless of case, a part
    of what lies below a path that ends in `/*`."""
    return covers(pattern, path) or covers(path.lower(), pattern.lower())


def _covers(pattern: bytes, path: bytes) -> bool:
    return pattern == path or (pattern.endswith(b"/*") and path.startswith(pattern[:-1]))


def _pattern_readings(pattern: bytes) -> list[bytes]:
    """What a route's pattern may be read as; for `/a/*` also its own directory, `/a`."""
    if not pattern.endswith(b"/*"):
        return list(readings(pattern))
    return [reading + b"*" if reading.endswith(b"/") else reading for reading in readings(pattern[:-1])]
