-- The ledger and what stands around it. `ai_credits` belongs to the application and may already exist: it is
-- created only when missing, and its whole credits stay the truth that a person can read and change.
-- balance = ai_credits.credits * 1,000,000 + gateway.account.micro, in micro-credits.

CREATE TABLE IF NOT EXISTS ai_credits (
    organization_id text PRIMARY KEY,
    credits         bigint NOT NULL DEFAULT 0,
    updated_at      timestamptz NOT NULL DEFAULT now()
);

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

-- Beside each ai_credits row: the fraction, and a version that grows with every change of the balance.
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

-- Entries whose org has no ai_credits row any more: kept for a person, never dropped.
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

-- Any change of ai_credits that the gateway did not make itself becomes an `external` entry and is announced.
CREATE FUNCTION gateway.note_external_change() RETURNS trigger LANGUAGE plpgsql
    -- The application that changes ai_credits may have no rights on schema gateway.
    SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    the_org     text := CASE WHEN TG_OP = 'DELETE' THEN OLD.organization_id ELSE NEW.organization_id END;
    delta       bigint := (CASE WHEN TG_OP = 'DELETE' THEN 0 ELSE NEW.credits END)
                        - (CASE WHEN TG_OP = 'INSERT' THEN 0 ELSE OLD.credits END);
    new_version bigint;
BEGIN
    IF coalesce(current_setting('gateway.posting', true), '') = 'on' THEN
        RETURN NULL;
    END IF;
    IF delta = 0 AND TG_OP = 'UPDATE' THEN
        RETURN NULL;
    END IF;
    INSERT INTO gateway.account AS a (org_id, version) VALUES (the_org, 1)
        ON CONFLICT (org_id) DO UPDATE SET version = a.version + 1 RETURNING a.version INTO new_version;
    INSERT INTO gateway.ledger (org_id, request_id, kind, amount, meta)
        VALUES (the_org, 'sql:' || new_version, 'external', delta * 1000000,
                jsonb_build_object('by', session_user, 'operation', lower(TG_OP)));
    PERFORM pg_notify('gateway_credits', the_org);
    RETURN NULL;
END $$;
CREATE TRIGGER note_external_change AFTER INSERT OR UPDATE OF credits OR DELETE ON ai_credits
    FOR EACH ROW EXECUTE FUNCTION gateway.note_external_change();

-- What is there on the day the gateway arrives is each org's opening balance.
INSERT INTO gateway.account (org_id, version) SELECT organization_id, 1 FROM ai_credits ON CONFLICT DO NOTHING;
INSERT INTO gateway.ledger (org_id, request_id, kind, amount)
    SELECT organization_id, 'opening', 'opening', credits * 1000000 FROM ai_credits ON CONFLICT DO NOTHING;

-- Post entries, any number of times with one effect, and return the new balance of every org named.
-- A `settle` after an `orphan` of the same request posts the difference; an `orphan` after a `settle` posts nothing.
-- Rows are locked in the order of org_id, so that posters never wait for each other in a circle.
CREATE FUNCTION gateway.post(orgs text[], request_ids text[], kinds text[], amounts bigint[], metas text[])
RETURNS TABLE (org_id text, balance bigint, version bigint) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    posted_orgs    text[];
    posted_amounts bigint[];
    settled_orgs    text[];
    settled_amounts bigint[];
BEGIN
    PERFORM set_config('gateway.posting', 'on', true);
    PERFORM 1 FROM ai_credits c WHERE c.organization_id = ANY (orgs) ORDER BY c.organization_id FOR UPDATE;
    INSERT INTO gateway.account (org_id)
        SELECT c.organization_id FROM ai_credits c WHERE c.organization_id = ANY (orgs)
        ORDER BY c.organization_id ON CONFLICT DO NOTHING;

    INSERT INTO gateway.dead_letter (org_id, request_id, kind, amount, meta)
        SELECT e.org_id, e.request_id, e.kind, e.amount, e.meta::jsonb
        FROM unnest(orgs, request_ids, kinds, amounts, metas) AS e (org_id, request_id, kind, amount, meta)
        WHERE NOT EXISTS (SELECT 1 FROM ai_credits c WHERE c.organization_id = e.org_id)
        ON CONFLICT DO NOTHING;

    WITH posted AS (
        INSERT INTO gateway.ledger AS l (org_id, request_id, kind, amount, meta)
        SELECT e.org_id, e.request_id, e.kind, e.amount, e.meta::jsonb
        FROM unnest(orgs, request_ids, kinds, amounts, metas) AS e (org_id, request_id, kind, amount, meta)
        WHERE e.kind <> 'settle'
          AND EXISTS (SELECT 1 FROM ai_credits c WHERE c.organization_id = e.org_id)
          AND NOT (e.kind = 'orphan' AND EXISTS (
              SELECT 1 FROM gateway.ledger s
              WHERE s.org_id = e.org_id AND s.request_id = e.request_id AND s.kind = 'settle'))
        ON CONFLICT DO NOTHING RETURNING l.org_id, l.amount
    ) SELECT array_agg(p.org_id), array_agg(p.amount) INTO posted_orgs, posted_amounts FROM posted p;

    -- A second statement, so that it sees the orphans which the first one posted.
    WITH posted AS (
        INSERT INTO gateway.ledger AS l (org_id, request_id, kind, amount, meta)
        SELECT e.org_id, e.request_id, e.kind, e.amount - coalesce(o.amount, 0), e.meta::jsonb
        FROM unnest(orgs, request_ids, kinds, amounts, metas) AS e (org_id, request_id, kind, amount, meta)
        LEFT JOIN gateway.ledger o
            ON o.org_id = e.org_id AND o.request_id = e.request_id AND o.kind = 'orphan'
        WHERE e.kind = 'settle' AND EXISTS (SELECT 1 FROM ai_credits c WHERE c.organization_id = e.org_id)
        ON CONFLICT DO NOTHING RETURNING l.org_id, l.amount
    ) SELECT array_agg(p.org_id), array_agg(p.amount) INTO settled_orgs, settled_amounts FROM posted p;

    WITH delta AS (
        SELECT p.org_id, sum(p.amount)::bigint AS amount
        FROM unnest(posted_orgs || settled_orgs, posted_amounts || settled_amounts) AS p (org_id, amount)
        GROUP BY p.org_id
    ), micro AS (
        -- floor division keeps 0 <= micro < 1,000,000 for debts as well
        SELECT d.org_id, c.credits * 1000000 + a.micro + d.amount AS ucredits
        FROM delta d JOIN ai_credits c ON c.organization_id = d.org_id JOIN gateway.account a ON a.org_id = d.org_id
    ), account AS (
        UPDATE gateway.account a
        SET micro = (((m.ucredits % 1000000) + 1000000) % 1000000)::integer, version = a.version + 1
        FROM micro m WHERE m.org_id = a.org_id
    )
    UPDATE ai_credits c
    SET credits = (m.ucredits - (((m.ucredits % 1000000) + 1000000) % 1000000)) / 1000000
    FROM micro m WHERE m.org_id = c.organization_id;

    PERFORM set_config('gateway.posting', '', true);
    RETURN QUERY
        SELECT c.organization_id, c.credits * 1000000 + a.micro, a.version
        FROM ai_credits c JOIN gateway.account a ON a.org_id = c.organization_id
        WHERE c.organization_id = ANY (orgs);
END $$;

-- Give an org credits, once per grant id; the org's row is created when there is none.
CREATE FUNCTION gateway.grant_credits(the_org text, grant_id text, amount bigint, meta text)
RETURNS TABLE (org_id text, balance bigint, version bigint) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('gateway.posting', 'on', true);
    INSERT INTO ai_credits (organization_id, credits) VALUES (the_org, 0) ON CONFLICT DO NOTHING;
    RETURN QUERY SELECT * FROM gateway.post(ARRAY[the_org], ARRAY[grant_id], ARRAY['grant'], ARRAY[amount], ARRAY[meta]);
    PERFORM pg_notify('gateway_credits', the_org);
END $$;
