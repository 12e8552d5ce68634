"""ASGI's view of a request: what an application is told before any byte of the body."""

import asyncio
from typing import Any
from urllib.parse import unquote_to_bytes

from gateway.downstream.head import EXTENSION
from gateway.downstream.request import Request

Address = tuple[str, int | None]


def connection_scope(transport: asyncio.BaseTransport, asgi_version: str) -> dict[str, Any]:
    """What is the same for every request of a connection."""
    return {
        "type": "http",
        # 2.4 would have `send` raise when the client is gone, where 2.3 has it do nothing.
        "asgi": {"version": asgi_version, "spec_version": "2.3"},
        "server": _address(transport.get_extra_info("sockname")),
        "client": _address(transport.get_extra_info("peername")),
        "scheme": "https" if transport.get_extra_info("sslcontext") else "http",
        "root_path": "",
    }


def request_scope(shared: dict[str, Any], request: Request, state: dict[str, Any]) -> dict[str, Any]:
    """shared: what `connection_scope` gave. state: what the lifespan of the application left; copied."""
    raw_path, _, query = request.head.target.partition(b"?")
    if b"%" in raw_path or not raw_path.isascii():
        path = unquote_to_bytes(raw_path).decode("utf-8", "replace")
    else:
        path = raw_path.decode("ascii")
    scope = shared.copy()
    scope["http_version"] = request.version
    scope["method"] = request.method
    scope["path"] = path
    scope["raw_path"] = raw_path
    scope["query_string"] = query
    scope["headers"] = request.headers
    scope["state"] = state.copy()
    scope["extensions"] = {EXTENSION: request.head}
    return scope


def _address(name: object) -> Address | None:
    """None for a Unix socket without a name."""
    if isinstance(name, tuple):
        return str(name[0]), int(name[1])
    return (name, None) if isinstance(name, str) and name else None
