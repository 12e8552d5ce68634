"""The demo orgs of `gateway run`: one per plan, each with a key that survives restarts, and commands to try them."""

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec
from rich.markup import escape

from gateway.config import Settings
from gateway.identity.api_key import key_loader, new_key
from gateway.ledger import query
from gateway.ledger.orgs import add_org
from gateway.stores import Postgres

CHAT = '{"model": "demo-small", "messages": [{"role": "user", "content": "%s"}]%s}'

STATUS_ONLY = "-s -o /dev/null -w %{http_code}"


@dataclass(frozen=True, slots=True)
class DemoKey:
    """A demo org's key in clear: it opens nothing but the demo."""

    plan: str
    org_id: str
    secret: str
    credits: int


async def ensure_demo_orgs(postgres: Postgres, settings: Settings, state_dir: Path) -> list[DemoKey]:
    """Org `demo-<plan>` exists for every plan, with what the plan begins with and a key kept in `state_dir`.

    Raises StoreUnavailable."""
    kept_path = state_dir / "demo-keys.json"
    kept = _read_keys(kept_path)
    found = []
    for plan, terms in settings.plans.items():
        org_id = f"demo-{plan}"
        if await postgres.row(query("orgs"), org_id, 1) is None:
            await add_org(postgres, settings, org_id, plan, f"Demo ({plan})")
        secret = kept.get(org_id)
        if secret is None or not await _opens(postgres, org_id, secret):
            key = new_key()
            await postgres.row(query("add_key"), key.key_id, key.sha256, org_id, None, "demo", None)
            secret = kept[org_id] = key.secret
        found.append(DemoKey(plan, org_id, secret, 0 if terms.grant == "none" else terms.credits))
    _write_keys(kept_path, kept)
    return found


def _read_keys(path: Path) -> dict[str, str]:
    """The kept secrets by org; none when there is no file, or it is not ours."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}


def _write_keys(path: Path, kept: dict[str, str]) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(kept))


async def _opens(postgres: Postgres, org_id: str, secret: str) -> bool:
    """The kept key is one this database knows, for this org."""
    record = await key_loader(postgres)(sha256(secret.encode()).digest())
    return record is not None and record.org_id == org_id


def paste_these(address: str, keys: list[DemoKey]) -> str:
    """What `gateway run` prints when it is ready: the address, the keys, and commands that work as pasted."""
    lines = ["", f"[bold green]ready[/] {address}", ""]
    if not keys:
        return "\n".join(lines)
    width = max(len(key.plan) for key in keys)
    lines += [f"  {key.plan:<{width}}  {key.secret}  ({key.credits} credits)" for key in keys]
    first, last = keys[0], keys[-1]
    lines += [
        "",
        "[bold]# a chat call[/]",
        _chat(address, last.secret, "Hello, gateway"),
        "",
        "[bold]# the same, streamed[/]",
        _chat(address, last.secret, "Hello, stream", ', "stream": true', flags="-sN"),
        "",
        "[bold]# what the AI router is told: the org, the conversation and its turn (again, and the turn grows)[/]",
        f"curl -s {address}/echo -H 'authorization: Bearer {last.secret}' -H 'x-session-id: my-talk'; echo",
        "",
        f"[bold]# the {first.plan} org runs into its rate limit (429, waits a second) and out of credits (402)[/]",
        f"for i in $(seq 200); do s=$({_chat(address, first.secret, 'again', flags=STATUS_ONLY)}); "
        'echo -n "$s "; case $s in 429) sleep 1;; 402) break;; esac; done; echo',
        "",
        "[dim]health: /-/health  metrics: /-/metrics  Ctrl-C ends everything[/]",
    ]
    return "\n".join(lines)


def _chat(address: str, secret: str, words: str, more: str = "", *, flags: str = "-s") -> str:
    body = escape(CHAT % (words, more))
    return (
        f"curl {flags} {address}/v1/chat/completions -H 'authorization: Bearer {secret}' "
        f"-H 'content-type: application/json' -d '{body}'"
    )
