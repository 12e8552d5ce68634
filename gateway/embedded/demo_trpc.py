"""The demo router's tRPC 11 procedures, and how tRPC writes results and errors. No I/O.

`demo.hello` is a query (`{"name": str}` -> `{"greeting": str}`), `demo.add` a mutation (`{"a": int, "b": int}` ->
`{"sum": int}`). Single calls and `?batch=1` calls, without a transformer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qs

import msgspec

from gateway.embedded.demo_replies import Json

CALLS_MAX = 32

#: HTTP status -> (JSON-RPC number, name), after @trpc/server's TRPC_ERROR_CODES_BY_KEY.
_CODES = {
    400: (-32600, "BAD_REQUEST"),
    401: (-32001, "UNAUTHORIZED"),
    402: (-32002, "PAYMENT_REQUIRED"),
    403: (-32003, "FORBIDDEN"),
    404: (-32004, "NOT_FOUND"),
    405: (-32005, "METHOD_NOT_SUPPORTED"),
    408: (-32008, "TIMEOUT"),
    409: (-32009, "CONFLICT"),
    413: (-32013, "PAYLOAD_TOO_LARGE"),
    429: (-32029, "TOO_MANY_REQUESTS"),
    502: (-32603, "BAD_GATEWAY"),
    503: (-32603, "SERVICE_UNAVAILABLE"),
    504: (-32603, "GATEWAY_TIMEOUT"),
}


class HelloInput(msgspec.Struct):
    name: str = "world"


class AddInput(msgspec.Struct):
    a: int
    b: int


@dataclass(frozen=True, slots=True)
class _Procedure:
    method: str
    run: Callable[[bytes], Json]


def _hello(raw: bytes) -> Json:
    return {"greeting": f"Hello {msgspec.json.decode(raw or b'{}', type=HelloInput).name}"}


def _add(raw: bytes) -> Json:
    given = msgspec.json.decode(raw, type=AddInput)
    return {"sum": given.a + given.b}


_PROCEDURES = {"demo.hello": _Procedure("GET", _hello), "demo.add": _Procedure("POST", _add)}


def error(status: int, text: str, path: str) -> Json:
    """tRPC's error object for one call."""
    number, name = _CODES.get(status, (-32600, "BAD_REQUEST") if status < 500 else (-32603, "INTERNAL_SERVER_ERROR"))
    return {"error": {"message": text, "code": number, "data": {"code": name, "httpStatus": status, "path": path}}}


def answer(method: str, path: str, query: str, body: bytes) -> tuple[int, Json | list[Json]]:
    """Status and JSON for the procedures of `path` (names joined by commas in a batch).

    A batch whose calls ended differently has status 207, as @trpc/server does it.
    """
    parameters = parse_qs(query)
    raw = parameters.get("input", [""])[0].encode() if method == "GET" else body
    if parameters.get("batch") != ["1"]:
        return _call(method, path, raw)
    names = path.split(",")[:CALLS_MAX]
    try:
        inputs = msgspec.json.decode(raw or b"{}", type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        return 400, [error(400, str(exc), name) for name in names]
    results = [_call(method, name, bytes(inputs.get(str(index), b""))) for index, name in enumerate(names)]
    statuses = {status for status, _ in results}
    return statuses.pop() if len(statuses) == 1 else 207, [result for _, result in results]


def _call(method: str, name: str, raw: bytes) -> tuple[int, Json]:
    procedure = _PROCEDURES.get(name)
    if procedure is None:
        return 404, error(404, f'No procedure found on path "{name}"', name)
    if procedure.method != method:
        return 405, error(405, f'Unsupported {method}-request to procedure at path "{name}"', name)
    try:
        return 200, {"result": {"data": procedure.run(raw)}}
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        return 400, error(400, str(exc), name)
