-- Every statement the ledger sends, each under a name. Amounts and balances are micro-credits.

-- name: balance
-- The posted balance of one org: no row when the org has none.
SELECT c.organization_id AS org_id, c.credits * 1000000 + coalesce(a.micro, 0) AS balance, coalesce(a.version, 0) AS version
FROM ai_credits c LEFT JOIN gateway.account a ON a.org_id = c.organization_id
WHERE c.organization_id = $1;

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
SELECT o.org_id, o.name, o.plan, o.created_at, c.credits * 1000000 + coalesce(a.micro, 0) AS balance,
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
