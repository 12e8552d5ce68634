-- Orgs, their keys, and the ledger. The whole credits of an org stand in a table of the application's (0003), where a person
-- can read and change them; here stands the fraction beside them, and every change.

CREATE TABLE gateway.org (
    org_id     text PRIMARY KEY CHECK (org_id ~ '^[A-Za-z0-9._:-]{1,128}$'),
    name       text NOT NULL DEFAULT '',
    plan       text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE gateway.api_key (
    key_id     text PRIMARY KEY,
    sha256     bytea NOT NULL UNIQUE CHECK (octet_length(sha256) = 32),
    org_id     text NOT NULL REFERENCES gateway.org,
    user_id    text,
    name       text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);
CREATE INDEX api_key_org ON gateway.api_key (org_id);

-- Beside each row of the application's table: the fraction, and a version that grows with every change of the balance.
CREATE TABLE gateway.account (
    org_id  text PRIMARY KEY,
    micro   integer NOT NULL DEFAULT 0 CHECK (micro >= 0 AND micro < 1000000),
    version bigint NOT NULL DEFAULT 0
);

CREATE TABLE gateway.ledger (
    seq        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    org_id     text NOT NULL,
    request_id text NOT NULL,
    kind       text NOT NULL CHECK (kind IN ('opening', 'grant', 'external', 'settle', 'orphan', 'correction')),
    amount     bigint NOT NULL,
    meta       jsonb NOT NULL DEFAULT '{}',
    at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (org_id, request_id, kind)
);
COMMENT ON COLUMN gateway.ledger.amount IS 'signed change of the balance in micro-credits; a charge is negative';

CREATE FUNCTION gateway.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'gateway.ledger is append-only; post a correction instead';
END $$;
CREATE TRIGGER ledger_is_append_only BEFORE UPDATE OR DELETE ON gateway.ledger
    FOR EACH ROW EXECUTE FUNCTION gateway.refuse_change();
CREATE TRIGGER ledger_is_never_emptied BEFORE TRUNCATE ON gateway.ledger
    FOR EACH STATEMENT EXECUTE FUNCTION gateway.refuse_change();

-- Entries whose org has no row there any more: kept for a person, never dropped.
CREATE TABLE gateway.dead_letter (
    seq        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    org_id     text NOT NULL,
    request_id text NOT NULL,
    kind       text NOT NULL,
    amount     bigint NOT NULL,
    meta       jsonb NOT NULL DEFAULT '{}',
    at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (org_id, request_id, kind)
);
