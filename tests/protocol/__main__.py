"""python -m tests.protocol [--full]: what was searched and what came of it, as a table."""

import sys
import time

from tests.protocol.rules import PROTOCOL, Rules, Scope
from tests.protocol.scopes import LARGE, MUTANTS, OPTIMISTIC, SCOPES
from tests.protocol.search import Found, search


def timed(scope: Scope, rules: Rules = PROTOCOL) -> tuple[Found, float]:
    began = time.perf_counter()
    found = search(scope, rules)
    return found, time.perf_counter() - began


def main() -> None:
    total = 0
    print("| scope | states | transitions | at rest | result | s |\n|---|---|---|---|---|---|")  # noqa: T201
    for scope in (*SCOPES, *OPTIMISTIC, *(LARGE if "--full" in sys.argv else ())):
        found, took_s = timed(scope)
        total += found.states
        result = found.problem or ("cut off" if found.cut else "all hold")
        figures = f"{found.states:,} | {found.transitions:,} | {found.at_rest:,}"
        print(f"| {scope.name} | {figures} | {result} | {took_s:.1f} |", flush=True)  # noqa: T201
    print("\n| mutant | scope | states | steps | caught by | s |\n|---|---|---|---|---|---|")  # noqa: T201
    for mutant in MUTANTS:
        found, took_s = timed(mutant.scope, mutant.rules)
        total += found.states
        figures = f"{found.states:,} | {len(found.trace)} | {found.problem or 'nothing'}"
        print(f"| {mutant.name} | {mutant.scope.name} | {figures} | {took_s:.1f} |", flush=True)  # noqa: T201
    print(f"\n{total:,} states")  # noqa: T201


main()
