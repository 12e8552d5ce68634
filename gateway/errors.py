"""Everything that can go wrong in the gateway itself.

GatewayError
├── ConfigError             the configuration cannot be used; lists every mistake with file and line
├── BadRequest              400  the request cannot be understood where it must be
│   ├── AmbiguousPath       400  other servers may read the path as one that another route serves
│   ├── BodyTooLarge        413
│   └── RequestTimeout      408
├── Unauthenticated         401
├── UnknownRoute            404
├── MethodNotAllowed        405
├── StoreUnavailable        503  Redis or PostgreSQL did not answer in time
│   ├── StoreRefused        503  it did answer: what it was given can never be stored
│   ├── StoreLocked         503  it did answer: somebody else keeps a lock on what was asked for
│   └── UnknownBalance      503  the org's balance is not cached and PostgreSQL cannot be asked
├── OutOfCredits            402  the credits were used up in mid-stream
├── ShuttingDown            503  the gateway ends before the request did
├── UpstreamBusy            503  all its connections are in use and the queue is full, or was too slow
├── UpstreamUnreachable     502  no connection: the upstream never saw the request
│   └── UpstreamConnectTimeout 504
├── UpstreamBroke           502  the connection broke after the request was sent
├── UpstreamTimeout         504
└── ClientLeft                   nobody is there to answer

The class docstring is the default message; `code` is stable and public. A denial (limits, credits) is not an
error but a value: `types.Refusal`.
"""

from collections.abc import Sequence

from gateway.types import Refusal


class GatewayError(Exception):
    """The gateway could not handle the request."""

    code = "gateway_error"
    status = 500
    #: Sent as Retry-After; None leaves it out.
    retry_after_s: int | None = None
    should_retry: bool | None = None

    def __init__(self, message: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        super().__init__(self.message)

    def refusal(self) -> Refusal:
        """The answer a client gets for this failure."""
        retry_ms = None if self.retry_after_s is None else self.retry_after_s * 1000
        return Refusal(self.status, self.code, self.message, retry_ms, self.should_retry)


class ConfigError(GatewayError):
    """The configuration cannot be used."""

    code = "config_error"

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class BadRequest(GatewayError):
    """The request is malformed."""

    code = "bad_request"
    status = 400


class AmbiguousPath(BadRequest):
    """This path can be read in more than one way; write it without dots, doubled slashes or needless escapes."""

    code = "ambiguous_path"


class BodyTooLarge(BadRequest):
    """The request body is larger than this route allows."""

    code = "body_too_large"
    status = 413


class RequestTimeout(BadRequest):
    """The request body did not arrive in time."""

    code = "request_timeout"
    status = 408


class Unauthenticated(GatewayError):
    """No valid credential was presented."""

    code = "invalid_api_key"
    status = 401


class UnknownRoute(GatewayError):
    """No route of this gateway serves this path."""

    code = "unknown_route"
    status = 404


class MethodNotAllowed(GatewayError):
    """This path exists, but not for this method."""

    code = "method_not_allowed"
    status = 405

    def __init__(self, message: str | None = None, *, allow: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.allow = tuple(allow)

    def refusal(self) -> Refusal:
        return Refusal(self.status, self.code, self.message, details={"allow": self.allow})


class StoreUnavailable(GatewayError):
    """A store the gateway depends on did not answer in time; try again shortly."""

    code = "store_unavailable"
    status = 503
    retry_after_s = 1
    should_retry = True

    def __init__(self, message: str | None = None, *, detail: str = "", ambiguous: bool = False) -> None:
        super().__init__(message)
        #: True when the store may have acted, or may still: the caller must undo what it asked for.
        self.ambiguous = ambiguous
        #: For the log, never for the client: which store, and what it said.
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.message} ({self.detail})" if self.detail else self.message


class StoreRefused(StoreUnavailable):
    """A store the gateway depends on did not take what it was given."""


class StoreLocked(StoreUnavailable):
    """Somebody keeps a lock in a store that the gateway depends on; try again shortly."""


class UnknownBalance(StoreUnavailable):
    """The balance of this organization cannot be read right now; try again shortly."""

    code = "credits_unavailable"
    retry_after_s = 2


class OutOfCredits(GatewayError):
    """The credits of this organization are used up; the answer ends here."""

    code = "insufficient_credits"
    status = 402
    should_retry = False


class ShuttingDown(GatewayError):
    """This gateway is shutting down; try again."""

    code = "shutting_down"
    status = 503
    retry_after_s = 1
    should_retry = True


class UpstreamBusy(GatewayError):
    """The upstream has as many requests as it may have at once; try again shortly."""

    code = "upstream_busy"
    status = 503
    retry_after_s = 1
    should_retry = True
    reached = False


class UpstreamUnreachable(GatewayError):
    """The upstream could not be reached."""

    code = "upstream_unreachable"
    status = 502
    #: Whether the upstream may have seen the request; False means it certainly has not.
    reached = False


class UpstreamConnectTimeout(UpstreamUnreachable):
    """The upstream did not accept a connection in time."""

    status = 504


class UpstreamBroke(GatewayError):
    """The upstream closed the connection before its answer was complete."""

    code = "upstream_broke"
    status = 502
    reached = True


class UpstreamTimeout(GatewayError):
    """The upstream did not answer in time."""

    code = "upstream_timeout"
    status = 504
    reached = True


class ClientLeft(GatewayError):
    """The client closed its connection before the answer was complete."""

    code = "client_left"
    status = 499
