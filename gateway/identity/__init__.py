"""Who asks: the second step of the walk.

Owns the order of the sources and which header fields carry a credential. One file per source; a new one is a file and
a line in `SOURCES`. Identity reads header fields and the socket's peer, never the body, and never a field that states
an identity without proving it (PostHog/posthog #50542, BerriAI/litellm #34846).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.config import ApiKeySource as ApiKeySection
from gateway.config import JwtSource as JwtSection
from gateway.config import TrustedHeaderSource as TrustedHeaderSection
from gateway.errors import Unauthenticated
from gateway.identity.api_key import ApiKeySource
from gateway.identity.jwks import Fetch
from gateway.identity.jwt import JwtSource
from gateway.identity.key_cache import LoadKey
from gateway.identity.source import Clock, Source
from gateway.identity.trusted_header import TrustedHeaderSource
from gateway.types import Facts, Principal


@dataclass(frozen=True, slots=True)
class Powers:
    """What sources need from elsewhere; `app.py` hands it in."""

    #: Looks up an API key: `api_key.key_loader(postgres)`.
    load_key: LoadKey
    #: Reads a JWKS document.
    fetch: Fetch
    #: A clock that never goes back.
    monotonic_ms: Clock
    #: Milliseconds since 1970.
    wall_ms: Clock
    #: Names of the claims that some limit is per: `policy.claims_needed`.
    claims: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Identified:
    """Who asks, and where the proof stood."""

    principal: Principal
    #: Lower-case names of the fields that carry a credential of the gateway, the deciding one and any other: not for
    #: the upstream, unless the route forwards credentials.
    credential_headers: frozenset[bytes]


_NO_FIELDS: frozenset[bytes] = frozenset()

#: The section of `gateway.yaml` -> what makes the source. Any: each factory takes the config class it stands beside.
SOURCES: Mapping[type, Callable[[Any, Powers], Source]] = {
    ApiKeySection: lambda own, powers: ApiKeySource(
        own, powers.load_key, monotonic_ms=powers.monotonic_ms, wall_ms=powers.wall_ms
    ),
    JwtSection: lambda own, powers: JwtSource(
        own, powers.fetch, monotonic_ms=powers.monotonic_ms, wall_ms=powers.wall_ms, claims=powers.claims
    ),
    TrustedHeaderSection: lambda own, powers: TrustedHeaderSource(own),
}


class Identity:
    """The configured sources, in their order."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = tuple(sources)
        #: Lower-case names of the fields that state an identity (`x-org-id`). Never forwarded as a client sent them,
        #: whatever the route says: the upstream may believe them.
        self.asserted_headers = _NO_FIELDS.union(*[source.asserted_headers for source in self._sources])

    async def identify(self, facts: Facts) -> Identified:
        """The first source that recognises a credential decides; later ones are not asked.

        Raises Unauthenticated when that credential is bad or no source recognises one, StoreUnavailable when the store
        or the key server that knows does not answer.
        """
        for source in self._sources:
            principal = await source.identify(facts)
            if principal is not None:
                return Identified(principal, self.credential_headers(facts))
        raise Unauthenticated

    def remembers(self, facts: Facts) -> bool:
        """Whether the credential that `identify` would judge is one that this process has seen to be good.

        No proof: it may have been revoked since. It tells known clients from a crowd, at no cost to any store.
        """
        for source in self._sources:
            remembered = source.remembers(facts)
            if remembered is not None:
                return remembered
        return False

    def credential_headers(self, facts: Facts) -> frozenset[bytes]:
        """The request's fields whose value has the form of any configured source's credential."""
        return _NO_FIELDS.union(*[source.credential_headers(facts) for source in self._sources])

    def on_notification(self, payload: str) -> None:
        """A change was announced on the channel `gateway_keys`; what it touches is forgotten at once."""
        for source in self._sources:
            source.on_notification(payload)

    def drop_all(self) -> None:
        """Announcements may have been lost. To be called when the channel breaks and when it is listened to again."""
        for source in self._sources:
            source.drop_all()

    async def close(self) -> None:
        """Nothing of any source runs any more."""
        for source in self._sources:
            await source.close()


def open_identity(sections: Iterable[object], powers: Powers) -> Identity:
    """The sources of `gateway.yaml`'s `identity` list, in order. Reads PEM files; raises ConfigError."""
    return Identity(SOURCES[type(section)](section, powers) for section in sections)
