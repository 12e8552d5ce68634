"""Matching a request to a route, and the paths that must not slip from one route to another."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.config import MethodMismatch, Route, RouteTable
from gateway.config.readings import READ_BYTES_MAX, readings
from gateway.config.routes import covers
from gateway.errors import AmbiguousPath, BadRequest
from tests.config.lenient import SERVERS


def table(*routes: tuple[str, list[str] | None]) -> RouteTable:
    return RouteTable.compile(
        tuple(Route.model_validate({"path": path, "method": method, "upstream": "router"}) for path, method in routes)
    )


def name(found: Route | MethodMismatch | None) -> str | None:
    assert not isinstance(found, MethodMismatch)
    return found.name if found else None


def outcome(routes: RouteTable, target: bytes, method: str = "GET") -> str | None:
    """The route's name; None where there is none for the path or the method; `refused`."""
    try:
        found = routes.match(method, target)
    except BadRequest:
        return "refused"
    return found.name if isinstance(found, Route) else None


def test_an_exact_path_matches_only_itself() -> None:
    routes = table(("/v1/chat", ["POST"]))
    assert name(routes.match("POST", b"/v1/chat")) == "POST /v1/chat"
    assert name(routes.match("POST", b"/v1/chat?x=/v1/../%00&y=%zz")) == "POST /v1/chat"
    for path in (b"/v1/chat/", b"/v1/chats", b"/v1", b"/V1/chat", b"/", b"/v1/chat%20"):
        assert routes.match("POST", path) is None


def test_a_prefix_matches_everything_below_it_and_nothing_beside_it() -> None:
    routes = table(("/trpc/*", None))
    for path in (b"/trpc/x", b"/trpc/x/y", b"/trpc/", b"/trpc/x.y,z", b"/trpc/?batch=1"):
        assert name(routes.match("GET", path)) == "/trpc/*"
    for path in (b"/trpc", b"/trpcx", b"/a/trpc/x"):
        assert routes.match("GET", path) is None


def test_the_first_route_in_order_wins() -> None:
    assert name(table(("/v1/*", ["GET"]), ("/v1/a", None)).match("GET", b"/v1/a")) == "GET /v1/*"
    assert name(table(("/v1/*", ["GET"]), ("/v1/a", None)).match("POST", b"/v1/a")) == "/v1/a"
    assert name(table(("/v1/a", ["GET"]), ("/v1/*", None)).match("POST", b"/v1/a")) == "/v1/*"
    assert name(table(("/*", None)).match("PUT", b"/")) == "/*"


def test_a_known_path_with_another_method_tells_the_allowed_ones() -> None:
    routes = table(("/v1/a", ["POST", "PUT"]), ("/v1/*", ["GET", "PUT"]))
    assert routes.match("DELETE", b"/v1/a") == MethodMismatch(("GET", "POST", "PUT"))
    assert routes.match("DELETE", b"/v1/b") == MethodMismatch(("GET", "PUT"))
    assert routes.match("DELETE", b"/v1/%62") == MethodMismatch(("GET", "PUT"))


@pytest.mark.parametrize(
    "target", [b"", b"*", b"http://host/v1/a", b"host:443", b"v1/a", b"?x", b"/v1/a#b", b"/v1/a?b#c"]
)
def test_a_target_that_is_no_path_is_refused(target: bytes) -> None:
    with pytest.raises(BadRequest):
        table(("/*", None)).match("GET", target)


# What one path may be read as

EVERYTHING_BELOW = [
    b"/v1/models/meta-llama%2FLlama-3",
    b"/v1/models/Meta-Llama",
    b"/v1/models/a%20b%25c",
    b"/v1/models/a;version=2",
    b"/v1/models/..a/b..c/...",
    b"/v1/.well-known/x",
    b"/v1/models//double",
    b"/v1/a/./b/../c",
    b"/v1/a%2f..%2fb",
    b"/v1/a\\b",
    b"/v1/caf\xc3\xa9/caf%C3%A9",
    b"/v1/caf\xe9/caf%E9",
    b"/v1/https%253A%252F%252Fexample.com%252Fx%253Fy",
    b"/v1/x%3Fy%23z",
]


@pytest.mark.parametrize("path", EVERYTHING_BELOW)
def test_a_path_that_stays_below_its_prefix_however_read_is_forwarded(path: bytes) -> None:
    assert outcome(table(("/v1/*", None)), path) == "/v1/*"
    assert outcome(table(("/v1/chat", None), ("/v1/*", None), ("/*", None)), path) == "/v1/*"


ESCAPES = [
    b"/pub/../v1/chat",
    b"/pub/%2e%2e/v1/chat",
    b"/pub/.%2E/v1/chat",
    b"/pub/%252e%252e/v1/chat",
    b"/pub/..%2fv1/chat",
    b"/pub/..%5cv1%5Cchat",
    b"/pub/..\\v1\\chat",
    b"/pub/..;/v1/chat",
    b"/pub/..;a=b/v1/chat",
    b"/pub/..%3bx/v1/chat",
    b"/pub/%2e%2e%3b/v1/chat",
    b"/pub/x/..//../v1/chat",
    b"/pub/./../v1/chat",
    b"/pub%2f..%2fv1%2fchat",
    b"/v1/x%2fy/%2e%2e/chat",
    b"/v1/x%5Cy/..%3b/chat",
    b"//v1/chat",
    b"/v1//chat",
    b"/v1/./chat",
    b"/v1/x/../chat",
    b"/v1%2fchat",
    b"/v1%252fchat",
    b"/v1/ch%61t",
    b"/v1/ch%2561t",
    b"/%761/chat",
    b"/V1/Chat",
    b"/v1/CHAT",
    b"/v1/%43HAT",
    b"/v1/chat/",
    b"/v1/chat//",
    b"/v1/chat%2f",
    b"/v1/chat/.",
    b"/v1/chat/x/..",
    b"/v1/chat;",
    b"/v1/chat;x=y",
    b"/v1;x/chat",
    b"/v1/chat%3bx",
    b"/v1/chat%3f",
    b"/v1/chat%3fx=/pub/",
    b"/v1/chat%23x",
    b"/v1/chat%253fx",
    b"/v1\\chat",
    b"/v1%5cchat",
    b"//evil.example/v1/chat",
    b"/\\evil.example/v1/chat",
    b"/%2fevil/v1/chat",
    b"/v1%c0%afchat",
    b"/v1%e0%80%afchat",
    b"/v1\xc0\xafchat",
    b"/pub/%c0%ae%c0%ae/v1/chat",
    b"/pub/.\xff./v1/chat",
    b"/pub/%ef%bc%8e%ef%bc%8e/v1/chat",
    b"/v1%ef%bc%8fchat",
    b"/v1/cha%ef%bd%94",
    "/v1/\u212aey".encode(),
]


@pytest.mark.parametrize("path", ESCAPES)
def test_a_path_that_another_route_may_serve_is_refused(path: bytes) -> None:
    routes = table(("/v1/chat", ["GET"]), ("/v1/key", None), ("/pub/*", None), ("/*", None))
    with pytest.raises(AmbiguousPath):
        routes.match("GET", path)


@pytest.mark.parametrize("path", ESCAPES)
def test_a_path_that_may_lead_where_no_route_is_never_gets_there(path: bytes) -> None:
    assert outcome(table(("/pub/*", None)), path) in (None, "refused")


@pytest.mark.parametrize(
    "path",
    [
        b"/..",
        b"/../x",
        b"/v1/../../x",
        b"/v1/%2e%2e/%2e%2e/x",
        b"/v1/..%2f..%2fx",
        b"/v1/..%252f..%252fx",
        b"/v1//../../../x",
        b"/v1//../../x",
        b"/v1/..;/..;/x",
        b"/v1\\..\\..\\x",
        b"//x/../v1",
        b"/v1/%00",
        b"/v1/x%00.json",
        b"/v1/x%2500",
        b"/v1/%0d%0aHost:%20evil",
        b"/v1/%0a",
        b"/v1/%09",
        b"/v1/%7f",
        b"/v1/\x00",
        b"/v1/\t",
        b"/v1/%zz",
        b"/v1/%",
        b"/v1/%2",
        b"/v1/100%",
        b"/v1/%u002e%u002e/x",
        b"/v1/%%32%65",
        b"/v1/%+2e",
    ],
)
def test_what_climbs_or_breaks_is_refused_whatever_the_routes(path: bytes) -> None:
    for routes in (table(("/*", None)), table(("/v1/*", None)), table(("/v1", ["POST"]))):
        with pytest.raises(AmbiguousPath):
            routes.match("GET", path)


@pytest.mark.parametrize(
    "path",
    [b"/%2d/metrics", b"/%2D/metrics", b"//-/metrics", b"/./-/metrics", b"/x/../-/metrics", b"/-;x/metrics"]
    + [b"/-%2fmetrics", b"/x//..//-/metrics", b"//host/-/metrics", b"/\\-\\metrics", b"/%252d/metrics"],
)
def test_no_reading_of_a_forwarded_path_is_a_page_of_the_gateway(path: bytes) -> None:
    assert outcome(table(("/*", None)), path) in (None, "refused")


def test_the_gateways_own_pages_have_no_route() -> None:
    for path in (b"/-/metrics", b"/-/", b"/-/x%2Fy"):
        assert table(("/*", None)).match("GET", path) is None
    assert outcome(table(("/*", None)), b"/-") == outcome(table(("/*", None)), b"/-x/y") == "/*"


def test_the_directory_of_a_prefix_is_only_its_own_where_no_other_route_has_it() -> None:
    assert outcome(table(("/trpc/*", None)), b"/trpc/") == "/trpc/*"
    assert outcome(table(("/trpc/*", None)), b"/trpc/x/..") == "/trpc/*"
    assert outcome(table(("/trpc/*", None), ("/trpc", None)), b"/trpc/") == "refused"
    assert outcome(table(("/trpc/*", None), ("/*", None)), b"/trpc/") == "refused"
    assert outcome(table(("/trpc", None), ("/*", None)), b"/trpc") == "/trpc"


@pytest.mark.parametrize("path", ["/v1/chat/", "/a;v=1/b", "/a//b", "/V1/Chat"])
def test_a_route_is_reached_the_way_it_is_written(path: str) -> None:
    assert outcome(table((path, None)), path.encode()) == path
    assert outcome(table((path, None), ("/other/*", None)), path.encode()) == path


def test_routes_that_differ_in_case_alone_are_ambiguous_where_the_first_does_not_take_both() -> None:
    routes = table(("/V1/a", None), ("/v1/a", None))
    assert (outcome(routes, b"/V1/a"), outcome(routes, b"/v1/a")) == ("/V1/a", "refused")


def test_a_method_that_the_other_route_does_not_take_is_no_way_around_it() -> None:
    routes = table(("/v1/chat", ["POST"]), ("/*", None))
    assert outcome(routes, b"/v1/chat/", "POST") == "refused"
    assert outcome(routes, b"/v1/chat/", "GET") == "/*"


@given(st.integers(1, 200_000), st.sampled_from([b"%25", b"%2e/", b"..%2f", b";/", b"%5c", b"\xc0", b"//", b"/./"]))
def test_the_work_that_one_path_can_cause_is_bounded(count: int, piece: bytes) -> None:
    path = b"/" + piece * (count // len(piece))
    try:
        found = readings(path)
    except AmbiguousPath:
        return
    assert sum(map(len, found)) <= READ_BYTES_MAX


# Any table, any path

_WORDS = ["a", "b", "A", "ab", "-"]
_PATHS = st.lists(st.sampled_from(_WORDS), max_size=3).map(lambda parts: "/" + "/".join(parts))
_PATTERNS = (_PATHS | _PATHS.map(lambda path: path.rstrip("/") + "/*")).filter(lambda path: not path.startswith("/-/"))
_METHODS = st.none() | st.lists(st.sampled_from(["GET", "POST"]), min_size=1, max_size=2)
_TABLES = st.lists(st.tuples(_PATTERNS, _METHODS), max_size=6)
_PIECES = [
    *_WORDS,
    "/",
    "/",
    "/",
    "//",
    ".",
    "..",
    "/..",
    "/../",
    "/./",
    "\\",
    ";",
    ";x=1",
    "%2f",
    "%2F",
    "%5c",
    "%2e",
    "%2E%2e",
]
_PIECES += [
    "%61",
    "%41",
    "%252f",
    "%252e",
    "%2561",
    "%3b",
    "%3f",
    "%23",
    "%2d",
    "%25",
    "%c0%af",
    "%ef%bc%8f",
    "%e2%84%aa",
]
_TARGETS = st.lists(st.sampled_from(_PIECES), max_size=8).map(lambda pieces: "/" + "".join(pieces))


@given(_TABLES, st.sampled_from(["GET", "POST", "PUT"]), _PATHS)
def test_the_table_finds_what_a_plain_walk_over_the_routes_finds(
    written: list[tuple[str, list[str] | None]], method: str, path: str
) -> None:
    on_path = [(pattern, methods) for pattern, methods in written if covers(pattern, path)]
    if path.startswith("/-/"):
        on_path = []
    first = next((pattern for pattern, methods in on_path if methods is None or method in methods), None)
    try:
        found = table(*written).match(method, path.encode())
    except AmbiguousPath:
        # Right only where the case of letters or the slash at the end leads elsewhere.
        assert first is not None
        other = [pattern for pattern, _ in written if covers(pattern.lower(), path.lower().rstrip("/") or "/")]
        assert path.endswith("/") or any(pattern != first for pattern in other)
        return
    if first is not None:
        assert isinstance(found, Route) and found.path == first
    else:
        assert isinstance(found, MethodMismatch) if on_path else found is None


@given(_TABLES, _TARGETS)
def test_every_reading_of_a_forwarded_path_has_the_same_route(
    written: list[tuple[str, list[str] | None]], target: str
) -> None:
    routes = table(*written)
    found = outcome(routes, target.encode())
    if found in (None, "refused"):
        return
    chosen = routes.match("GET", target.encode())
    for reading in readings(target.encode()):
        plain = reading.decode("latin-1")
        first = next(
            (route for route, methods in written if covers(route, plain) and "GET" in (methods or ["GET"])), None
        )
        assert isinstance(chosen, Route)
        # None: the directory of a prefix, or what the pattern itself may be read as; nobody else's.
        assert first in (chosen.path, None) and not plain.startswith("/-/")


@given(st.lists(_PATTERNS, min_size=1, max_size=6, unique_by=str.lower), _TARGETS)
@example(["/a", "/*"], "/x%2f..%2f%61")
@example(["/a/b", "/*"], "/a/x%2fy/%2e%2e/b")
@example(["/a/b", "/a/*"], "/a;x/%2e/b;y/")
def test_no_server_finds_another_handler_than_the_route_that_was_matched(patterns: list[str], target: str) -> None:
    """The servers have one handler for each route, in the same order."""
    found = outcome(table(*((pattern, None) for pattern in patterns)), target.encode())
    if found in (None, "refused"):
        return
    for server in SERVERS:
        assert server.handler(target, patterns) in (found, None), server.name
