"""Numbers of the model stand for what only real stores can make up: births, versions, ids of entries.

Which for which is noted when it is first seen, and must stay so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from tests.protocol.redis_state import Entry

K = TypeVar("K")

#: A credit of the model, in micro-credits: not a whole one, so that fractions are carried.
UNIT = 500_000
#: Of what stands for nothing: equal to no number of the model.
UNKNOWN = -1_000_000


@dataclass
class Names:
    births: dict[int, str] = field(default_factory=lambda: {0: ""})
    versions: dict[int, int] = field(default_factory=dict)
    entries: dict[Entry, str] = field(default_factory=dict)

    def note_version(self, number: int, real: int) -> None:
        """From now on `number` is `real`; their order is the same."""
        known = self.versions.setdefault(number, real)
        assert known == real, f"version {number} of the model was {known}, and now is {real}"
        real_ones = [self.versions[one] for one in sorted(self.versions)]
        assert real_ones == sorted(set(real_ones)), f"not in the order of the model's versions: {self.versions}"

    def note_birth(self, number: int, real: str) -> None:
        known = self.births.setdefault(number, real)
        assert known == real, f"birth {number} of the model was {known}, and now is {real}"
        assert list(self.births.values()).count(real) == 1, f"two hashes were born as {real}"

    def note_entry(self, entry: Entry, real: str) -> None:
        known = self.entries.setdefault(entry, real)
        assert known == real, f"{entry} was {known}, and now is {real}"

    def version(self, real: int) -> int:
        return _of(self.versions, real, UNKNOWN)

    def birth(self, real: str) -> int:
        return _of(self.births, real, UNKNOWN)

    def entry(self, real: str) -> Entry | None:
        return next((entry for entry, name in self.entries.items() if name == real), None)


def _of(names: Mapping[int, object], real: object, unknown: int) -> int:
    return next((number for number, name in names.items() if name == real), unknown)


def units(ucredits: int) -> int:
    assert ucredits % UNIT == 0, f"{ucredits} micro-credits are no sum of what was asked for"
    return ucredits // UNIT
