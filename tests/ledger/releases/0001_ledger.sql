-- The ledger and what stands around it. `ai_credits` belongs to the application and may already exist: it is
-- created only when missing, and its whole credits stay the truth that a person can read and change.
-- balance = ai_credits.credits * 1,000,000 + gateway.account.micro, in micro-credits.

-- Wherever the application has it; else in the first schema that is not ours. (For a role called `gateway` that is not
-- the first of its search path: IF NOT EXISTS would look in schema gateway only, and miss the application's table.)
DO $$ BEGIN
    IF to_regclass('ai_credits') IS NULL THEN
        EXECUTE format(
            'CREATE TABLE %I.ai_credits (organization_id text PRIMARY KEY, credits bigint NOT NULL DEFAULT 0,
                updated_at timestamptz NOT NULL DEFAULT now())',
            (SELECT s FROM unnest(current_schemas(false)) WITH ORDINALITY AS p (s, n) WHERE s <> 'gateway' ORDER BY n LIMIT 1));
    END IF;
END $$;

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

-- Any change of ai_credits that the gateway did not make itself becomes an `external` entry and is announced. A row that
-- is given to another org leaves the one and comes to the other. No value at all counts as zero credits.
CREATE FUNCTION gateway.note_external_change() RETURNS trigger LANGUAGE plpgsql
    -- The application that changes ai_credits may have no rights on schema gateway.
    SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    old_org     text;
    new_org     text;
    old_credits bigint := 0;
    new_credits bigint := 0;
    the_org     text;
    delta       bigint;
    new_version bigint;
BEGIN
    IF coalesce(current_setting('gateway.posting', true), '') = 'on' THEN
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        old_org := OLD.organization_id;
        old_credits := coalesce(OLD.credits, 0);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        new_org := NEW.organization_id;
        new_credits := coalesce(NEW.credits, 0);
    END IF;
    FOR the_org, delta IN
        SELECT c.org, sum(c.credits) FROM (VALUES (old_org, -old_credits), (new_org, new_credits)) AS c (org, credits)
        WHERE c.org IS NOT NULL GROUP BY c.org ORDER BY c.org
    LOOP
        CONTINUE WHEN delta = 0 AND old_org = new_org;
        INSERT INTO gateway.account AS a (org_id, version) VALUES (the_org, 1)
            ON CONFLICT (org_id) DO UPDATE SET version = a.version + 1 RETURNING a.version INTO new_version;
        INSERT INTO gateway.ledger (org_id, request_id, kind, amount, meta)
            VALUES (the_org, 'sql:' || new_version, 'external', delta * 1000000,
                    jsonb_build_object('by', session_user, 'operation', lower(TG_OP)));
        PERFORM pg_notify('gateway_credits', the_org);
    END LOOP;
    RETURN NULL;
END $$;
CREATE TRIGGER note_external_change AFTER INSERT OR UPDATE OF credits, organization_id OR DELETE ON ai_credits
    FOR EACH ROW EXECUTE FUNCTION gateway.note_external_change();

-- What is there on the day the gateway arrives is each org's opening balance.
INSERT INTO gateway.account (org_id, version) SELECT organization_id, 1 FROM ai_credits ON CONFLICT DO NOTHING;
INSERT INTO gateway.ledger (org_id, request_id, kind, amount)
    SELECT organization_id, 'opening', 'opening', coalesce(credits, 0)::bigint * 1000000 FROM ai_credits ON CONFLICT DO NOTHING;

-- Post entries, any number of times with one effect, and return the new balance of every org named.
-- A `settle` after an `orphan` of the same request posts the difference; an `orphan` after a `settle` posts nothing.
-- Rows are locked in the order of org_id, so that posters never wait for each other in a circle. Only orgs whose row was
-- there to be locked are posted to; one that comes into being meanwhile is dealt with as it was when we began.
CREATE FUNCTION gateway.post(orgs text[], request_ids text[], kinds text[], amounts bigint[], metas text[])
RETURNS TABLE (org_id text, balance bigint, version bigint) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    present         text[];
    posted_orgs     text[];
    posted_amounts  bigint[];
    settled_orgs    text[];
    settled_amounts bigint[];
BEGIN
    PERFORM set_config('gateway.posting', 'on', true);
    SELECT coalesce(array_agg(c.org_id), '{}') INTO present FROM (
        SELECT organization_id AS org_id FROM ai_credits WHERE organization_id = ANY (orgs)
        ORDER BY organization_id FOR UPDATE
    ) AS c;
    INSERT INTO gateway.account (org_id)
        SELECT p.org_id FROM unnest(present) AS p (org_id) ORDER BY p.org_id ON CONFLICT DO NOTHING;

    INSERT INTO gateway.dead_letter (org_id, request_id, kind, amount, meta)
        SELECT e.org_id, e.request_id, e.kind, e.amount, e.meta::jsonb
        FROM unnest(orgs, request_ids, kinds, amounts, metas) AS e (org_id, request_id, kind, amount, meta)
        WHERE e.org_id <> ALL (present)
        ORDER BY e.org_id, e.request_id, e.kind ON CONFLICT DO NOTHING;

    WITH posted AS (
        INSERT INTO gateway.ledger AS l (org_id, request_id, kind, amount, meta)
        SELECT e.org_id, e.request_id, e.kind, e.amount, e.meta::jsonb
        FROM unnest(orgs, request_ids, kinds, amounts, metas) AS e (org_id, request_id, kind, amount, meta)
        WHERE e.kind <> 'settle'
          AND e.org_id = ANY (present)
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
        WHERE e.kind = 'settle' AND e.org_id = ANY (present)
        ON CONFLICT DO NOTHING RETURNING l.org_id, l.amount
    ) SELECT array_agg(p.org_id), array_agg(p.amount) INTO settled_orgs, settled_amounts FROM posted p;

    WITH delta AS (
        SELECT p.org_id, sum(p.amount)::bigint AS amount
        FROM unnest(posted_orgs || settled_orgs, posted_amounts || settled_amounts) AS p (org_id, amount)
        GROUP BY p.org_id
    ), micro AS (
        -- floor division keeps 0 <= micro < 1,000,000 for debts as well
        SELECT d.org_id, coalesce(c.credits, 0)::bigint * 1000000 + a.micro + d.amount AS ucredits
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
    -- An org whose row is gone has nothing, as of the version that its going made.
    RETURN QUERY
        SELECT a.org_id, CASE WHEN c.organization_id IS NULL THEN 0
                              ELSE coalesce(c.credits, 0)::bigint * 1000000 + a.micro END, a.version
        FROM gateway.account a LEFT JOIN ai_credits c ON c.organization_id = a.org_id
        WHERE a.org_id = ANY (orgs);
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
