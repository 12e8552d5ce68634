-- What clients call their requests, so that one that is sent again is neither run nor charged again; and corrections of
-- what requests were charged.

CREATE TABLE gateway.idempotency (
    org_id        text NOT NULL,
    -- SHA-256 of the Idempotency-Key.
    key_digest    bytea NOT NULL CHECK (octet_length(key_digest) = 32),
    -- SHA-256 of method, target and body.
    body_digest   bytea NOT NULL CHECK (octet_length(body_digest) = 32),
    -- The one that runs, or ran, under this key: what the ledger knows it by.
    request_id    text NOT NULL,
    -- Its gateway lives at least until then, or has died.
    running_until timestamptz NOT NULL,
    -- NULL: it runs, or its gateway died before it could say how it ended.
    outcome       jsonb,
    at            timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at    timestamptz NOT NULL,
    PRIMARY KEY (org_id, key_digest)
) WITH (fillfactor = 80); -- a beat changes no indexed column, and finds room beside the row
CREATE INDEX idempotency_expires ON gateway.idempotency (expires_at);

-- Who may run what is called `the_key`? A row, always:
--   RUN       the caller, from now on
--   OTHER     nobody: the key stands for another request
--   RUNNING   nobody: `request_id` does
--   FINISHED  nobody: it has ended as `outcome` says
--   LAPSED    nobody has said for a while how `request_id` is, and PostgreSQL does not know: ask Redis, then ask here
--             again with it as `asked` and what Redis says it was charged (NULL: nothing that Redis knows of).
CREATE FUNCTION gateway.claim_key(
    the_org text, the_key bytea, the_body bytea, the_request text, running_ms bigint, remember_ms bigint,
    asked text, asked_charge bigint)
RETURNS TABLE (verdict text, request_id text, outcome jsonb, at timestamptz) LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
#variable_conflict use_column
DECLARE
    first     gateway.idempotency;
    right_now timestamptz := clock_timestamp();
    charged   bigint;
    noted     jsonb;
BEGIN
    LOOP
        INSERT INTO gateway.idempotency AS i (org_id, key_digest, body_digest, request_id, running_until, expires_at)
            VALUES (the_org, the_key, the_body, the_request, right_now + running_ms * interval '1 ms',
                    right_now + remember_ms * interval '1 ms')
            ON CONFLICT DO NOTHING RETURNING i.* INTO first;
        IF FOUND THEN
            RETURN QUERY SELECT 'RUN', first.request_id, first.outcome, first.at;
            RETURN;
        END IF;
        SELECT * INTO first FROM gateway.idempotency i
            WHERE i.org_id = the_org AND i.key_digest = the_key FOR UPDATE;
        EXIT WHEN FOUND; -- else it was freed since
    END LOOP;

    IF first.outcome IS NULL AND first.running_until <= right_now THEN
        SELECT -sum(l.amount)::bigint, (array_agg(l.meta ORDER BY l.seq DESC))[1] INTO charged, noted FROM gateway.ledger l
            WHERE l.org_id = the_org AND l.request_id = first.request_id AND l.kind IN ('settle', 'orphan');
        IF charged IS NULL AND asked = first.request_id THEN
            charged := asked_charge;
        END IF;
        IF charged > 0 THEN
            first.outcome := jsonb_build_object(
                'request_id', coalesce(noted ->> 'request_id', first.request_id), 'status', noted -> 'status',
                'outcome', coalesce(noted ->> 'outcome', 'gateway_died'), 'charged_ucredits', charged);
            UPDATE gateway.idempotency i SET outcome = first.outcome
                WHERE i.org_id = the_org AND i.key_digest = the_key;
        ELSIF EXISTS (SELECT FROM gateway.hold h WHERE h.org_id = the_org AND h.request_id = first.request_id) THEN
            first.running_until := 'infinity';
        ELSIF charged IS NULL AND asked IS DISTINCT FROM first.request_id THEN
            RETURN QUERY SELECT 'LAPSED', first.request_id, first.outcome, first.at;
            RETURN;
        END IF;
    END IF;

    -- What cost nothing, or was long ago, stands in nobody's way.
    IF first.running_until <= right_now AND (first.outcome IS NULL OR first.expires_at <= right_now) THEN
        UPDATE gateway.idempotency i
            SET body_digest = the_body, request_id = the_request, outcome = NULL, at = right_now,
                running_until = right_now + running_ms * interval '1 ms',
                expires_at = right_now + remember_ms * interval '1 ms'
            WHERE i.org_id = the_org AND i.key_digest = the_key;
        RETURN QUERY SELECT 'RUN', the_request, NULL::jsonb, right_now;
        RETURN;
    END IF;
    RETURN QUERY SELECT
        CASE WHEN first.body_digest <> the_body THEN 'OTHER'
             WHEN first.outcome IS NULL THEN 'RUNNING' ELSE 'FINISHED' END,
        first.request_id, first.outcome, first.at;
END $$;

-- These requests still run, as far as their keys are still theirs.
CREATE FUNCTION gateway.beat_keys(orgs text[], keys bytea[], request_ids text[], running_ms bigint) RETURNS void
LANGUAGE sql SET lock_timeout = '1s' AS $$
    UPDATE gateway.idempotency i SET running_until = clock_timestamp() + running_ms * interval '1 ms'
    FROM unnest(orgs, keys, request_ids) AS e (org_id, key_digest, request_id)
    WHERE i.org_id = e.org_id AND i.key_digest = e.key_digest AND i.request_id = e.request_id AND i.outcome IS NULL;
$$;

-- These requests have ended, each as its outcome says (JSON); where that is NULL, nothing has happened and its key is free.
CREATE FUNCTION gateway.end_keys(orgs text[], keys bytea[], request_ids text[], outcomes text[]) RETURNS void
LANGUAGE sql SET lock_timeout = '1s' AS $$
    UPDATE gateway.idempotency i SET outcome = e.outcome::jsonb
    FROM unnest(orgs, keys, request_ids, outcomes) AS e (org_id, key_digest, request_id, outcome)
    WHERE i.org_id = e.org_id AND i.key_digest = e.key_digest AND i.request_id = e.request_id AND i.outcome IS NULL
      AND e.outcome IS NOT NULL;
    DELETE FROM gateway.idempotency i
    USING unnest(orgs, keys, request_ids, outcomes) AS e (org_id, key_digest, request_id, outcome)
    WHERE i.org_id = e.org_id AND i.key_digest = e.key_digest AND i.request_id = e.request_id AND i.outcome IS NULL
      AND e.outcome IS NULL;
$$;

-- Keys that nobody need remember any more are forgotten, `most` of them. Returns how many were.
CREATE FUNCTION gateway.forget_keys(most integer) RETURNS bigint LANGUAGE sql SET lock_timeout = '1s' AS $$
    WITH forgotten AS (
        DELETE FROM gateway.idempotency WHERE (org_id, key_digest) IN (
            SELECT i.org_id, i.key_digest FROM gateway.idempotency i
            WHERE i.expires_at <= clock_timestamp() AND i.running_until <= clock_timestamp()
            ORDER BY i.expires_at LIMIT most FOR UPDATE SKIP LOCKED)
        RETURNING 1
    ) SELECT count(*) FROM forgotten;
$$;

-- Each request costs what `charges` says (micro-credits), whatever it was charged before, unless `dry`. One row for each, in
-- the order given: what it was charged, NULL when the ledger does not know it (then nothing is posted unless `unknown_too`),
-- and whether its org has a row to post to.
--
-- What a gateway has settled is corrected by the difference, in an entry named after the request and numbered, because one
-- request may be corrected again. What only a sweeper has charged, or nobody, is settled here: should its gateway wake up
-- and settle it later, that is the second time and posts nothing. No request may be named twice.
CREATE FUNCTION gateway.correct(
    orgs text[], request_ids text[], charges bigint[], metas text[], unknown_too boolean, dry boolean)
RETURNS TABLE (charged bigint, present boolean) LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
#variable_conflict use_column
DECLARE
    one       record;
    was       bigint;
    settled   boolean;
    there     boolean;
    number    bigint;
    changed   bigint;
    p_orgs    text[] := '{}';
    p_names   text[] := '{}';
    p_kinds   text[] := '{}';
    p_amounts bigint[] := '{}';
    p_metas   text[] := '{}';
BEGIN
    IF NOT dry THEN
        -- Nobody else posts to these orgs until we have.
        PERFORM FROM gateway.credit c WHERE c.org_id = ANY (orgs) ORDER BY c.org_id FOR UPDATE;
    END IF;
    FOR one IN
        SELECT * FROM unnest(orgs, request_ids, charges, metas) AS e (org_id, request_id, charge, meta)
    LOOP
        there := EXISTS (SELECT FROM gateway.credit c WHERE c.org_id = one.org_id);
        SELECT -sum(l.amount), bool_or(l.kind = 'settle') INTO was, settled FROM gateway.ledger l
            WHERE l.org_id = one.org_id AND l.request_id = one.request_id AND l.kind IN ('settle', 'orphan');
        number := 1;
        LOOP
            SELECT l.amount INTO changed FROM gateway.ledger l
                WHERE l.org_id = one.org_id AND l.request_id = one.request_id || '#' || number AND l.kind = 'correction';
            EXIT WHEN NOT FOUND;
            was := was - changed;
            number := number + 1;
        END LOOP;
        IF there AND coalesce(was, 0) <> one.charge AND (was IS NOT NULL OR unknown_too) THEN
            p_orgs := p_orgs || one.org_id;
            p_names := p_names || CASE WHEN settled THEN one.request_id || '#' || number ELSE one.request_id END;
            p_kinds := p_kinds || CASE WHEN settled THEN 'correction' ELSE 'settle' END;
            p_amounts := p_amounts || CASE WHEN settled THEN was - one.charge ELSE -one.charge END;
            p_metas := p_metas || (one.meta::jsonb || jsonb_build_object('corrects', one.request_id, 'was', was))::text;
        END IF;
        charged := was;
        present := there;
        RETURN NEXT;
    END LOOP;
    IF NOT dry AND p_orgs <> '{}' THEN
        PERFORM gateway.post(p_orgs, p_names, p_kinds, p_amounts, p_metas);
        PERFORM pg_notify('gateway_credits', o) FROM (SELECT DISTINCT u FROM unnest(p_orgs) AS u) AS named (o);
    END IF;
END $$;
