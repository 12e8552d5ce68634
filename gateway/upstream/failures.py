"""What a failure of the transport is called in this house. Owns the table from httpx's errors to `gateway.errors`."""

import httpx

from gateway.errors import (
    BadRequest,
    GatewayError,
    UpstreamBroke,
    UpstreamBusy,
    UpstreamConnectTimeout,
    UpstreamTimeout,
    UpstreamUnreachable,
)


def mapped(error: httpx.TransportError | httpx.InvalidURL) -> GatewayError:
    """`error` in the words of `gateway.errors`."""
    match error:
        case httpx.ConnectTimeout():
            return UpstreamConnectTimeout()
        case httpx.PoolTimeout():
            return UpstreamBusy()
        case httpx.ConnectError() | httpx.UnsupportedProtocol() | httpx.InvalidURL():
            return UpstreamUnreachable()
        case httpx.TimeoutException():
            return UpstreamTimeout()
        case httpx.LocalProtocolError():
            return BadRequest(str(error))
        case _:
            return UpstreamBroke()
