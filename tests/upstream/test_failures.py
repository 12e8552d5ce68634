"""The table from httpx's errors to ours."""

from collections.abc import Iterator

import httpx
import pytest

from gateway import errors
from gateway.upstream.failures import mapped
from gateway.upstream.wire import StaleConnection, Unanswered

TABLE: dict[type[httpx.TransportError | httpx.InvalidURL], tuple[type[errors.GatewayError], int]] = {
    httpx.ConnectError: (errors.UpstreamUnreachable, 502),
    httpx.UnsupportedProtocol: (errors.UpstreamUnreachable, 502),
    httpx.InvalidURL: (errors.UpstreamUnreachable, 502),
    httpx.ConnectTimeout: (errors.UpstreamConnectTimeout, 504),
    httpx.PoolTimeout: (errors.UpstreamBusy, 503),
    httpx.ReadTimeout: (errors.UpstreamTimeout, 504),
    httpx.WriteTimeout: (errors.UpstreamTimeout, 504),
    httpx.TimeoutException: (errors.UpstreamTimeout, 504),
    httpx.LocalProtocolError: (errors.BadRequest, 400),
    httpx.RemoteProtocolError: (errors.UpstreamBroke, 502),
    httpx.ReadError: (errors.UpstreamBroke, 502),
    httpx.WriteError: (errors.UpstreamBroke, 502),
    httpx.CloseError: (errors.UpstreamBroke, 502),
    httpx.NetworkError: (errors.UpstreamBroke, 502),
    httpx.ProtocolError: (errors.UpstreamBroke, 502),
    httpx.ProxyError: (errors.UpstreamBroke, 502),
    httpx.TransportError: (errors.UpstreamBroke, 502),
    StaleConnection: (errors.UpstreamBroke, 502),
    Unanswered: (errors.UpstreamBroke, 502),
}


def descendants(kind: type[httpx.TransportError]) -> Iterator[type[httpx.TransportError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from descendants(child)


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_each_error_of_the_transport_has_one_name_here(kind: type[httpx.TransportError | httpx.InvalidURL]) -> None:
    failure = mapped(kind("why"))
    assert (type(failure), failure.status) == TABLE[kind]


def test_no_error_of_the_transport_is_missing() -> None:
    ours = ("httpx", "gateway")
    known = {kind for kind in descendants(httpx.TransportError) if kind.__module__.split(".")[0] in ours}
    assert known | {httpx.InvalidURL} == set(TABLE)
