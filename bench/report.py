"""Samples into the tables of README.md: medians, ranges, and ratios of what was measured in the same round."""

from collections.abc import Mapping, Sequence
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


Samples = Mapping[str, Sequence[Sample]]


def table(samples: Samples, unit: str, base: str | None) -> str:
    """A Markdown table, one line per row. base: the row that ratios are taken against; None leaves them out."""
    lines = [
        f"| row | CPU µs/{unit} | [min..max] | × {base or '-'} | {unit}s/s | p50 ms | p99 ms "
        f"| Redis µs | PostgreSQL µs | bad |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rounds in samples.items():
        cells = [
            name,
            f"**{median(one.cpu_us for one in rounds):.0f}**",
            f"{min(one.cpu_us for one in rounds):.0f}..{max(one.cpu_us for one in rounds):.0f}",
            _ratio(rounds, samples[base]) if base is not None and base != name else "",
            f"{median(one.per_second for one in rounds):.0f}",
            f"{median(one.p50_ms for one in rounds):.2f}",
            f"{median(one.p99_ms for one in rounds):.2f}",
            _store(median(one.redis_us for one in rounds)),
            _store(median(one.postgres_us for one in rounds)),
            str(sum(one.bad for one in rounds)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(rounds: Sequence[Sample], base: Sequence[Sample]) -> str:
    """Paired: each round against the same round of `base`, because rounds differ more than rows within one."""
    ratios = [one.cpu_us / other.cpu_us for one, other in zip(rounds, base, strict=True)]
    return f"{median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]"


def _store(cpu_us: float) -> str:
    """Below half a microsecond is background noise of a store nobody asked."""
    return f"{cpu_us:.0f}" if cpu_us >= 0.5 else ""
