"""Samples into the tables of README.md: medians, ranges, and comparisons with what was measured in the same round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Sample:
    """One row in one round. CPU is in microseconds per request, or per event of a stream."""

    cpu_us: float
    redis_us: float
    postgres_us: float
    per_second: float
    p50_ms: float
    p99_ms: float
    bad: int


#: By the name of the row, one sample a round.
Samples = Mapping[str, Sequence[Sample]]


def cost(samples: Samples, unit: str, bases: Sequence[str]) -> str:
    """A Markdown table of CPU time, one line per row. bases: the rows that ratios are taken against."""
    columns = ["row", f"CPU µs/{unit}", "[min..max]", *(f"× {base}" for base in bases), f"{unit}s/s"]
    columns += ["p50 ms", "p99 ms", "Redis µs", "PostgreSQL µs", "bad"]
    lines = []
    for name, rounds in samples.items():
        ratios = ["" if name == base else _compared(rounds, samples[base], _ratio, ".2f") for base in bases]
        stores = (median(one.redis_us for one in rounds), median(one.postgres_us for one in rounds))
        lines.append(
            [
                name,
                f"**{median(one.cpu_us for one in rounds):.0f}**",
                f"{min(one.cpu_us for one in rounds):.0f}..{max(one.cpu_us for one in rounds):.0f}",
                *ratios,
                f"{median(one.per_second for one in rounds):.0f}",
                f"{median(one.p50_ms for one in rounds):.2f}",
                f"{median(one.p99_ms for one in rounds):.2f}",
                *(f"{spent_us:.0f}" if spent_us >= 0.5 else "" for spent_us in stores),  # less is background noise
                str(sum(one.bad for one in rounds)),
            ]
        )
    return _table(columns, lines)


def delay(samples: Samples, direct: str) -> str:
    """A Markdown table of what each row adds to the time that an event is under way to the row `direct`."""
    lines = [
        [
            name,
            _compared(rounds, samples[direct], lambda one, other: one.p50_ms - other.p50_ms, "+.2f"),
            _compared(rounds, samples[direct], lambda one, other: one.p99_ms - other.p99_ms, "+.2f"),
        ]
        for name, rounds in samples.items()
        if name != direct
    ]
    return _table(["row", "added p50 ms", "added p99 ms"], lines)


def _ratio(one: Sample, other: Sample) -> float:
    return one.cpu_us / other.cpu_us


def _compared(
    rounds: Sequence[Sample], base: Sequence[Sample], compare: Callable[[Sample, Sample], float], form: str
) -> str:
    """Paired: each round against the same round of `base`, because rounds differ more than rows within one."""
    found = [compare(one, other) for one, other in zip(rounds, base, strict=True)]
    return f"{median(found):{form}} [{min(found):{form}}..{max(found):{form}}]"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
