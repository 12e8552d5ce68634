"""What a request is to a policy: everything that limits may look at, and what each dimension reads of it.

Of a request's body nothing but its model is ever looked at here, and of its unproven header fields only those that a
policy names: whoever may choose what he is counted as escapes every limit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gateway.config import Route
from gateway.headers import network_of
from gateway.types import Facts, Peek, Principal

#: Of a header field's value no more is looked at; the access log keeps as much.
VALUE_CHARS_MAX = 256

#: The value of a dimension that a request has none of: everybody without it shares one portion.
ANONYMOUS = "-"


@dataclass(frozen=True, slots=True)
class Asking:
    """One request, or one message of a WebSocket, as it stands before its policy."""

    principal: Principal
    facts: Facts
    route: Route
    #: None where nobody reads the body.
    peek: Peek | None = None
    #: `keys.digest` of the session's id: what the access log says of it too, so that a log leads to the same slots.
    session_digest: str | None = None
    #: Limit name -> what this org has instead, as a policy file would say it: whole credits for credits.
    overrides: Mapping[str, int] = field(default_factory=dict)


#: The value of one dimension; None when the request has none.
Reader = Callable[[Asking], str | None]

#: Dimensions whose values the configuration enumerates; a route knows its own.
_OF_THE_ROUTE: Mapping[str, Callable[[Route], str]] = {
    "route": lambda route: route.name,
    "upstream": lambda route: route.upstream,
}
_OF_THE_REQUEST: Mapping[str, Reader] = {
    "user": lambda asking: asking.principal.user_id,
    "key": lambda asking: asking.principal.key_id,
    "session": lambda asking: asking.session_digest,
    "model": lambda asking: asking.peek.model if asking.peek is not None else None,
    "client_ip": lambda asking: network_of(asking.facts.client_ip).hex(),
}


def known_on(route: Route, dimension: str) -> str | None:
    """The value that `dimension` has for every request on `route`; None when requests differ in it."""
    known = _OF_THE_ROUTE.get(dimension)
    return None if known is None else known(route)


def reader(dimension: str) -> Reader:
    """What reads `dimension`: a word, `claim:NAME` or `header:NAME`, but none that is `known_on` a route."""
    kind, _, name = dimension.partition(":")
    if kind == "claim":
        return lambda asking: asking.principal.claims.get(name)
    if kind == "header":
        field_name = name.encode()
        return lambda asking: (asking.facts.header(field_name) or "")[:VALUE_CHARS_MAX]
    return _OF_THE_REQUEST[dimension]
