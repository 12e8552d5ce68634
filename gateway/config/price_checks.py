"""Mistakes in prices, found in the documents as written: what would never be charged, and what nothing could fit.

A price that is never charged is worse than none, because somebody believes in it.
"""

from collections.abc import Iterator, Sequence

from gateway.config.plain import is_broken, items_of, listed, mapping_of, problem, section, words_of
from gateway.config.problems import Path, Problem, quoted
from gateway.config.source import Document, Plain

RATES = ("per_million_input_tokens", "per_million_output_tokens")
_EVERY_MODEL = "*"


def prices(gateway_doc: Document, policy_docs: Sequence[Document]) -> Iterator[Problem]:
    """Every broken rule of every price, and between prices and routes."""
    routes = [mapping_of(route) for route in listed(gateway_doc, "routes")]
    for doc in policy_docs:
        yield from _models(doc)
        if routes and not is_broken(gateway_doc, ("routes",)):
            yield from _charged(gateway_doc, routes, doc)
    yield from _held_to_a_maximum(gateway_doc, policy_docs)


def costs_something(value: Plain) -> bool:
    """What is written for a price is not nothing; what cannot be read may be anything."""
    try:
        return value is not None and float(str(value)) != 0
    except ValueError:
        return True


def by_token(price: dict[str, Plain]) -> list[Path]:
    """Where below `price` something is charged by the token."""
    own: list[Path] = [(rate,) for rate in RATES if costs_something(price.get(rate))]
    models = enumerate(map(mapping_of, items_of(price.get("models"))))
    return own + [
        ("models", index, rate) for index, model in models for rate in RATES if costs_something(model.get(rate))
    ]


def _charged(gateway_doc: Document, routes: list[dict[str, Plain]], doc: Document) -> Iterator[Problem]:
    """Messages have to be counted, and tokens read, on some route."""
    price = mapping_of(section(doc, "price"))
    counted = any(mapping_of(route.get("websocket")).get("count_messages", False) for route in routes)
    if costs_something(price.get("per_message")) and not counted:
        text = f"charges nothing: no route in {gateway_doc.file} says websocket: {{ count_messages: true }}"
        yield problem(doc, ("price", "per_message"), text)
    if any(route.get("usage") not in (None, "none") for route in routes):
        return
    for path in by_token(price):
        text = f"charges nothing: no route in {gateway_doc.file} says how to read tokens (usage: openai_chat)"
        yield problem(doc, ("price", *path), text)
    if items_of(price.get("models")) and not by_token(price):
        text = f"nobody knows the model: no route in {gateway_doc.file} reads bodies (usage: openai_chat)"
        yield problem(doc, ("price", "models"), text)


def _models(doc: Document) -> Iterator[Problem]:
    price = mapping_of(section(doc, "price"))
    models, at = items_of(price.get("models")), ("price", "models")
    unknown = price.get("unknown_model")
    if unknown in ("deny", "free") and not models and not is_broken(doc, at):
        text = "decides nothing: no model has a price of its own (models: [{ model: ..., per_request: ... }])"
        yield problem(doc, ("price", "unknown_model"), text)
    first: dict[str, int] = {}
    for index, item in enumerate(models):
        globs = words_of(mapping_of(item).get("model"), (*at, index, "model"))
        for path, glob in globs:
            earlier = first.get(_EVERY_MODEL, first.get(glob))
            if earlier is not None and earlier != index:
                by = f"models[{earlier}] on line {doc.lines[(*at, earlier)]}"
                yield problem(doc, path, f"can never match: {by} already fits {quoted(glob)}")
            first.setdefault(glob, index)
    if unknown in ("deny", "free") and _EVERY_MODEL in first:
        by = f"models[{first[_EVERY_MODEL]}] on line {doc.lines[(*at, first[_EVERY_MODEL])]}"
        yield problem(doc, ("price", "unknown_model"), f"decides nothing: {by} fits every model")


def _held_to_a_maximum(gateway_doc: Document, policy_docs: Sequence[Document]) -> Iterator[Problem]:
    priced = [mapping_of(section(doc, "price")) for doc in policy_docs]
    output_costs = any(path[-1] == RATES[1] for price in priced for path in by_token(price))
    unread = any(is_broken(doc, ("price",)) for doc in policy_docs)
    for index, item in enumerate(listed(gateway_doc, "routes")):
        route, at = mapping_of(item), ("routes", index, "enforce_max_tokens")
        if route.get("enforce_max_tokens") != "inject":
            continue
        if route.get("usage") in (None, "none"):
            text = "changes nothing: nobody reads the bodies of this route (usage: openai_chat)"
            yield problem(gateway_doc, at, text)
        elif policy_docs and not output_costs and not unread:
            text = "changes nothing: no policy charges for output (price: { per_million_output_tokens: 1 })"
            yield problem(gateway_doc, at, text)
