"""Matching a request to a route."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import MethodMismatch, Route, RouteTable
from gateway.config.routes import covers


def table(*routes: tuple[str, list[str] | None]) -> RouteTable:
    return RouteTable.compile(
        tuple(Route.model_validate({"path": path, "method": method, "upstream": "router"}) for path, method in routes)
    )


def name(found: Route | MethodMismatch | None) -> str | None:
    assert not isinstance(found, MethodMismatch)
    return found.name if found else None


def test_an_exact_path_matches_only_itself() -> None:
    routes = table(("/v1/chat", ["POST"]))
    assert name(routes.match("POST", "/v1/chat")) == "POST /v1/chat"
    for path in ("/v1/chat/", "/v1/chats", "/v1", "/V1/chat", "", "/"):
        assert routes.match("POST", path) is None


def test_a_prefix_matches_everything_below_it_and_nothing_beside_it() -> None:
    routes = table(("/trpc/*", None))
    for path in ("/trpc/x", "/trpc/x/y", "/trpc/", "/trpc/x.y,z"):
        assert name(routes.match("GET", path)) == "/trpc/*"
    for path in ("/trpc", "/trpcx", "/a/trpc/x"):
        assert routes.match("GET", path) is None


def test_the_first_route_in_order_wins() -> None:
    assert name(table(("/v1/*", ["GET"]), ("/v1/a", None)).match("GET", "/v1/a")) == "GET /v1/*"
    assert name(table(("/v1/*", ["GET"]), ("/v1/a", None)).match("POST", "/v1/a")) == "/v1/a"
    assert name(table(("/v1/a", ["GET"]), ("/v1/*", None)).match("POST", "/v1/a")) == "/v1/*"
    assert (
        name(
            table(
                ("/*", None),
            ).match("PUT", "/")
        )
        == "/*"
    )


def test_a_known_path_with_another_method_tells_the_allowed_ones() -> None:
    routes = table(("/v1/a", ["POST", "PUT"]), ("/v1/*", ["GET", "PUT"]))
    assert routes.match("DELETE", "/v1/a") == MethodMismatch(("GET", "POST", "PUT"))
    assert routes.match("DELETE", "/v1/b") == MethodMismatch(("GET", "PUT"))


@pytest.mark.parametrize(
    "path", ["/trpc/../admin", "/trpc/..", "/trpc/./x", "/trpc/..;/admin", "/trpc/..\\admin", "/trpc/a/../../admin"]
)
def test_a_path_that_climbs_out_of_its_prefix_has_no_route(path: str) -> None:
    assert table(("/trpc/*", None)).match("GET", path) is None


def test_dots_inside_a_segment_are_ordinary() -> None:
    assert table(("/trpc/*", None)).match("GET", "/trpc/..a/b..c/...") is not None


_PATHS = st.lists(st.sampled_from(["a", "b", "ab"]), max_size=3).map(lambda parts: "/" + "/".join(parts))
_PATTERNS = _PATHS | _PATHS.map(lambda path: path.rstrip("/") + "/*")
_METHODS = st.none() | st.lists(st.sampled_from(["GET", "POST"]), min_size=1, max_size=2)


@given(st.lists(st.tuples(_PATTERNS, _METHODS), max_size=6), st.sampled_from(["GET", "POST", "PUT"]), _PATHS)
def test_the_table_finds_what_a_plain_walk_over_the_routes_finds(
    written: list[tuple[str, list[str] | None]], method: str, path: str
) -> None:
    on_path = [(pattern, methods) for pattern, methods in written if covers(pattern, path)]
    first = next((pattern for pattern, methods in on_path if methods is None or method in methods), None)
    found = table(*written).match(method, path)
    if first is not None:
        assert isinstance(found, Route) and found.path == first
    else:
        assert isinstance(found, MethodMismatch) if on_path else found is None
