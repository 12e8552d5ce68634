"""Mistakes in limits, found in the documents as written: within one limit, and where it could never count anything.

A limit that nothing ever counts against is worse than none, because somebody believes in it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.config import rules
from gateway.config.limit_rules import TOKEN_COUNTS, limit
from gateway.config.limit_values import is_claim
from gateway.config.models import ApiKeySource, JwtSource
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
    words_of,
)
from gateway.config.price_checks import by_token
from gateway.config.problems import Path, Problem, quoted, unknown
from gateway.config.routes import overlaps
from gateway.config.source import Document, Plain


@dataclass(frozen=True, slots=True)
class _Written:
    """One limit where it stands."""

    doc: Document
    path: Path
    keys: dict[str, Plain]

    @property
    def when(self) -> dict[str, Plain]:
        return mapping_of(self.keys.get("when"))

    def words(self, key: str) -> list[tuple[Path, str]]:
        """What `when` says of `key`, each with its place."""
        return words_of(self.when.get(key), (*self.path, "when", key))

    def per(self) -> list[tuple[Path, str]]:
        return words_of(self.keys.get("per"), (*self.path, "per"))


@dataclass(frozen=True, slots=True)
class _Route:
    path: str
    #: Empty: all.
    methods: frozenset[str]
    reads_bodies: bool


def limits(gateway_doc: Document, policy_docs: Sequence[Document]) -> Iterator[Problem]:
    """Every broken rule of every limit, in policies and shared, and between them and the rest."""
    shared = _written(gateway_doc, "shared_limits")
    shared_names: dict[str, int] = {}
    yield from _names(shared, shared_names)
    for doc in policy_docs:
        written = _written(doc, "limits")
        yield from _names(written, {})
        for one in written:
            name = one.keys.get("name")
            if isinstance(name, str) and name in shared_names:
                first = f"{gateway_doc.file}:{shared_names[name]}"
                text = f"{quoted(name)} is already the name of the shared limit at {first}"
                yield problem(doc, (*one.path, "name"), text)
            yield from _limit(gateway_doc, one)
            yield from _price(one)
    for one in shared:
        yield from _limit(gateway_doc, one)
        if policy_docs and one.keys.get("count") == "credits" and not any(_prices(doc) for doc in policy_docs):
            text = "counts credits, but no policy charges any (price: { per_request: 1 })"
            yield problem(gateway_doc, one.path, text)


def _written(doc: Document, key: str) -> list[_Written]:
    return [_Written(doc, (key, index), mapping_of(item)) for index, item in enumerate(listed(doc, key))]


def _names(one_list: list[_Written], first_named: dict[str, int]) -> Iterator[Problem]:
    """No name twice; `first_named` is filled with the line of each."""
    for one in one_list:
        name = one.keys.get("name")
        if isinstance(name, str) and name in first_named:
            text = f"{quoted(name)} is already the name of the limit on line {first_named[name]}"
            yield problem(one.doc, (*one.path, "name"), text)
        elif isinstance(name, str):
            first_named[name] = one.doc.lines[(*one.path, "name")]


def _limit(gateway_doc: Document, one: _Written) -> Iterator[Problem]:
    yield from _keys(one)
    yield from _plans(gateway_doc, one)
    yield from _routes(gateway_doc, one)
    yield from _identities(gateway_doc, one)


def _keys(one: _Written) -> Iterator[Problem]:
    if "<<" in one.keys:
        return
    written = {key for key, value in one.keys.items() if value is not None or is_broken(one.doc, (*one.path, key))}
    values: dict[str, object] = {
        "count": one.keys.get("count"),
        "limit": whole_of(one.keys, "limit", None),
        "burst": whole_of(one.keys, "burst", None),
        "algorithm": one.keys.get("algorithm", "sliding"),
        "window": duration_ms_of(one.keys, "window", None),
        "per": tuple(word.lower() if word.startswith("header:") else word for _, word in one.per()),
    }
    if "per" not in written:
        values["per"] = ("org",) if one.path[0] == "limits" else ()
    elif is_broken(one.doc, (*one.path, "per")):
        del values["per"]
    for mistake in limit(values, written, shared=one.path[0] == "shared_limits"):
        yield mistaken(one.doc, one.path, mistake)


def _plans(gateway_doc: Document, one: _Written) -> Iterator[Problem]:
    plans = mapping_of(section(gateway_doc, "plans"))
    own = mapping_of(one.doc.value).get("policy")
    for path, name in one.words("plan"):
        if plans and name not in plans:
            yield problem(one.doc, path, unknown("plan", name, list(plans)))
            continue
        policy = mapping_of(plans.get(name)).get("policy")
        if one.path[0] == "limits" and isinstance(own, str) and isinstance(policy, str) and own != policy:
            text = f"never holds: the plan {quoted(name)} lives under the policy {quoted(policy)}"
            yield problem(one.doc, path, text)


def _routes(gateway_doc: Document, one: _Written) -> Iterator[Problem]:
    """The limit can meet some route, and one whose body is read when it needs what stands there."""
    routes = _readable_routes(gateway_doc)
    if not routes:
        return
    patterns = [(path, text) for path, text in one.words("route") if re.fullmatch(rules.ROUTE_PATH, text, re.ASCII)]
    for path, text in patterns:
        if not any(overlaps(text, route.path) for route in routes):
            yield problem(one.doc, path, unknown("route", text, sorted({route.path for route in routes})))
    if len(patterns) < len(one.words("route")) or is_broken(one.doc, (*one.path, "when")):
        return
    met = [route for route in routes if not patterns or any(overlaps(text, route.path) for _, text in patterns)]
    methods = methods_of(one.when.get("method"))
    if not met or methods is None:
        return
    met_with_method = [route for route in met if not methods or not route.methods or methods & route.methods]
    if not met_with_method:
        text = f"no route that this limit could meet takes {' or '.join(sorted(methods))}"
        yield problem(one.doc, (*one.path, "when", "method"), text)
    elif not any(route.reads_bodies for route in met_with_method):
        yield from _unread(gateway_doc, one, len(met_with_method) == len(routes))


def _unread(gateway_doc: Document, one: _Written, all_routes: bool) -> Iterator[Problem]:
    """What of the limit needs a body that is read on none of the routes it could meet."""
    no_route = f"no route in {gateway_doc.file}" if all_routes else "no route that this limit could meet"
    count = one.keys.get("count")
    if count in TOKEN_COUNTS:
        spoken = str(count).replace("_", " ")
        text = f"counts {spoken}, but {no_route} says how to read them (usage: openai_chat)"
        yield problem(one.doc, one.path, text)
    # Without a body there is no model, which fits '*' alone, and no wish for a stream.
    models, stream = [text for _, text in one.words("model")], one.when.get("stream")
    answers = {"model": "always" if "*" in models else "never" if models else None}
    answers["stream"] = None if stream is None else "always" if stream in (False, "false") else "never"
    for key, answer in answers.items():
        if answer is not None:
            text = f"{answer} holds: {no_route} reads bodies, where {key} stands (usage: openai_chat)"
            yield problem(one.doc, (*one.path, "when", key), text)
    for path, word in one.per():
        if word == "model":
            text = f"nobody knows the model: {no_route} reads bodies, where it stands (usage: openai_chat)"
            yield problem(one.doc, path, text)


def _readable_routes(gateway_doc: Document) -> list[_Route]:
    """Every route; none at all when one of them cannot be read, because it could be the one that is meant."""
    found: list[_Route] = []
    for item in listed(gateway_doc, "routes"):
        keys = mapping_of(item)
        path, methods = keys.get("path"), methods_of(keys.get("method"))
        if not isinstance(path, str) or methods is None:
            return []
        found.append(_Route(path, methods, keys.get("usage") not in (None, "none")))
    return [] if is_broken(gateway_doc, ("routes",)) else found


def _identities(gateway_doc: Document, one: _Written) -> Iterator[Problem]:
    """Claims come from JWT sources alone; and what a source takes for a credential is nothing to count by."""
    sources = [source for item in listed(gateway_doc, "identity") for source in mapping_of(item).items()]
    if not sources or is_broken(gateway_doc, ("identity",)):
        return
    for path, word in one.per():
        kind, _, name = word.partition(":")
        if is_claim(word) and not any(source == "jwt" for source, _ in sources):
            yield problem(one.doc, path, f"nobody has claims: no source in {gateway_doc.file} is a jwt")
        elif kind == "header" and name.lower() in _credential_fields(sources):
            text = f"{quoted(name)} carries a credential: to count each of them on its own, write 'key'"
            yield problem(one.doc, path, text)


def _credential_fields(sources: list[tuple[str, Plain]]) -> set[str]:
    fields: set[str] = set()
    for kind, source in sources:
        keys = mapping_of(source)
        if kind == "api_key":
            written = items_of(keys.get("headers")) or list(ApiKeySource.model_fields["headers"].default)
            fields |= {name.lower() for name in written if isinstance(name, str)}
        elif kind == "jwt":
            fields.add(str(keys.get("header", JwtSource.model_fields["header"].default)).lower())
    return fields


def _price(one: _Written) -> Iterator[Problem]:
    """A limit on credits needs a price, and room for it."""
    if one.keys.get("count") != "credits":
        return
    prices = _prices(one.doc)
    if not prices:
        text = "counts credits, but its policy charges none (price: { per_request: 1 })"
        yield problem(one.doc, one.path, text)
        return
    key = "burst" if one.keys.get("algorithm") == "gcra" else "limit"
    most = whole_of(one.keys, key, None)
    if most is not None and 0 < most < min(prices):
        text = f"admits nothing: the cheapest request costs {min(prices)} credits"
        yield problem(one.doc, (*one.path, key), text)


def _prices(doc: Document) -> list[int]:
    """What something costs under this policy at least, where it is more than nothing; what cannot be read, and what
    is charged by the token, counts as 1."""
    if is_broken(doc, ("price",)):
        return [1]
    price = mapping_of(section(doc, "price"))
    models = [mapping_of(item) for item in items_of(price.get("models"))]
    flat = [whole_of(price, "per_message", 0), *(whole_of(one, "per_request", 0) for one in (price, *models))]
    some = [1 if cost is None else cost for cost in flat if cost != 0]
    return [*some, 1] if by_token(price) else some
