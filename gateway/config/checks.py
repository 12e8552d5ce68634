"""Mistakes that show only between sections or files, found in the documents as written.

Working on the plain documents (not on the models) lets them be reported together with everything else that is wrong:
a value of the wrong type is simply not compared here, its own problem is the models' to tell.
"""

from collections.abc import Iterator, Sequence

from gateway.config import rules
from gateway.config.models import WebSocket
from gateway.config.problems import Path, Problem, located, nearest, quoted, unknown
from gateway.config.routes import covers
from gateway.config.sections import Credits, Ejection, HealthCheck, Sessions, Stores, Upstream
from gateway.config.source import Document, Plain
from gateway.config.values import parse_duration


def problem(doc: Document, path: Path, text: str) -> Problem:
    """`text` about `path`, on the line of that key or of the nearest one around it."""
    return Problem(doc.file, doc.lines[nearest(path, doc.lines)], located(path, text))


def gateway(doc: Document, policy_names: Sequence[str] | None) -> Iterator[Problem]:
    """Every broken rule between the sections of gateway.yaml. `policy_names` is None when they cannot be known."""
    yield from _upstreams(doc)
    yield from _routes(doc)
    yield from _plans(doc, policy_names)
    yield from _identity(doc)
    yield from _one_process_for_embedded(doc)
    yield from _times(doc)


def policy(doc: Document) -> Iterator[Problem]:
    """Every broken rule between the limits of one policy file."""
    first_named: dict[str, int] = {}
    for index, limit in enumerate(_list(doc, "limits")):
        path: Path = ("limits", index)
        keys = _keys(limit)
        for mistake in rules.limit_window(keys.get("count"), keys.get("window") is not None or _broken(doc, path)):
            yield _mistake(doc, path, mistake)
        name = keys.get("name")
        if isinstance(name, str) and name in first_named:
            text = f"{quoted(name)} is already the name of the limit on line {first_named[name]}"
            yield problem(doc, (*path, "name"), text)
        elif isinstance(name, str):
            first_named[name] = doc.lines[(*path, "name")]


def policies_together(docs: Sequence[Document]) -> Iterator[Problem]:
    """No two files give the same policy name."""
    first_named: dict[str, Document] = {}
    for doc in docs:
        name = _keys(doc.value).get("policy")
        if isinstance(name, str) and name in first_named:
            first = first_named[name]
            text = f"{quoted(name)} is already the policy of {first.file}:{first.lines[('policy',)]}"
            yield problem(doc, ("policy",), text)
        elif isinstance(name, str):
            first_named[name] = doc


def tokens_are_counted(gateway_doc: Document, policy_docs: Sequence[Document]) -> Iterator[Problem]:
    """A token limit needs a route that reads usage: nothing would ever be counted against it."""
    routes = _list(gateway_doc, "routes")
    if not routes or any(_keys(route).get("usage") not in (None, "none") for route in routes):
        return
    for doc in policy_docs:
        for index, limit in enumerate(_list(doc, "limits")):
            if _keys(limit).get("count") == "tokens":
                text = f"counts tokens, but no route in {gateway_doc.file} says how to read them (usage: openai_chat)"
                yield problem(doc, ("limits", index), text)


def messages_are_counted(gateway_doc: Document, policy_docs: Sequence[Document]) -> Iterator[Problem]:
    """A price for messages needs a route that counts them: nothing would ever be charged."""
    routes = _list(gateway_doc, "routes")
    if not routes or any(_keys(_keys(route).get("websocket")).get("count_messages", False) for route in routes):
        return
    for doc in policy_docs:
        if _keys(_section(doc, "price")).get("per_message") not in (None, 0, "0"):
            text = f"charges nothing: no route in {gateway_doc.file} says websocket: {{ count_messages: true }}"
            yield problem(doc, ("price", "per_message"), text)


def _upstreams(doc: Document) -> Iterator[Problem]:
    for name, upstream in _keys(_section(doc, "upstreams")).items():
        at, keys = ("upstreams", name), _keys(upstream)
        targets = _items(keys.get("targets"))
        mistakes = rules.targets_differ(targets)
        connections_max = _whole(keys, "connections_max", Upstream(targets=("demo",)).connections_max)
        if targets and connections_max is not None:
            mistakes += rules.requests_fit(_whole(keys, "requests_max", None), connections_max, len(targets))
        mistakes += rules.client_certificate(keys.get("client_cert_file"), keys.get("client_key_file"))
        for mistake in mistakes:
            yield _mistake(doc, at, mistake)
        yield from _ejection(doc, (*at, "ejection"), _keys(keys.get("ejection")))
        yield from _health_check(doc, (*at, "health_check"), _keys(keys.get("health_check")))


def _ejection(doc: Document, path: Path, keys: dict[str, Plain]) -> Iterator[Problem]:
    backoff_ms = _duration_ms(keys, "backoff", Ejection().backoff_ms)
    backoff_max_ms = _duration_ms(keys, "backoff_max", Ejection().backoff_max_ms)
    if backoff_ms is not None and backoff_max_ms is not None:
        for mistake in rules.ejection(backoff_ms, backoff_max_ms):
            yield _mistake(doc, path, mistake)


def _health_check(doc: Document, path: Path, keys: dict[str, Plain]) -> Iterator[Problem]:
    default = HealthCheck(path="/")
    timeout_ms = _duration_ms(keys, "timeout", default.timeout_ms)
    interval_ms = _duration_ms(keys, "interval", default.interval_ms)
    if timeout_ms is not None and interval_ms is not None:
        for mistake in rules.health_check(timeout_ms, interval_ms):
            yield _mistake(doc, path, mistake)


def _routes(doc: Document) -> Iterator[Problem]:
    upstreams = _keys(_section(doc, "upstreams"))
    earlier: list[tuple[int, str, frozenset[str]]] = []
    for index, route in enumerate(_list(doc, "routes")):
        keys, at = _keys(route), ("routes", index)
        upstream, path = keys.get("upstream"), keys.get("path")
        if isinstance(upstream, str) and upstreams and upstream not in upstreams:
            yield problem(doc, (*at, "upstream"), unknown("upstream", upstream, list(upstreams)))
        methods = _methods(keys.get("method"))
        if keys.get("websocket") is not None:
            yield from _websocket(doc, at, _keys(keys["websocket"]), methods or frozenset())
        if not isinstance(path, str) or methods is None:
            continue
        shadows = [(i, m) for i, p, m in earlier if covers(p, path) and (not m or not methods or m & methods)]
        taken = frozenset[str]().union(*(m for _, m in shadows))
        if any(not m for _, m in shadows) or (methods and methods <= taken):
            by = " and ".join(f"routes[{i}] on line {doc.lines[('routes', i)]}" for i, _ in shadows)
            yield problem(doc, at, f"can never match: {by} already takes {_spoken(methods)} {path}")
        earlier.append((index, path, methods))


def _websocket(doc: Document, at: Path, keys: dict[str, Plain], methods: frozenset[str]) -> Iterator[Problem]:
    for mistake in rules.websocket_method(methods, True):
        yield _mistake(doc, at, mistake)
    idle_ms = _duration_ms(keys, "idle", WebSocket().idle_ms)
    lifetime_ms = _duration_ms(keys, "lifetime", WebSocket().lifetime_ms)
    if idle_ms is not None and lifetime_ms is not None:
        for mistake in rules.websocket_times(idle_ms, lifetime_ms):
            yield _mistake(doc, (*at, "websocket"), mistake)


def _methods(value: Plain) -> frozenset[str] | None:
    """The methods a route takes, empty for all of them; None when they cannot be read."""
    if value is None:
        return frozenset()
    written = value if isinstance(value, list) else [value]
    names = frozenset(item.upper() for item in written if isinstance(item, str))
    return names if names and len(written) >= len(names) else None


def _spoken(methods: frozenset[str]) -> str:
    return "|".join(sorted(methods)) if methods else "every method of"


def _plans(doc: Document, policy_names: Sequence[str] | None) -> Iterator[Problem]:
    plans = _keys(_section(doc, "plans"))
    for name, plan in plans.items():
        wanted = _keys(plan).get("policy")
        if policy_names is not None and isinstance(wanted, str) and wanted not in policy_names:
            yield problem(doc, ("plans", name, "policy"), unknown("policy", wanted, policy_names))
    for index, kind, source in _sources(doc):
        default = source.get("default_plan")
        if isinstance(default, str) and default and plans and default not in plans:
            path = ("identity", index, kind, "default_plan")
            yield problem(doc, path, unknown("plan", default, list(plans)))


def _sources(doc: Document) -> Iterator[tuple[int, str, dict[str, Plain]]]:
    for index, item in enumerate(_list(doc, "identity")):
        for kind, source in _keys(item).items():
            yield index, kind, _keys(source)


def _identity(doc: Document) -> Iterator[Problem]:
    for index, kind, source in _sources(doc):
        path: Path = ("identity", index, kind)
        if kind == "jwt":
            keys = _items(source.get("keys"))
            for position, key in enumerate(keys):
                if isinstance(key, dict) and not _broken(doc, (*path, "keys", position)):
                    for mistake in rules.jwt_key(key):
                        yield _mistake(doc, (*path, "keys", position), mistake)
            for mistake in rules.jwt_algorithms([_keys(key) for key in keys], _items(source.get("algorithms"))):
                yield _mistake(doc, path, mistake)
        if kind == "trusted_header":
            networks = [n for n in _items(source.get("from")) if isinstance(n, str) and n.endswith("/0")]
            for mistake in rules.trusts_everybody(networks):
                yield _mistake(doc, path, mistake)
        if kind in ("jwt", "trusted_header") and source and not _broken(doc, path):
            for mistake in rules.plan_known(source.get("plan"), source.get("default_plan")):
                yield _mistake(doc, path, mistake)


def _one_process_for_embedded(doc: Document) -> Iterator[Problem]:
    workers = _whole(_keys(_section(doc, "listen")), "workers", 1)
    if workers is None or workers <= 1:
        return
    stores, defaults = _keys(_section(doc, "stores")), Stores()
    written = {"redis": stores.get("redis", defaults.redis), "postgres": stores.get("postgres", defaults.postgres)}
    embedded = [name for name, value in written.items() if value == "embedded"]
    if embedded:
        text = f"more than one worker needs a shared server: set the URL of {' and '.join(embedded)} under stores"
        yield problem(doc, ("listen", "workers"), text)


def _times(doc: Document) -> Iterator[Problem]:
    credits, sessions = _keys(_section(doc, "credits")), _keys(_section(doc, "sessions"))
    heartbeat_ms = _duration_ms(credits, "heartbeat", Credits().heartbeat_ms)
    lease_ms = _duration_ms(credits, "lease", Credits().lease_ms)
    if heartbeat_ms is not None and lease_ms is not None:
        for mistake in rules.heartbeat(heartbeat_ms, lease_ms):
            yield _mistake(doc, ("credits",), mistake)
    ttl_ms = _duration_ms(sessions, "ttl", Sessions().ttl_ms)
    absolute_ttl_ms = _duration_ms(sessions, "absolute_ttl", Sessions().absolute_ttl_ms)
    if ttl_ms is not None and absolute_ttl_ms is not None:
        for mistake in rules.session_ttl(ttl_ms, absolute_ttl_ms):
            yield _mistake(doc, ("sessions",), mistake)
    signing_key = sessions.get("signing_key")
    for mistake in rules.signing_key(signing_key if isinstance(signing_key, str) and signing_key else None):
        yield _mistake(doc, ("sessions",), mistake)


def _mistake(doc: Document, path: Path, mistake: rules.Mistake) -> Problem:
    return problem(doc, (*path, mistake.field) if mistake.field else path, mistake.text)


def _whole(section: dict[str, Plain], key: str, default: int | None) -> int | None:
    value = section.get(key, default)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value[:9])
    return value if isinstance(value, int) else None


def _duration_ms(section: dict[str, Plain], key: str, default_ms: int) -> int | None:
    value = section.get(key)
    if key not in section:
        return default_ms
    try:
        return parse_duration(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _broken(doc: Document, below: Path) -> bool:
    """Some value at or below this path could not be read, so what is missing there may be written after all."""
    return any(path[: len(below)] == below for path in doc.broken)


def _section(doc: Document, key: str) -> Plain:
    return _keys(doc.value).get(key)


def _list(doc: Document, key: str) -> list[Plain]:
    return _items(_section(doc, key))


def _keys(value: Plain) -> dict[str, Plain]:
    return value if isinstance(value, dict) else {}


def _items(value: Plain) -> list[Plain]:
    return value if isinstance(value, list) else []
