"""Mistakes that show only between sections or files, found in the documents as written.

Working on the plain documents (not on the models) lets them be reported together with everything else that is wrong:
a value of the wrong type is simply not compared here, its own problem is the models' to tell.
"""

from collections.abc import Iterator, Sequence

from gateway.config import rules
from gateway.config.models import Plan, WebSocket
from gateway.config.plain import (
    duration_ms_of,
    is_broken,
    items_of,
    listed,
    mapping_of,
    methods_of,
    mistaken,
    problem,
    section,
    whole_of,
)
from gateway.config.problems import Path, Problem, quoted, unknown
from gateway.config.routes import covers
from gateway.config.sections import Credits, Ejection, HealthCheck, Sessions, Stores, Upstream
from gateway.config.source import Document, Plain


def gateway(doc: Document, policy_names: Sequence[str] | None) -> Iterator[Problem]:
    """Every broken rule between the sections of gateway.yaml. `policy_names` is None when they cannot be known."""
    yield from _upstreams(doc)
    yield from _routes(doc)
    yield from _plans(doc, policy_names)
    yield from _identity(doc)
    yield from _one_process_for_embedded(doc)
    yield from _times(doc)


def policies_together(docs: Sequence[Document]) -> Iterator[Problem]:
    """No two files give the same policy name."""
    first_named: dict[str, Document] = {}
    for doc in docs:
        name = mapping_of(doc.value).get("policy")
        if isinstance(name, str) and name in first_named:
            first = first_named[name]
            text = f"{quoted(name)} is already the policy of {first.file}:{first.lines[('policy',)]}"
            yield problem(doc, ("policy",), text)
        elif isinstance(name, str):
            first_named[name] = doc


def _upstreams(doc: Document) -> Iterator[Problem]:
    for name, upstream in mapping_of(section(doc, "upstreams")).items():
        at, keys = ("upstreams", name), mapping_of(upstream)
        targets = items_of(keys.get("targets"))
        mistakes = rules.targets_differ(targets)
        connections_max = whole_of(keys, "connections_max", Upstream(targets=("demo",)).connections_max)
        if targets and connections_max is not None:
            mistakes += rules.requests_fit(whole_of(keys, "requests_max", None), connections_max, len(targets))
        mistakes += rules.client_certificate(keys.get("client_cert_file"), keys.get("client_key_file"))
        for mistake in mistakes:
            yield mistaken(doc, at, mistake)
        yield from _ejection(doc, (*at, "ejection"), mapping_of(keys.get("ejection")))
        yield from _health_check(doc, (*at, "health_check"), mapping_of(keys.get("health_check")))


def _ejection(doc: Document, path: Path, keys: dict[str, Plain]) -> Iterator[Problem]:
    backoff_ms = duration_ms_of(keys, "backoff", Ejection().backoff_ms)
    backoff_max_ms = duration_ms_of(keys, "backoff_max", Ejection().backoff_max_ms)
    if backoff_ms is not None and backoff_max_ms is not None:
        for mistake in rules.ejection(backoff_ms, backoff_max_ms):
            yield mistaken(doc, path, mistake)


def _health_check(doc: Document, path: Path, keys: dict[str, Plain]) -> Iterator[Problem]:
    default = HealthCheck(path="/")
    timeout_ms = duration_ms_of(keys, "timeout", default.timeout_ms)
    interval_ms = duration_ms_of(keys, "interval", default.interval_ms)
    if timeout_ms is not None and interval_ms is not None:
        for mistake in rules.health_check(timeout_ms, interval_ms):
            yield mistaken(doc, path, mistake)


def _routes(doc: Document) -> Iterator[Problem]:
    upstreams = mapping_of(section(doc, "upstreams"))
    earlier: list[tuple[int, str, frozenset[str]]] = []
    for index, route in enumerate(listed(doc, "routes")):
        keys, at = mapping_of(route), ("routes", index)
        upstream, path = keys.get("upstream"), keys.get("path")
        if isinstance(upstream, str) and upstreams and upstream not in upstreams:
            yield problem(doc, (*at, "upstream"), unknown("upstream", upstream, list(upstreams)))
        methods = methods_of(keys.get("method"))
        if keys.get("websocket") is not None:
            yield from _websocket(doc, at, mapping_of(keys["websocket"]), methods or frozenset())
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
        yield mistaken(doc, at, mistake)
    idle_ms = duration_ms_of(keys, "idle", WebSocket().idle_ms)
    lifetime_ms = duration_ms_of(keys, "lifetime", WebSocket().lifetime_ms)
    if idle_ms is not None and lifetime_ms is not None:
        for mistake in rules.websocket_times(idle_ms, lifetime_ms):
            yield mistaken(doc, (*at, "websocket"), mistake)


def _spoken(methods: frozenset[str]) -> str:
    return "|".join(sorted(methods)) if methods else "every method of"


def _plans(doc: Document, policy_names: Sequence[str] | None) -> Iterator[Problem]:
    plans = mapping_of(section(doc, "plans"))
    for name, plan in plans.items():
        keys, at = mapping_of(plan), ("plans", name)
        written = {key for key, value in keys.items() if value is not None or is_broken(doc, (*at, key))}
        for mistake in rules.plan_grant(keys.get("grant", Plan.model_fields["grant"].default), written):
            yield mistaken(doc, at, mistake)
        wanted = keys.get("policy")
        if policy_names is not None and isinstance(wanted, str) and wanted not in policy_names:
            yield problem(doc, ("plans", name, "policy"), unknown("policy", wanted, policy_names))
    for index, kind, source in _sources(doc):
        default = source.get("default_plan")
        if isinstance(default, str) and default and plans and default not in plans:
            path = ("identity", index, kind, "default_plan")
            yield problem(doc, path, unknown("plan", default, list(plans)))


def _sources(doc: Document) -> Iterator[tuple[int, str, dict[str, Plain]]]:
    for index, item in enumerate(listed(doc, "identity")):
        for kind, source in mapping_of(item).items():
            yield index, kind, mapping_of(source)


def _identity(doc: Document) -> Iterator[Problem]:
    for index, kind, source in _sources(doc):
        path: Path = ("identity", index, kind)
        if kind == "jwt":
            keys = items_of(source.get("keys"))
            for position, key in enumerate(keys):
                if isinstance(key, dict) and not is_broken(doc, (*path, "keys", position)):
                    for mistake in rules.jwt_key(key):
                        yield mistaken(doc, (*path, "keys", position), mistake)
            for mistake in rules.jwt_algorithms([mapping_of(key) for key in keys], items_of(source.get("algorithms"))):
                yield mistaken(doc, path, mistake)
        if kind == "trusted_header":
            networks = [n for n in items_of(source.get("from")) if isinstance(n, str) and n.endswith("/0")]
            for mistake in rules.trusts_everybody(networks):
                yield mistaken(doc, path, mistake)
        if kind in ("jwt", "trusted_header") and source and not is_broken(doc, path):
            for mistake in rules.plan_known(source.get("plan"), source.get("default_plan")):
                yield mistaken(doc, path, mistake)


def _one_process_for_embedded(doc: Document) -> Iterator[Problem]:
    workers = whole_of(mapping_of(section(doc, "listen")), "workers", 1)
    if workers is None or workers <= 1:
        return
    stores, defaults = mapping_of(section(doc, "stores")), Stores()
    written = {"redis": stores.get("redis", defaults.redis), "postgres": stores.get("postgres", defaults.postgres)}
    embedded = [name for name, value in written.items() if value == "embedded"]
    if embedded:
        text = f"more than one worker needs a shared server: set the URL of {' and '.join(embedded)} under stores"
        yield problem(doc, ("listen", "workers"), text)


def _times(doc: Document) -> Iterator[Problem]:
    credits, sessions = mapping_of(section(doc, "credits")), mapping_of(section(doc, "sessions"))
    heartbeat_ms = duration_ms_of(credits, "heartbeat", Credits().heartbeat_ms)
    lease_ms = duration_ms_of(credits, "lease", Credits().lease_ms)
    if heartbeat_ms is not None and lease_ms is not None:
        for mistake in rules.heartbeat(heartbeat_ms, lease_ms):
            yield mistaken(doc, ("credits",), mistake)
    ttl_ms = duration_ms_of(sessions, "ttl", Sessions().ttl_ms)
    absolute_ttl_ms = duration_ms_of(sessions, "absolute_ttl", Sessions().absolute_ttl_ms)
    if ttl_ms is not None and absolute_ttl_ms is not None:
        for mistake in rules.session_ttl(ttl_ms, absolute_ttl_ms):
            yield mistaken(doc, ("sessions",), mistake)
    signing_key = sessions.get("signing_key")
    for mistake in rules.signing_key(signing_key if isinstance(signing_key, str) and signing_key else None):
        yield mistaken(doc, ("sessions",), mistake)
