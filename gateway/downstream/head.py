"""What the server connection knows of a request's head and ASGI's scope has no place for."""

from dataclasses import dataclass

from gateway.types import HeaderList

#: The key in `scope["extensions"]` under which a connection of ours puts a request's Head.
EXTENSION = "gateway.http1"


@dataclass(frozen=True, slots=True)
class Head:
    """The head as it stood on the wire."""

    #: Names in their own case; field for field the scope's `headers`.
    fields: HeaderList
    #: As on the request line: `/x?` keeps its `?`.
    target: bytes
    #: The protocol that the client would switch to, in lower case; empty when `Connection` does not nominate Upgrade.
    upgrade: bytes = b""
    #: The client sends its body only when it is told to by a 100, or by nobody for a while.
    expects_continue: bool = False
