"""A server on a real socket that says one thing to everybody: what SDKs are tried against."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gateway.dialects import Rendered


class Listening(ThreadingHTTPServer):
    """Answers every POST with `rendered`, as often as a connection asks."""

    daemon_threads = True

    def __init__(self, rendered: Rendered) -> None:
        super().__init__(("127.0.0.1", 0), _Saying)
        self.rendered = rendered
        self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Saying(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        assert isinstance(self.server, Listening)
        self.rfile.read(int(self.headers["content-length"]))
        self.server.requests += 1
        rendered = self.server.rendered
        head = b"".join(b"%b: %b\r\n" % field for field in rendered.headers)
        self.wfile.write(b"HTTP/1.1 %d So\r\n%b\r\n%b" % (rendered.status, head, rendered.body))

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing on stderr."""


@contextmanager
def listening(rendered: Rendered) -> Iterator[Listening]:
    server = Listening(rendered)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
