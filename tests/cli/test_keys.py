"""`gateway keys`."""

import asyncio
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from gateway.stores import Postgres
from tests.cli.conftest import CommandLine


def test_an_added_key_prints_its_secret_alone_and_stores_only_the_hash(acme: CommandLine) -> None:
    said = acme.do("keys", "add", "acme", "--user", "ada@example.com", "--name", "laptop")
    secret = said.out.removesuffix("\n")
    assert secret.startswith("gw_") and "\n" not in secret
    assert "cannot be shown again" in said.err
    assert secret not in said.err
    stored = asyncio.run(_stored(acme.env["DATABASE_URL"]))
    assert stored == [(sha256(secret.encode()).digest(), "acme", "ada@example.com")]


async def _stored(url: str) -> list[tuple[bytes, str, str]]:
    postgres = Postgres(url, timeout_ms=5_000, pool_max=1)
    await postgres.open()
    try:
        rows = await postgres.rows("SELECT sha256, org_id, user_id FROM gateway.api_key")
        return [(row["sha256"], row["org_id"], row["user_id"]) for row in rows]
    finally:
        await postgres.close()


def test_a_secret_is_never_listed(acme: CommandLine) -> None:
    key = acme.do("keys", "add", "acme", "--json").json()
    for flags in ((), ("--json",)):
        said = acme.do("keys", "list", "acme", *flags)
        assert key["key_id"] in said.out
        assert key["secret"] not in said.out + said.err


def test_a_key_may_end_by_itself(acme: CommandLine) -> None:
    before = datetime.now(UTC)
    key = acme.do("keys", "add", "acme", "--expires", "30d", "--json").json()
    lasts = datetime.fromisoformat(key["expires_at"]) - before
    assert timedelta(days=30) <= lasts < timedelta(days=30, minutes=1)
    assert key["state"] == "live"


def test_a_bad_lifetime_is_a_usage_error(acme: CommandLine) -> None:
    for expires in ("0s", "-1d", "500ms", "30", "30 d", "tomorrow", "", "10000d", "9" * 15 + "d"):
        said = acme("keys", "add", "acme", f"--expires={expires}")
        assert (said.exit_code, said.out) == (2, ""), expires
        assert "--expires" in said.err
    assert acme.do("keys", "list", "acme", "--json").json() == []


def test_a_bad_user_is_a_usage_error(acme: CommandLine) -> None:
    for user in ("", "a b", "ünï", "x" * 257, "a\nb"):
        said = acme("keys", "add", "acme", "--user", user)
        assert (said.exit_code, said.out) == (2, ""), user


def test_a_key_for_an_unknown_org_prints_no_secret(acme: CommandLine) -> None:
    said = acme("keys", "add", "nobody")
    assert (said.exit_code, said.out) == (1, "")
    assert "there is no org 'nobody'; `gateway orgs add` makes one" in said.err
    assert acme("keys", "list", "nobody").exit_code == 1


def test_a_revoked_key_is_announced_by_its_hash(acme: CommandLine) -> None:
    key = acme.do("keys", "add", "acme", "--json").json()

    async def revoke_while_listening() -> str:
        heard: asyncio.Queue[str] = asyncio.Queue()
        listening = asyncio.Event()
        postgres = Postgres(acme.env["DATABASE_URL"], timeout_ms=5_000, pool_max=1)
        await postgres.open()
        try:
            postgres.listen({"gateway_keys": heard.put_nowait}, listening.set)
            async with asyncio.timeout(10):
                await listening.wait()
                await asyncio.to_thread(acme.do, "keys", "revoke", key["key_id"])
                return await heard.get()
        finally:
            await postgres.close()

    assert asyncio.run(revoke_while_listening()) == sha256(key["secret"].encode()).hexdigest()
    assert [row["state"] for row in acme.do("keys", "list", "acme", "--json").json()] == ["revoked"]


def test_revoking_again_changes_nothing(acme: CommandLine) -> None:
    key_id = acme.do("keys", "add", "acme", "--json").json()["key_id"]
    assert acme.do("keys", "revoke", key_id, "--json").json()["changed"] is True
    assert acme.do("keys", "revoke", key_id, "--json").json()["changed"] is False
    assert "was revoked already" in acme.do("keys", "revoke", key_id).out


def test_an_unknown_key_cannot_be_revoked(migrated: CommandLine) -> None:
    for key_id in ("key_0000000000000000", "", "x" * 1000, "kéy", "a\x00b"):
        said = migrated("keys", "revoke", key_id)
        assert (said.exit_code, said.out) == (1, ""), key_id


def test_a_secret_given_for_its_id_is_not_repeated(acme: CommandLine) -> None:
    secret = acme.do("keys", "add", "acme").out.strip()
    said = acme("keys", "revoke", secret)
    assert said.exit_code == 2
    assert secret[:12] not in said.err
