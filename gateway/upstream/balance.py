"""Which target gets the next request. Owns the choice and whose turn it is; each target's state is in standing.py."""

from collections.abc import Container, Sequence
from typing import Generic, Protocol, TypeVar

from gateway.upstream.standing import Standing


class Candidate(Protocol):
    """What the choice depends on."""

    @property
    def outstanding(self) -> int: ...
    @property
    def standing(self) -> Standing: ...


C = TypeVar("C", bound=Candidate)


class Balancer(Generic[C]):
    """Least outstanding requests first, in turn where they are equal.

    Targets that are not welcome are left out as long as there is another. When there is none they are all tried as if
    they were well: what we know of them is old, and a request refused untried is lost for certain.
    """

    __slots__ = ("_candidates", "_turn")

    def __init__(self, candidates: Sequence[C]) -> None:
        self._candidates = candidates
        self._turn = 0

    def choose(self, tried: Container[C] = ()) -> C | None:
        """The target for a request that failed at those `tried`; None when there is no other."""
        candidates = self._candidates
        if len(candidates) == 1:
            return None if candidates[0] in tried else candidates[0]
        return self._least(tried, welcome_only=True) or self._least(tried, welcome_only=False)

    def _least(self, tried: Container[C], *, welcome_only: bool) -> C | None:
        candidates, count = self._candidates, len(self._candidates)
        chosen: C | None = None
        turn = 0
        for position in range(self._turn, self._turn + count):
            candidate = candidates[position % count]
            if chosen is not None and candidate.outstanding >= chosen.outstanding:
                continue
            if candidate in tried or (welcome_only and not candidate.standing.welcomes()):
                continue
            chosen, turn = candidate, position
        if chosen is not None:
            self._turn = (turn + 1) % count
        return chosen
