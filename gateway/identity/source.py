"""What every identity source is, and how sources read header fields.

Owns the `Source` protocol and the checks that turn text from a credential into a name. Knows no source, does no I/O.
"""

import re
from collections.abc import Callable
from typing import Protocol

from gateway.errors import Unauthenticated
from gateway.types import Facts, Principal

#: Milliseconds of some clock; which one is said where it is asked for.
Clock = Callable[[], int]

_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_USER = re.compile(r"[\x21-\x7e]{1,256}")


class Source(Protocol):
    """One way to prove who asks. Subclass it: everything but `identify` has a default that is right for most.

    A source that remembers what it verified forgets it when told (`on_notification`, `drop_all`) and ends its own
    background work in `close`.
    """

    #: Fields that state an identity without proving it. The proxy strips them from every request, whoever sent it.
    asserted_headers: frozenset[bytes] = frozenset()

    async def identify(self, facts: Facts) -> Principal | None:
        """Who asks, or None when the request carries no credential of this kind.

        Raises Unauthenticated when it carries one that is not valid, StoreUnavailable when that cannot be known now.
        """
        ...

    def remembers(self, facts: Facts) -> bool | None:
        """Whether this process has seen the request's credential to be good and has not learned of its end since.

        None when the request carries no credential of this kind. Asks nobody, so `identify` may yet refuse it.
        """
        return None

    def credential_headers(self, facts: Facts) -> frozenset[bytes]:
        """Lower-case names of the fields of this request whose value has the form of this source's credential."""
        return frozenset()

    def on_notification(self, payload: str) -> None:
        """A change of keys or orgs was announced on the channel `gateway_keys`."""
        return None

    def drop_all(self) -> None:
        """Announcements may have been lost: whatever is remembered is asked for again before it is used."""
        return None

    async def close(self) -> None:
        """Nothing of this source runs any more."""
        return None


def values(facts: Facts, header: bytes) -> list[bytes]:
    """Every value of the field, without the white space around it (RFC 9110 §5.5)."""
    return [value.strip(b" \t") for name, value in facts.headers if name == header]


def bearer(value: bytes) -> bytes | None:
    """The token of a `Bearer` credential; the scheme is case-insensitive (RFC 9110 §11.1)."""
    scheme, space, token = value.partition(b" ")
    return token.strip(b" ") if space and scheme.lower() == b"bearer" else None


def checked_name(text: str, what: str) -> str:
    """`text` as the name of an org or plan: it stands in Redis keys, logs and headers, so its alphabet is small.

    Raises Unauthenticated, saying which part of the credential (`what`) is bad but not its value.
    """
    if _NAME.fullmatch(text) is None:
        raise Unauthenticated(f"{what} is not a valid name.")
    return text


def checked_user(text: str, what: str) -> str:
    """`text` as a user id: visible ASCII, so that `auth0|5f7c` and `ada@example.com` pass and a line break does not.

    Raises Unauthenticated like `checked_name`.
    """
    if _USER.fullmatch(text) is None:
        raise Unauthenticated(f"{what} is not a valid user id.")
    return text
