"""One operation of one store, by name: what `real.py` does to a real one, done to the model."""

from collections.abc import Callable
from typing import Any

from tests.protocol import books_side as sql
from tests.protocol import redis_side as lua
from tests.protocol.faults import evicted, flushed, restarted
from tests.protocol.rules import PROTOCOL, Rules
from tests.protocol.world import Saved, World

SCRIPTS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "admit": lua.admit,
    "extend": lua.extend,
    "settle": lua.settle,
    "renew": lua.renew,
    "orphan": lua.orphan,
    "install": lua.install,
    "applied": lua.applied,
    "lower": lua.lower,
    "confirm": lua.confirm,
}
FUNCTIONS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "read": sql.read,
    "post": sql.post,
    "sweep_hold": sql.sweep_hold,
    "take_hold": sql.take_hold,
    "extend_hold": sql.extend_hold,
    "raise_cap": sql.raise_cap,
    "go_on_after": sql.go_on_after,
    "acknowledge": sql.acknowledge,
    "lower_cap": sql.lower_cap,
    "end_grace": sql.end_grace,
    "top_up": sql.top_up,
}


def perform(world: World, op: tuple[Any, ...], rules: Rules = PROTOCOL) -> tuple[World, Any]:
    """Both stores after `op`, and its reply; what gateways make of it is left out."""
    name, *args = op
    if name in SCRIPTS:
        redis, reply = SCRIPTS[name](world.redis, *args, rules=rules)
        return world._replace(redis=redis), reply
    if name in FUNCTIONS:
        books, reply = FUNCTIONS[name](world.books, *args, rules=rules)
        return world._replace(books=books), reply
    match name:
        case "flushall":
            return world._replace(redis=flushed(world.redis)), None
        case "evict":
            return world._replace(redis=evicted(world.redis)), None
        case "save":
            return world._replace(saved=Saved(*world.redis[2:])), None
        case "restart":
            assert world.saved is not None
            return world._replace(redis=restarted(world.redis, world.saved), saved=None), None
    raise AssertionError(f"no operation {name}")
