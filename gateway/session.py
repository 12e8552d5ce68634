"""The conversation a request belongs to: recognise or mint its id, hand the upstream a small context about it, and
remember a few facts when the turn has ended.

A session belongs to the org of the authenticated principal: its key is made from that org, so another org's id is
simply a session that does not exist. Nothing is stored before the first admitted request of a conversation ends, so
guessing ids costs no memory. Sessions fail open: without Redis the request goes on, marked as `unavailable`.
"""

import asyncio
import hashlib
import hmac
import re
import time
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway import keys, limits
from gateway.errors import BadRequest, StoreUnavailable
from gateway.stores import Redis, Script
from gateway.types import Facts, Principal, Session

SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FIELDS = ("created", "turn", "tokens", "model", "seen")


@dataclass(frozen=True, slots=True)
class Rules:
    """All from `sessions:` in gateway.yaml."""

    header: bytes
    mint: bool
    ttl_ms: int
    absolute_ttl_ms: int
    per_org_max: int
    #: Signs the context, so that the upstream can tell it from one that somebody else made up.
    signing_key: str | None


@dataclass(frozen=True, slots=True)
class Named:
    """A session id, before anything is known of the session."""

    session_id: str
    minted: bool


class Sessions:
    """`name` and `begin` before admission, `context` once the turn is known, `remember` when it has ended."""

    def __init__(self, redis: Redis, rules: Rules) -> None:
        self._redis = redis
        self._rules = rules
        self._save = Script("session", limits.script_text("session"))

    @property
    def attached_names(self) -> frozenset[bytes]:
        """The field a client names its session with, beside those every gateway attaches: never forwarded as sent."""
        return frozenset((self._rules.header,))

    def name(self, facts: Facts, fresh_id: str) -> Named | None:
        """The id the client sent, or a new one made of `fresh_id`; None when there is none and none is minted.
        Raises BadRequest for an id that is not one: it is never silently replaced."""
        given = facts.header(self._rules.header)
        if given is None:
            return Named(f"ses_{fresh_id}", minted=True) if self._rules.mint else None
        if not SESSION_ID.fullmatch(given):
            raise BadRequest(f"{self._rules.header.decode()} must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -")
        return Named(given, minted=False)

    def begin(self, principal: Principal, named: Named) -> asyncio.Future[Any] | None:
        """Ask for the record; sent in this turn of the loop, so it travels with the admission. None when there is
        nothing to ask (a minted id), or nobody to ask."""
        if named.minted or not self._redis.usable:
            return None
        found = self._redis.send("HMGET", keys.session(principal.org_id, named.session_id), *_FIELDS)
        found.add_done_callback(Redis.ignore)  # an admission that fails first leaves nobody to read it
        return found

    async def attach(self, principal: Principal, named: Named, found: asyncio.Future[Any] | None) -> Session:
        """The session as of before this request; `available` is False when its record could not be read."""
        if named.minted:
            return Session(named.session_id, turn=1, new=True, created_ms=_now_ms())
        if found is None:
            return Session(named.session_id, turn=1, new=True, created_ms=_now_ms(), available=False)
        try:
            created, turn, tokens, model, seen = await self._redis.reply(found)
        except StoreUnavailable:
            return Session(named.session_id, turn=1, new=True, created_ms=_now_ms(), available=False)
        if created is None or _now_ms() - int(created) >= self._rules.absolute_ttl_ms:
            return Session(named.session_id, turn=1, new=True, created_ms=_now_ms())
        self._keep_alive(principal, named, int(created), int(seen or 0))
        return Session(
            session_id=named.session_id,
            turn=int(turn) + 1,
            new=False,
            created_ms=int(created),
            total_tokens=int(tokens or 0),
            last_model=model.decode() if model else None,
        )

    def _keep_alive(self, principal: Principal, named: Named, created_ms: int, seen_ms: int) -> None:
        """A turn that takes long does not lose its session. Its end renews the record; before that only one that was
        idle for half its time needs it. Never past the absolute age, and never out of the org's index, which bounds
        how many are kept."""
        now_ms, rules = _now_ms(), self._rules
        if now_ms - seen_ms < rules.ttl_ms // 2 or not self._redis.usable:
            return
        key, index = keys.session(principal.org_id, named.session_id), keys.session_index(principal.org_id)
        left_ms = max(1, min(rules.ttl_ms, created_ms + rules.absolute_ttl_ms - now_ms))
        self._redis.send_detached("PEXPIRE", key, left_ms)
        self._redis.send_detached("ZADD", index, "XX", now_ms, key)
        self._redis.send_detached("PEXPIRE", index, rules.ttl_ms)

    def headers(self, session: Session, principal: Principal, facts: Facts) -> list[tuple[bytes, bytes]]:
        """What the upstream is told. The context is base64url(JSON); signed when a key is set:
        `v1;t=<seconds>;sig=<hex HMAC-SHA256 of t|method|target|request id|org|session id|context>`."""
        context = urlsafe_b64encode(
            msgspec.json.encode(
                {
                    "v": 1,
                    "session_id": session.session_id,
                    "org_id": principal.org_id,
                    "user_id": principal.user_id,
                    "plan": principal.plan,
                    "turn": session.turn,
                    "new": session.new,
                    "created_ms": session.created_ms,
                    "total_tokens": session.total_tokens,
                    "last_model": session.last_model,
                }
            )
        ).rstrip(b"=")
        attached = [
            (b"x-session-id", session.session_id.encode()),
            (b"x-session-turn", b"%d" % session.turn),
            (b"x-session-new", b"true" if session.new else b"false"),
            (b"x-session-context", context),
        ]
        if not session.available:
            attached.append((b"x-session-status", b"unavailable"))
        if self._rules.signing_key is not None:
            attached.append((b"x-session-signature", self._sign(context, session, principal, facts)))
        return attached

    def _sign(self, context: bytes, session: Session, principal: Principal, facts: Facts) -> bytes:
        assert self._rules.signing_key is not None
        seconds = b"%d" % int(time.time())
        parts: Sequence[bytes] = (
            seconds,
            facts.method.encode(),
            facts.target,
            facts.request_id.encode(),
            principal.org_id.encode(),
            session.session_id.encode(),
            context,
        )
        signature = hmac.new(self._rules.signing_key.encode(), b"|".join(parts), hashlib.sha256).hexdigest()
        return b"v1;t=%b;sig=%b" % (seconds, signature.encode())

    def remember(self, principal: Principal, session: Session, tokens: int, model: str | None) -> None:
        """The turn has ended; its numbers are on their way. A failure never fails the answer, so nobody waits."""
        if not self._redis.usable:
            return
        key = keys.session(principal.org_id, session.session_id)
        rules = self._rules
        self._redis.run_detached(
            self._save,
            [key, keys.session_index(principal.org_id)],
            [rules.ttl_ms, rules.absolute_ttl_ms, rules.per_org_max, tokens, (model or "")[:128]],
        )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
