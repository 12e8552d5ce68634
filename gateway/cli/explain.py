"""`gateway explain`: what a request would meet, or what one has met."""

import asyncio
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote_to_bytes

import typer

from gateway import keys
from gateway.admission import Hold
from gateway.cli.credits import working_set
from gateway.cli.explained import print_prospect, prospect_json
from gateway.cli.invocation import Invocation, JsonOption, Ledger, invocation, open_ledger, open_redis
from gateway.cli.limits_show import overrides_of, plan_of
from gateway.cli.output import emit_json, remark, say
from gateway.cli.replay import UnreadableLog
from gateway.errors import GatewayError, StoreUnavailable
from gateway.identity import Powers, open_identity
from gateway.identity.api_key import key_loader
from gateway.insight.logline import Line, Reading, read
from gateway.insight.peeking import peek
from gateway.insight.story import Story, tell
from gateway.insight.verdict import Prospect, find_route, judge, look
from gateway.ledger.orgs import BadInput, check_org, get_balance
from gateway.policy import claims_needed
from gateway.stores import Redis
from gateway.types import Facts, HeaderList, LimitState, Principal, Refusal
from gateway.upstream import Upstreams

FETCH_TIMEOUT_MS = 5_000
JWKS_BYTES_MAX = 1 << 20
CREDENTIAL_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 1 << 30
#: Lines of one request id that are told.
STORIES_MAX = 10
STDIN = "-"


def explain(
    ctx: typer.Context,
    method: Annotated[str | None, typer.Argument(metavar="METHOD", show_default=False)] = None,
    path: Annotated[
        str | None, typer.Argument(metavar="PATH", help="With its query, as a client writes it.", show_default=False)
    ] = None,
    org: Annotated[str | None, typer.Option(help="Whose request; no credential is needed.", show_default=False)] = None,
    plan: Annotated[str | None, typer.Option(help="The org's plan, else its own.", show_default=False)] = None,
    user: Annotated[str | None, typer.Option(help="The user of --org.", show_default=False)] = None,
    key: Annotated[str | None, typer.Option(help="The id of an API key of --org.", show_default=False)] = None,
    claim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A claim of --org's token.", show_default=False)
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="A file with an API key or a token, in place of --org.", show_default=False)
    ] = None,
    key_stdin: Annotated[bool, typer.Option("--key-stdin", help="The same from standard input.")] = False,
    header: Annotated[
        list[str] | None, typer.Option("-H", "--header", metavar="'NAME: VALUE'", help="A header field.")
    ] = None,
    body: Annotated[
        str | None, typer.Option(metavar="FILE", help="The request's body; - is standard input.", show_default=False)
    ] = None,
    client_ip: Annotated[str, typer.Option(help="Where it comes from.")] = "127.0.0.1",
    request_id: Annotated[
        str | None, typer.Option(help="Explain a request that happened, from --log.", show_default=False)
    ] = None,
    log: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="An access log, also .gz; - is standard input.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain what a request would meet now: route, policy, limits, tokens, price, and what the gateway would answer.

    Nothing is taken of any limit and nothing is forwarded. With --request-id and --log it explains a request that
    happened, from its line in the access log alone.
    """
    if request_id is not None or log is not None:
        if request_id is None or not log or method is not None:
            raise typer.BadParameter("--request-id and --log go together, and without METHOD and PATH")
        _tell(request_id, log, as_json)
        return
    if method is None or path is None:
        raise typer.BadParameter("say METHOD and PATH, or --request-id and --log")
    if key_stdin and body == STDIN:
        raise typer.BadParameter("standard input has either the credential or the body")
    fields = _fields(header or [])
    given = _credential(key_file, key_stdin)
    if given is not None:
        if org is not None:
            raise typer.BadParameter("a credential says itself whose it is: leave --org out")
        fields = (*fields, (b"authorization", b"Bearer " + given))
    claims = dict(_pair(text) for text in claim or [])
    named = None if org is None else Principal(org, plan or "", user, key, source="none", claims=claims)
    facts = _facts(method.upper(), path, fields, client_ip)
    asyncio.run(_explain(invocation(ctx), facts, named, _body(body), as_json))


async def _explain(
    invoked: Invocation, facts: Facts, named: Principal | None, body: bytes | None, as_json: bool
) -> None:
    prospect = Prospect(facts)
    async with open_ledger(invoked) as ledger, open_redis(ledger.settings) as redis:
        find_route(ledger.settings, prospect)
        states: dict[str, LimitState] = {}
        refusal, owned, held = prospect.refusal, None, 0
        if refusal is None:
            who = await _who(ledger, facts, named)
            if isinstance(who, Refusal):
                refusal = who
            else:
                look(ledger.settings, prospect, who, await overrides_of(ledger, who.org_id), body)
                shared, own = await _peek(redis, who.org_id, prospect)
                states = {state.limit.name: state for hold in (shared, own) if hold for state in hold.states}
                owned, held = await _credits(ledger, prospect, who.org_id)
                refusal = judge(prospect, shared, own, owned, held)
    available = None if owned is None else owned - held
    if as_json:
        emit_json(prospect_json(prospect, states, refusal, available))
    else:
        print_prospect(prospect, states, refusal, available)


async def _who(ledger: Ledger, facts: Facts, named: Principal | None) -> Principal | Refusal:
    """Who asks: as was said, or as the gateway would find out."""
    if named is not None:
        check_org(named.org_id)
        plan = named.plan or await plan_of(ledger, named.org_id)
        return Principal(named.org_id, plan, named.user_id, named.key_id, named.source, named.claims)
    settings = ledger.settings
    upstreams = Upstreams({})  # to fetch keys with; nothing is forwarded

    async def fetch(url: str) -> bytes:
        return await upstreams.fetch(url, timeout_ms=FETCH_TIMEOUT_MS, bytes_max=JWKS_BYTES_MAX)

    identity = open_identity(
        settings.identity,
        Powers(
            load_key=key_loader(ledger.postgres),
            fetch=fetch,
            monotonic_ms=lambda: time.monotonic_ns() // 1_000_000,
            wall_ms=lambda: time.time_ns() // 1_000_000,
            claims=claims_needed(settings),
        ),
    )
    try:
        return (await identity.identify(facts)).principal
    except StoreUnavailable:
        raise
    except GatewayError as exc:
        return exc.refusal()
    finally:
        await identity.close()
        await upstreams.aclose()


async def _peek(redis: Redis, org: str, prospect: Prospect) -> tuple[Hold | None, Hold | None]:
    """What the limits say now: those that all share, and the org's own."""
    shared = [demand for demand in prospect.demands if demand.limit.shared]
    own = [demand for demand in prospect.demands if not demand.limit.shared]
    return (
        await peek(redis, keys.SHARED, shared) if shared else None,
        await peek(redis, org, own) if own else None,
    )


async def _credits(ledger: Ledger, prospect: Prospect, org: str) -> tuple[int | None, int]:
    """What the org has, and what of it is held by requests in flight; None when nobody knows."""
    if prospect.quote is None or not prospect.quote.want_ucredits:
        return None, 0
    try:
        posted = (await get_balance(ledger.postgres, org)).ucredits
    except StoreUnavailable:
        raise
    except GatewayError:
        prospect.notes.append(f"PostgreSQL knows no org {org}: whether it has credits is not judged.")
        return None, 0
    found = await working_set(ledger.settings.stores, org, posted)
    return found.available_ucredits + found.held_ucredits, found.held_ucredits


def _tell(request_id: str, logs: list[str], as_json: bool) -> None:
    """The stories of the requests with this id; exits with 1 when there is none."""
    reading = Reading()
    try:
        found = list(islice((line for _, line in read(logs, reading) if _is(line, request_id)), STORIES_MAX))
    except OSError as exc:
        raise UnreadableLog(f"{exc.filename}: {exc.strerror or exc}") from exc
    stories = [tell(line) for line in found]
    if as_json:
        emit_json(stories)
    else:
        for story in stories:
            _print_story(story)
    for named in reading.named:
        remark(f"not a line of an access log: {named}")
    if not stories:
        remark(f"error: no request {request_id} among {reading.requests} of {' '.join(logs)}")
        raise typer.Exit(1)


def _is(line: Line, request_id: str) -> bool:
    return request_id in (line.request_id, line.hold_id)


def _print_story(story: Story) -> None:
    say(f"request {story.request_id}")
    for sentence in story.sentences:
        say(f"  {sentence}")
    if story.untold:
        say("The log cannot tell " + "; ".join(story.untold) + ".")


def _facts(method: str, target: str, fields: HeaderList, client_ip: str) -> Facts:
    raw = target.encode("utf-8", "surrogateescape")
    path = unquote_to_bytes(raw.partition(b"?")[0]).decode("utf-8", "replace")
    return Facts("explain", method, path, raw, fields, client_ip=client_ip, peer_ip=client_ip)


def _fields(headers: list[str]) -> HeaderList:
    found = []
    for text in headers:
        name, colon, value = text.partition(":")
        if not colon or not name.strip():
            raise typer.BadParameter(f"-H wants 'name: value', got {text!r}")
        found.append((name.strip().lower().encode("latin-1", "replace"), value.strip().encode("latin-1", "replace")))
    return tuple(found)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"--claim wants NAME=VALUE, got {text!r}")
    return name, value


def _credential(file: Path | None, from_stdin: bool) -> bytes | None:
    """The text of an API key or token, from where no list of processes shows it."""
    if file is not None and from_stdin:
        raise typer.BadParameter("--key-file and --key-stdin are two places: say one")
    if from_stdin:
        return sys.stdin.buffer.read(CREDENTIAL_BYTES_MAX).strip()
    if file is None:
        return None
    try:
        return file.read_bytes()[:CREDENTIAL_BYTES_MAX].strip()
    except OSError as exc:
        raise BadInput(f"{file}: {exc.strerror}") from exc


def _body(named: str | None) -> bytes | None:
    if named is None:
        return None
    try:
        with sys.stdin.buffer if named == STDIN else Path(named).open("rb") as file:
            return file.read(BODY_BYTES_MAX)
    except OSError as exc:
        raise BadInput(f"{named}: {exc.strerror}") from exc
