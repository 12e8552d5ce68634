"""Which requests a limit counts: the `when` of a limit, with everything decided that a plan and a route decide.

    given      holds when
    route      a pattern covers the route's own path; or, inside a route that ends in `/*`, the path of the request
    method     the request's method is one of them
    model      a glob fits; a request whose model nobody knows is fitted by `*` alone
    plan       the org's plan is one of them
    stream     the client asked for a streamed answer, or did not; a body that nobody reads did not
    header     every field is there, whatever it says

All that are given must hold. A pattern inside a prefix route (`/v1/embeddings` inside `/v1/*`) is compared with every
reading of the request's path and without regard to case, as routes themselves are: no way of writing a path escapes.
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import translate

from gateway.config import Route, When
from gateway.config.readings import folded, readings
from gateway.config.routes import covers
from gateway.policy.asking import Asking

#: A condition that a request itself must be asked.
Check = Callable[[Asking], bool]

_ANY_MODEL = "*"


def compile_when(when: When, plan: str, route: Route) -> tuple[Check, ...] | None:
    """What requests of `plan` on `route` are still to be asked; None when `when` holds for none of them."""
    answers = (
        when.plan is None or plan in when.plan,
        _method(when.method, route),
        _stream(when.stream),
        _model(when.model),
        _headers(when.header),
        _route(when.route, route),
    )
    if any(answer is False for answer in answers):
        return None
    return tuple(answer for answer in answers if not isinstance(answer, bool))


def reads_body(when: When) -> bool:
    """Whether `when` holds cannot be known from a request's head."""
    return when.stream is not None or (when.model is not None and _ANY_MODEL not in when.model)


def _method(wanted: Sequence[str] | None, route: Route) -> bool | Check:
    if wanted is None:
        return True
    methods = frozenset(wanted)
    if route.method is not None and (methods.issuperset(route.method) or methods.isdisjoint(route.method)):
        return not methods.isdisjoint(route.method)
    return lambda asking: asking.facts.method in methods


def _stream(wanted: bool | None) -> bool | Check:
    if wanted is None:
        return True
    return lambda asking: (asking.peek is not None and asking.peek.stream) is wanted


def _model(globs: Sequence[str] | None) -> bool | Check:
    if globs is None or _ANY_MODEL in globs:
        return True
    fits = re.compile("|".join(map(translate, globs))).match

    def check(asking: Asking) -> bool:
        model = None if asking.peek is None else asking.peek.model
        return model is not None and fits(model) is not None

    return check


def _headers(wanted: Sequence[str] | None) -> bool | Check:
    if wanted is None:
        return True
    names = frozenset(name.encode() for name in wanted)
    return lambda asking: names.issubset([name for name, _ in asking.facts.headers])


def _route(patterns: Sequence[str] | None, route: Route) -> bool | Check:
    if patterns is None or any(covers(pattern, route.path) for pattern in patterns):
        return True
    own = route.path.lower()
    inside = [pattern for pattern in map(str.lower, patterns) if covers(own, pattern)]
    if not inside:
        return False
    exact = frozenset(pattern.encode() for pattern in inside if not pattern.endswith("/*"))
    prefixes = tuple(pattern[:-1].encode() for pattern in inside if pattern.endswith("/*"))

    def check(asking: Asking) -> bool:
        # Every reading of what was matched to a route can be read.
        paths = map(folded, readings(asking.facts.target.partition(b"?")[0]))
        return any(path in exact or path.startswith(prefixes) for path in paths)

    return check
