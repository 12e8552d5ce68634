"""What comes back from an upstream, as the rest of the house sees it: pieces of a body, or the bytes of a tunnel.

Owns that no error of httpx leaves this room within an answer, and how an answer's body says where it ends.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import httpx

from gateway.upstream.failures import mapped
from gateway.upstream.framing import Framing


class NetworkStream(Protocol):
    """The transport's end of a tunnel: the upstream's connection after a 101."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    async def aclose(self) -> None: ...
    def abort(self) -> None: ...


class Tunnel:
    """The upstream's connection, whose bytes mean nothing to us any more."""

    __slots__ = ("_stream",)

    def __init__(self, stream: NetworkStream) -> None:
        self._stream = stream

    async def read(self) -> bytes:
        """What has arrived; b"" at the orderly end. Raises UpstreamBroke."""
        try:
            return await self._stream.read()
        except httpx.TransportError as exc:
            raise mapped(exc) from exc

    async def write(self, data: bytes) -> None:
        """The upstream takes more. Raises UpstreamBroke, and UpstreamTimeout when it takes too long."""
        try:
            await self._stream.write(data)
        except httpx.TransportError as exc:
            raise mapped(exc) from exc

    async def aclose(self) -> None:
        """Closed in order."""
        await self._stream.aclose()

    def abort(self) -> None:
        """Closed at once."""
        self._stream.abort()


class Pieces:
    """The body of an answer, with failures in the words of `gateway.errors`."""

    __slots__ = ("_pieces",)

    def __init__(self, pieces: AsyncIterator[list[bytes]]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> AsyncIterator[list[bytes]]:
        return self

    async def __anext__(self) -> list[bytes]:
        try:
            return await self._pieces.__anext__()
        except httpx.TransportError as exc:
            raise mapped(exc) from exc


class _Reads:
    """Each read as one piece, for streams that do not say where chunks ended."""

    __slots__ = ("_chunks",)

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._chunks = aiter(stream)

    def __aiter__(self) -> AsyncIterator[list[bytes]]:
        return self

    async def __anext__(self) -> list[bytes]:
        return [await self._chunks.__anext__()]


def pieces_of(stream: httpx.AsyncByteStream) -> AsyncIterator[list[bytes]]:
    """The body in pieces as `Answer.pieces` has them, with httpx's errors."""
    cut: Callable[[], AsyncIterator[list[bytes]]] | None = getattr(stream, "pieces", None)
    return _Reads(stream) if cut is None else cut()


def framing_of(method: str, status: int, headers: Sequence[tuple[bytes, bytes]]) -> Framing:
    """How the body of an answer ends (RFC 9112 §6.3), where the transport does not say."""
    if method == "HEAD" or status < 200 or status in (204, 304):
        return "none"
    length = False
    for name, value in headers:
        size = len(name)
        if size == 17 and name.lower() == b"transfer-encoding":
            return "chunked" if value.rpartition(b",")[2].strip().lower() == b"chunked" else "close"
        if size == 14 and name.lower() == b"content-length":
            length = True
    return "length" if length else "close"
