-- Limits that apply to one org instead of its policy's, and a way to follow them: every statement that changes some is
-- given the next version, and notes it beside each org that it touched. Whoever has seen everything up to a version reads
-- on from there and misses nothing, whether or not announcements reach him.

CREATE TABLE gateway.limit_override (
    -- No reference to gateway.org: an org may exist only in tokens.
    org_id     text NOT NULL CHECK (org_id ~ '^[A-Za-z0-9._:-]{1,128}$'),
    limit_name text NOT NULL CHECK (limit_name ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$'),
    value      bigint NOT NULL CHECK (value > 0 AND value <= 1000000000000),
    note       text NOT NULL DEFAULT '',
    set_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (org_id, limit_name)
);
COMMENT ON COLUMN gateway.limit_override.value IS 'in the unit of the policy file: whole credits for a limit on credits';

-- One row, and not a sequence: it stays locked until the change is committed, so versions come to be seen in their order,
-- and nobody can see one while the change of an earlier one is still on its way.
CREATE TABLE gateway.limit_override_version (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    version bigint NOT NULL
);
INSERT INTO gateway.limit_override_version (version) VALUES (1);

-- When each org's overrides changed last; an org that has lost all of them stays here, or nobody would learn of it.
CREATE TABLE gateway.limit_override_change (
    org_id  text PRIMARY KEY,
    version bigint NOT NULL
);
CREATE INDEX limit_override_change_version ON gateway.limit_override_change (version, org_id);

-- Before the statement locks any override: two that touch the same orgs never wait for each other in a circle.
CREATE FUNCTION gateway.begin_override_change() RETURNS trigger LANGUAGE plpgsql
    -- Who may change overrides needs no rights on the tables behind them.
    SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
    UPDATE gateway.limit_override_version SET version = version + 1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'gateway.limit_override_version has lost its row; insert one with a version never used before';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER begin_override_change BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON gateway.limit_override
    FOR EACH STATEMENT EXECUTE FUNCTION gateway.begin_override_change();

-- The announcement carries the org, or nothing when there are several.
CREATE FUNCTION gateway.note_override_change() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    orgs    text[] := '{}';
    crowded text;
BEGIN
    -- Asked one by one: only the rows that an operation has can be spoken of.
    IF TG_OP = 'TRUNCATE' THEN
        orgs := ARRAY(SELECT c.org_id FROM gateway.limit_override_change c);
    END IF;
    IF TG_OP IN ('UPDATE', 'DELETE') THEN
        orgs := ARRAY(SELECT b.org_id FROM rows_before b);
    END IF;
    IF TG_OP IN ('INSERT', 'UPDATE') THEN
        orgs := orgs || ARRAY(SELECT a.org_id FROM rows_after a);
        SELECT o.org_id INTO crowded FROM gateway.limit_override o WHERE o.org_id IN (SELECT a.org_id FROM rows_after a)
            GROUP BY o.org_id HAVING count(*) > 64 LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'org % would have more than 64 overrides', crowded USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    orgs := ARRAY(SELECT DISTINCT o.org_id FROM unnest(orgs) AS o (org_id));
    INSERT INTO gateway.limit_override_change AS c (org_id, version)
        SELECT o.org_id, v.version FROM unnest(orgs) AS o (org_id), gateway.limit_override_version v
        ON CONFLICT (org_id) DO UPDATE SET version = EXCLUDED.version;
    IF orgs <> '{}' THEN
        PERFORM pg_notify('gateway_limits', CASE cardinality(orgs) WHEN 1 THEN orgs[1] ELSE '' END);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER note_added_overrides AFTER INSERT ON gateway.limit_override
    REFERENCING NEW TABLE AS rows_after FOR EACH STATEMENT EXECUTE FUNCTION gateway.note_override_change();
CREATE TRIGGER note_changed_overrides AFTER UPDATE ON gateway.limit_override
    REFERENCING OLD TABLE AS rows_before NEW TABLE AS rows_after
    FOR EACH STATEMENT EXECUTE FUNCTION gateway.note_override_change();
CREATE TRIGGER note_removed_overrides AFTER DELETE ON gateway.limit_override
    REFERENCING OLD TABLE AS rows_before FOR EACH STATEMENT EXECUTE FUNCTION gateway.note_override_change();
CREATE TRIGGER note_emptied_overrides AFTER TRUNCATE ON gateway.limit_override
    FOR EACH STATEMENT EXECUTE FUNCTION gateway.note_override_change();
