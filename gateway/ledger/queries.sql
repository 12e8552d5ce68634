-- Every statement the ledger sends, each under a name. Amounts and balances are micro-credits.

-- name: balance
-- The posted balance of one org: no row when the org has none.
SELECT c.organization_id AS org_id, coalesce(c.credits, 0)::bigint * 1000000 + coalesce(a.micro, 0) AS balance,
       coalesce(a.version, 0) AS version
FROM ai_credits c LEFT JOIN gateway.account a ON a.org_id = c.organization_id
WHERE c.organization_id = $1;

-- name: balances
-- A row for every org asked for; one without a row in ai_credits has nothing, as of the version that its going made.
SELECT o.org_id, c.organization_id IS NOT NULL AS present, coalesce(a.version, 0) AS version,
       -- No balance is so absurd that it fails the statement, and with it all the other orgs: 2^53 is as far as Redis counts.
       CASE WHEN c.organization_id IS NULL THEN 0
            ELSE greatest(-9007199254740992, least(9007199254740992,
                 coalesce(c.credits, 0)::numeric * 1000000 + coalesce(a.micro, 0)))::bigint END AS balance
FROM unnest($1::text[]) AS o (org_id)
LEFT JOIN ai_credits c ON c.organization_id = o.org_id LEFT JOIN gateway.account a ON a.org_id = o.org_id;

-- name: post
-- Entries, any number of times with one effect; the new balance of every org named.
SELECT org_id, balance, version FROM gateway.post($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[]);

-- name: grant
-- Credits for an org, once per grant id.
SELECT org_id, balance, version FROM gateway.grant_credits($1, $2, $3, $4);

-- name: entries
-- An org's newest ledger entries.
SELECT seq, request_id, kind, amount, meta, at FROM gateway.ledger WHERE org_id = $1 ORDER BY seq DESC LIMIT $2;

-- name: add_org
-- A new org; no row when the id is taken.
INSERT INTO gateway.org (org_id, name, plan) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING org_id;

-- name: orgs
-- Every org with its balance, in order of id.
SELECT o.org_id, o.name, o.plan, o.created_at, c.credits::bigint * 1000000 + coalesce(a.micro, 0) AS balance,
       (SELECT count(*) FROM gateway.api_key k WHERE k.org_id = o.org_id AND k.revoked_at IS NULL) AS keys
FROM gateway.org o LEFT JOIN ai_credits c ON c.organization_id = o.org_id LEFT JOIN gateway.account a USING (org_id)
WHERE $1::text IS NULL OR o.org_id = $1 ORDER BY o.org_id LIMIT $2;

-- name: add_key
-- A new API key, known here only by its hash.
INSERT INTO gateway.api_key (key_id, sha256, org_id, user_id, name, expires_at) VALUES ($1, $2, $3, $4, $5, $6)
RETURNING key_id;

-- name: keys
-- The keys of one org, newest first.
SELECT key_id, org_id, user_id, name, created_at, expires_at, revoked_at FROM gateway.api_key
WHERE org_id = $1 ORDER BY created_at DESC LIMIT $2;

-- name: revoke_key
-- The key is refused from now on, by every gateway that listens; no row when there is no such live key.
WITH revoked AS (
    UPDATE gateway.api_key SET revoked_at = now() WHERE key_id = $1 AND revoked_at IS NULL RETURNING key_id, sha256
) SELECT key_id, pg_notify('gateway_keys', encode(sha256, 'hex')) FROM revoked;

-- name: open_org
-- A new org and the credits that its plan begins with, both or neither; no row when the id is taken.
WITH added AS (
    INSERT INTO gateway.org (org_id, name, plan) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING org_id
) SELECT g.org_id, g.balance FROM added, LATERAL gateway.grant_credits(added.org_id, $4, $5, $6) AS g;

-- name: add_org_key
-- A new API key, known here only by its hash; no row when there is no such org.
INSERT INTO gateway.api_key (key_id, sha256, org_id, user_id, name, expires_at)
SELECT $1, $2, o.org_id, $4, $5, $6 FROM gateway.org o WHERE o.org_id = $3
RETURNING key_id, org_id, user_id, name, created_at, expires_at, revoked_at;

-- name: key
-- One key by its public id.
SELECT key_id, org_id, user_id, name, created_at, expires_at, revoked_at FROM gateway.api_key WHERE key_id = $1;

-- name: granted
-- What a grant id has given this org already; no row when nothing.
SELECT amount FROM gateway.ledger WHERE org_id = $1 AND request_id = $2 AND kind = 'grant';

-- name: plans
-- Every plan that some org has, and how many do.
SELECT plan, count(*) AS orgs FROM gateway.org GROUP BY plan ORDER BY plan LIMIT 1000;

-- name: server
-- What `gateway doctor` wants to know of the server itself. clock_ms: what its clock shows, in ms since 1970.
SELECT current_setting('server_version_num')::int AS version_num, current_setting('server_version') AS version,
       pg_is_in_recovery() AS standby, current_setting('transaction_read_only') = 'on' AS read_only,
       current_setting('fsync') = 'on' AS fsync, current_setting('synchronous_commit') <> 'off' AS synchronous,
       current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int AS connections_max,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connections,
       (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS clock_ms;

-- name: write_probe
-- The rights that posting needs, tried and taken back: nothing stays, no version grows.
DO $$ BEGIN
    BEGIN
        INSERT INTO gateway.account (org_id) VALUES ('-') ON CONFLICT DO NOTHING;
        UPDATE ai_credits SET credits = credits WHERE false;
        INSERT INTO gateway.dead_letter (seq, org_id, request_id, kind, amount)
            OVERRIDING SYSTEM VALUE VALUES (0, '-', '-', 'settle', 0);
        RAISE EXCEPTION SQLSTATE 'GW000';
    EXCEPTION WHEN SQLSTATE 'GW000' THEN NULL;
    END;
END $$;

-- name: credits_table
-- The columns of the application's table, in its order; no row when there is no table.
SELECT a.attname AS name, format_type(a.atttypid, NULL) AS type,
       EXISTS (SELECT 1 FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisunique AND i.indpred IS NULL
               AND i.indnatts = 1 AND i.indkey[0] = a.attnum) AS is_unique
FROM pg_attribute a WHERE a.attrelid = to_regclass('ai_credits') AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum;

-- name: credits_trigger
-- Whether changes that others make in ai_credits are noticed; no row when the trigger is gone.
SELECT tgenabled IN ('O', 'A') AS enabled FROM pg_trigger
WHERE tgrelid = to_regclass('ai_credits') AND tgname = 'note_external_change';

-- name: dead_letters
-- Charges that belong to no org any more, at most $1 of them counted.
SELECT count(*) AS entries FROM (SELECT 1 FROM gateway.dead_letter LIMIT $1) AS found;

-- name: announce
-- Everybody who listens to channel $1 hears $2.
SELECT pg_notify($1, $2);

-- name: set_override
-- The org's own value of a limit, in place of the one it had; the gateways learn it from the table's triggers.
WITH before AS (
    SELECT value FROM gateway.limit_override WHERE org_id = $1 AND limit_name = $2
), written AS (
    INSERT INTO gateway.limit_override (org_id, limit_name, value, note) VALUES ($1, $2, $3, $4)
    ON CONFLICT (org_id, limit_name) DO UPDATE SET value = EXCLUDED.value, note = EXCLUDED.note, set_at = EXCLUDED.set_at
    RETURNING org_id, limit_name, value, note, set_at
)
SELECT w.*, o.plan, (SELECT value FROM before) AS was FROM written w LEFT JOIN gateway.org o ON o.org_id = w.org_id;

-- name: unset_override
-- The org has its policy's limit again; no row when it had no other.
WITH removed AS (
    DELETE FROM gateway.limit_override WHERE org_id = $1 AND limit_name = $2
    RETURNING org_id, limit_name, value, note, set_at
) SELECT r.*, o.plan FROM removed r LEFT JOIN gateway.org o ON o.org_id = r.org_id;

-- name: overrides
-- Overrides of one org, or of all in order of id, with the org's plan where there is such an org here.
SELECT l.org_id, l.limit_name, l.value, l.note, l.set_at, o.plan
FROM gateway.limit_override l LEFT JOIN gateway.org o ON o.org_id = l.org_id
WHERE $1::text IS NULL OR l.org_id = $1 ORDER BY l.org_id, l.limit_name LIMIT $2;
