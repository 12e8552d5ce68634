"""Headers that a proxy in front of the gateway sets after it has authenticated the client itself.

Owns which peers may do so and what they may say. The peer is the other end of the socket: an address taken from
X-Forwarded-For is the client's word and proves nothing here. From any other peer the headers are not a credential.
"""

from ipaddress import IPv4Network, IPv6Network
from typing import Protocol

from gateway.errors import Unauthenticated
from gateway.headers import is_trusted
from gateway.identity.source import Source, checked_name, checked_user, values
from gateway.types import Facts, Principal


class TrustedHeaderConfig(Protocol):
    """What this source reads of its part of `gateway.yaml`: header names, and who may set them."""

    @property
    def org(self) -> str: ...
    @property
    def user(self) -> str | None: ...
    @property
    def plan(self) -> str | None: ...
    @property
    def from_networks(self) -> tuple[IPv4Network | IPv6Network, ...]: ...
    @property
    def default_plan(self) -> str | None: ...


class TrustedHeaderSource(Source):
    """Believes the org, user and plan headers of a listed peer; a peer that sends no org header says nothing."""

    def __init__(self, config: TrustedHeaderConfig) -> None:
        self._org = config.org.lower()
        self._user = None if config.user is None else config.user.lower()
        self._plan = None if config.plan is None else config.plan.lower()
        self._default_plan = config.default_plan
        self._networks = config.from_networks
        self.asserted_headers = frozenset(
            name.encode() for name in (self._org, self._user, self._plan) if name is not None
        )

    async def identify(self, facts: Facts) -> Principal | None:
        if not is_trusted(facts.peer_ip, self._networks):
            return None
        org = _only_value(facts, self._org)
        if org is None:
            return None
        user = None if self._user is None else _only_value(facts, self._user)
        plan = None if self._plan is None else _only_value(facts, self._plan)
        if plan is None:
            plan = self._default_plan
        if plan is None:
            raise Unauthenticated(f"The header {self._plan or 'for the plan'} is missing.")
        return Principal(
            org_id=checked_name(org, f"The header {self._org}"),
            plan=checked_name(plan, f"The header {self._plan}"),
            user_id=None if user is None else checked_user(user, f"The header {self._user}"),
            key_id=None,
            source="trusted_header",
        )

    def remembers(self, facts: Facts) -> bool | None:
        # There is nothing to remember: that the peer says it, once, is the whole proof.
        said = values(facts, self._org.encode()) if is_trusted(facts.peer_ip, self._networks) else []
        return len(said) == 1 if said else None


def _only_value(facts: Facts, header: str) -> str | None:
    """The field's value. Twice the same field is refused: the proxy's copy cannot be told from the client's."""
    found = values(facts, header.encode())
    if len(found) > 1:
        raise Unauthenticated(f"The header {header} was sent more than once.")
    return found[0].decode("latin-1") if found else None
