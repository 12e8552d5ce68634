-- Every statement the ledger sends, each under a name. Amounts and balances are micro-credits.

-- name: balance
-- The posted balance of one org: no row when the org has none.
SELECT * FROM gateway.states(ARRAY[$1::text]) WHERE present;

-- name: states
-- A row for every org asked for; one without a row in the application's table has nothing.
SELECT * FROM gateway.states($1::text[]);

-- name: post
-- Entries, any number of times with one effect; the new state of every org named.
SELECT * FROM gateway.post($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[]);

-- name: unlocked
-- Orgs whose rows nobody has locked.
SELECT o AS org_id FROM gateway.unlocked($1::text[]) AS o;

-- name: grant
-- Credits for an org, once per grant id.
SELECT * FROM gateway.grant_credits($1, $2, $3, $4);

-- name: grant_facts
-- What the periods of org $1 depend on; a row always. Times are ms since 1970.
SELECT c.org_id IS NOT NULL AS present, a.plan,
       floor(extract(epoch FROM a.period_starts) * 1000)::bigint AS period_starts_ms,
       floor(extract(epoch FROM a.period_ends) * 1000)::bigint AS period_ends_ms,
       floor(extract(epoch FROM coalesce(o.created_at, a.created_at)) * 1000)::bigint AS created_ms,
       floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS clock_ms
FROM (VALUES ($1::text)) AS w (org_id) LEFT JOIN gateway.credit c ON c.org_id = w.org_id
LEFT JOIN gateway.account a ON a.org_id = w.org_id LEFT JOIN gateway.org o ON o.org_id = w.org_id;

-- name: turn
-- The grant of a period: org, plan, kind, amount, grant id, begin and end in ms, provision, owed, lowered {version, epoch,
-- cap}.
SELECT * FROM gateway.turn($1, $2, $3, $4, $5, $6, $7, $8, $9, $10);

-- name: pockets
-- What an org's balance is made of; no row when it has none. It may have changed since anybody noticed.
SELECT s.balance, least(coalesce(a.plan_micro, 0), greatest(0, s.balance)) AS plan_micro, a.plan, s.period_ends_ms
FROM gateway.states(ARRAY[$1::text]) s LEFT JOIN gateway.account a ON a.org_id = s.org_id WHERE s.present;

-- name: raise_cap
-- What Redis may owe for an org: org, epoch, birth, need, least cap, grace in ms, percent of the balance.
SELECT * FROM gateway.raise_cap($1, $2, $3, $4, $5, $6, $7);

-- name: lower_cap
-- The same, back: org, epoch, birth, version, cap. No row when the account has changed.
SELECT * FROM gateway.lower_cap($1, $2, $3, $4, $5);

-- name: go_on_after
-- The versions of a database that was restored go on after those that Redis has: org, version, epoch.
SELECT * FROM gateway.go_on_after($1, $2, $3);

-- name: acknowledge
-- What an instance knows of a lost state is registered again: instance, org, epoch, birth, owed, grace in ms.
SELECT * FROM gateway.acknowledge($1, $2, $3, $4, $5, $6);

-- name: beat
-- The instance lives: how many do, and who waits for it.
SELECT * FROM gateway.beat($1);

-- name: leave
-- The instance has ended.
SELECT gateway.leave($1);

-- name: take_hold
-- A hold here: org, request, wanted, least, owed, instance, lease in ms, capped.
SELECT * FROM gateway.take_hold($1, $2, $3, $4, $5, $6, $7, $8);

-- name: extend_hold
-- More for a hold here: org, request, more, capped.
SELECT * FROM gateway.extend_hold($1, $2, $3, $4);

-- name: renew_holds
-- Holds here last another lease: orgs, requests, used so far, lease in ms.
SELECT gateway.renew_holds($1::text[], $2::text[], $3::bigint[], $4);

-- name: sweep_holds
-- Holds here whose lease is over have become entries: on_expiry, how many at most.
SELECT * FROM gateway.sweep_holds($1, $2);

-- name: poll_external
-- What others changed where no trigger tells.
SELECT o AS org_id FROM gateway.poll_external() AS o;

-- name: binding
-- Which table the credits are in, as it was configured when they were bound to it. view: ours is still over the table of
-- that name. needed, triggers, enabled: how many triggers tell of other writers in such a mode, are there, and do.
SELECT b.table_name, b.org_column, b.credits_column, b.mode,
       EXISTS (SELECT FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
               WHERE r.ev_class = to_regclass('gateway.credit') AND d.refobjid = to_regclass(b.relation)) AS view,
       CASE b.mode WHEN 'readonly' THEN 0 ELSE 2 END AS needed,
       (SELECT count(*) FROM pg_trigger t WHERE t.tgrelid = to_regclass(b.relation)
            AND t.tgfoid = 'gateway.note_external_change'::regproc) AS triggers,
       (SELECT count(*) FROM pg_trigger t WHERE t.tgrelid = to_regclass(b.relation)
            AND t.tgfoid = 'gateway.note_external_change'::regproc AND t.tgenabled IN ('O', 'A')) AS enabled
FROM gateway.binding b;

-- name: bind
-- The credits are in this table from now on: table, column of the org, of the credits, mode.
SELECT gateway.bind($1, $2, $3, $4);

-- name: entries
-- An org's newest ledger entries.
SELECT seq, request_id, kind, amount, meta, at FROM gateway.ledger WHERE org_id = $1 ORDER BY seq DESC LIMIT $2;

-- name: orgs
-- Every org with its balance, in order of id.
SELECT o.org_id, o.name, o.plan, o.created_at, c.credits::bigint * 1000000 + coalesce(a.micro, 0) AS balance,
       (SELECT count(*) FROM gateway.api_key k WHERE k.org_id = o.org_id AND k.revoked_at IS NULL) AS keys
FROM gateway.org o LEFT JOIN gateway.credit c ON c.org_id = o.org_id LEFT JOIN gateway.account a ON a.org_id = o.org_id
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
-- A new org and what its plan begins with, both or neither; no row when the id is taken. Org, name, created at in ms; plan,
-- kind, amount, grant id, begin and end of the period in ms.
WITH added AS (
    INSERT INTO gateway.org (org_id, name, plan, created_at) VALUES ($1, $2, $4, to_timestamp($3 / 1000.0))
    ON CONFLICT DO NOTHING RETURNING org_id
) SELECT g.org_id, g.balance FROM added, LATERAL gateway.turn(added.org_id, $4, $5, $6, $7, $8, $9, true, 0, NULL) AS g;

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
        UPDATE gateway.credit SET credits = credits WHERE false;
        INSERT INTO gateway.dead_letter (seq, org_id, request_id, kind, amount)
            OVERRIDING SYSTEM VALUE VALUES (0, '-', '-', 'settle', 0);
        RAISE EXCEPTION SQLSTATE 'GW000';
    EXCEPTION WHEN SQLSTATE 'GW000' THEN NULL;
    END;
END $$;

-- name: credits_table
-- The columns of the application's table $1, in its order; no row when there is no table.
SELECT a.attname AS name, format_type(a.atttypid, NULL) AS type,
       EXISTS (SELECT 1 FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisunique AND i.indpred IS NULL
               AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum) AS is_unique
FROM pg_attribute a WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attrelid = to_regclass(
    (SELECT string_agg(quote_ident(p), '.' ORDER BY n) FROM unnest(string_to_array($1, '.')) WITH ORDINALITY AS u (p, n)))
ORDER BY a.attnum;

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

-- name: audit_orgs
-- Every org that has books.
SELECT org_id FROM gateway.account UNION SELECT c.org_id FROM gateway.credit c WHERE c.org_id IS NOT NULL ORDER BY 1;

-- name: audit
-- The books of these orgs (NULL: of all) in one snapshot, side by side: what the ledger comes to, what the account says of
-- it, and what the application's table has. letters: entries for orgs without a row there that were never posted since.
WITH entries AS (
    SELECT l.org_id, count(*) AS count, sum(l.amount) AS amount FROM gateway.ledger l
    WHERE $1::text[] IS NULL OR l.org_id = ANY ($1) GROUP BY l.org_id
), holds AS (
    SELECT h.org_id, sum(h.amount) AS amount FROM gateway.hold h
    WHERE $1::text[] IS NULL OR h.org_id = ANY ($1) GROUP BY h.org_id
), letters AS (
    SELECT d.org_id, count(*) AS count, sum(d.amount) AS amount FROM gateway.dead_letter d
    WHERE ($1::text[] IS NULL OR d.org_id = ANY ($1)) AND NOT EXISTS (
        SELECT FROM gateway.ledger l WHERE l.org_id = d.org_id AND l.request_id = d.request_id AND l.kind = d.kind)
    GROUP BY d.org_id
), orgs AS (
    SELECT a.org_id FROM gateway.account a UNION SELECT e.org_id FROM entries e UNION SELECT d.org_id FROM letters d
    UNION SELECT c.org_id FROM gateway.credit c WHERE c.org_id IS NOT NULL
)
SELECT o.org_id, c.org_id IS NOT NULL AS present, coalesce(c.credits, 0)::numeric AS credits,
       coalesce(a.credits_seen, 0)::numeric AS credits_seen, coalesce(a.micro, 0) AS micro, coalesce(a.version, 0) AS version,
       coalesce(a.plan_micro, 0) AS plan_micro, coalesce(a.lost, 0) AS lost, coalesce(a.held, 0) AS held,
       coalesce(a.cap, 0) AS cap, coalesce(a.epoch, 1) AS epoch, coalesce(a.birth, '') AS birth,
       coalesce(floor(extract(epoch FROM a.period_ends) * 1000), 0)::bigint AS period_ends_ms,
       coalesce(e.count, 0) AS entries, coalesce(e.amount, 0) AS entries_sum, coalesce(h.amount, 0) AS holds_sum,
       coalesce(d.count, 0) AS letters, coalesce(d.amount, 0) AS letters_sum,
       (SELECT count(*) FROM gateway.living()) AS living
FROM orgs o LEFT JOIN gateway.account a ON a.org_id = o.org_id LEFT JOIN gateway.credit c ON c.org_id = o.org_id
LEFT JOIN entries e ON e.org_id = o.org_id LEFT JOIN holds h ON h.org_id = o.org_id
LEFT JOIN letters d ON d.org_id = o.org_id
WHERE $1::text[] IS NULL OR o.org_id = ANY ($1) ORDER BY o.org_id;

-- name: find_charged
-- Requests that were charged, by what they are called: here, or in X-Request-Id where a trusted proxy chose that. Names; orgs
-- (NULL: all).
SELECT DISTINCT l.org_id, l.request_id, l.meta ->> 'request_id' AS called FROM gateway.ledger l
WHERE l.kind IN ('settle', 'orphan') AND ($2::text[] IS NULL OR l.org_id = ANY ($2))
  AND (l.request_id = ANY ($1::text[]) OR l.meta ->> 'request_id' = ANY ($1::text[]));

-- name: correct
-- What requests cost after all: orgs, requests, charges, metas, whether also those nobody knows, whether only to look.
SELECT * FROM gateway.correct($1::text[], $2::text[], $3::bigint[], $4::text[], $5, $6);
