"""Whose portion of a limit a request takes from, as the text that stands in the counter's key.

What clients may choose freely never makes a key of its own: it is hashed into a bounded number of slots, so a limit has
at most `cardinality` counters for each org. Two values that meet in one slot share its portion: never too much for
anybody, and for a pair of them at odds of one to the cardinality.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from gateway import keys
from gateway.config import Route
from gateway.policy.asking import ANONYMOUS, Asking, Reader, known_on, reader

#: What a request's values came to, by the dimensions they are of; for the limits of one request that are per the same.
Memo = dict[tuple[str, ...], bytes]

_WHOLE = ""


@dataclass(frozen=True, slots=True)
class Slots:
    """The subjects of a limit whose requests on one route differ: one slot for each, as far as there are enough."""

    dimensions: tuple[str, ...]
    readers: tuple[Reader, ...]
    #: Stands before the values, so that those who meet in a slot of one limit do not meet in every other too.
    name: bytes
    cardinality: int

    def of(self, asking: Asking, memo: Memo) -> str:
        values = memo.get(self.dimensions)
        if values is None:
            values = memo[self.dimensions] = framed([read(asking) or ANONYMOUS for read in self.readers])
        return slot(self.name + values, self.cardinality)


def compile_subject(name: str, dimensions: Sequence[str], cardinality: int, route: Route) -> str | Slots:
    """The subject of every request on `route`, or how to find each one's.

    Dimensions that the configuration enumerates need no bound. They are hashed all the same, to a length that is fixed;
    and beside any other dimension they are one value more that goes into its slot.
    """
    if not dimensions:
        return _WHOLE
    known = [known_on(route, dimension) for dimension in dimensions]
    values = [value for value in known if value is not None]
    if len(values) == len(dimensions):
        return keys.digest(framed(values).hex())
    readers = tuple(
        reader(dimension) if value is None else _always(value)
        for dimension, value in zip(dimensions, known, strict=True)
    )
    return Slots(tuple(dimensions), readers, framed([name]), cardinality)


def framed(values: Sequence[str]) -> bytes:
    """All of `values`, each after its length: no two lists of values come to the same bytes."""
    # A lone surrogate can come out of JSON; it must count as something, and may be anything.
    encoded = [value.encode("utf-8", "surrogatepass") for value in values]
    return b"".join([len(value).to_bytes(4, "big") + value for value in encoded])


def slot(data: bytes, cardinality: int) -> str:
    """The slot of `data` among `cardinality`, at most 2^20, in any process: `s` and five hex digits."""
    return f"s{int.from_bytes(blake2b(data, digest_size=8).digest(), 'big') % cardinality:05x}"


def _always(value: str) -> Callable[[Asking], str]:
    return lambda asking: value
