-- Credits: the application's table behind a view of ours, and everything that may happen to an org's account.
--
-- Every change of an account gives it a new version. What Redis works with is the whole row as of a version, a *state*:
-- balance, what of it is set aside, the cap on what Redis may owe, epoch, birth, end of the grant period.
--   balance = credit.credits * 1,000,000 + account.micro, in micro-credits
--   Redis may owe `cap` at most. What is held here fits beside that: balance - cap - lost - held never goes below zero by
--   a hold. When a state of Redis is lost, what it may have owed stays aside as `lost` until every gateway that lived then
--   has registered again what it knows of, or until `lost_until`.
-- Locks, always in this order: the application's rows by org, accounts by org, holds by org and request. Posting takes all
-- of them; the rest an account and its holds, or holds alone. Nobody waits for one longer than a second: whoever asked has
-- given up by then, and his statement would stay in everybody's way.

-- In a database of the release before: what took the table ai_credits for granted.
DROP FUNCTION IF EXISTS gateway.grant_credits(text, text, bigint, text);
DROP FUNCTION IF EXISTS gateway.post(text[], text[], text[], bigint[], text[]);
DROP FUNCTION IF EXISTS gateway.note_external_change() CASCADE;

ALTER TABLE gateway.account
    ADD COLUMN epoch        bigint NOT NULL DEFAULT 1,
    -- The one Redis hash that `cap` was given to; empty: none yet.
    ADD COLUMN birth        text NOT NULL DEFAULT '',
    ADD COLUMN cap          bigint NOT NULL DEFAULT 0 CHECK (cap >= 0),
    ADD COLUMN lost         bigint NOT NULL DEFAULT 0 CHECK (lost >= 0),
    ADD COLUMN lost_until   timestamptz,
    -- Instances that have not yet said what they know of the lost state.
    ADD COLUMN waiting      text[] NOT NULL DEFAULT '{}',
    ADD COLUMN held         bigint NOT NULL DEFAULT 0 CHECK (held >= 0),
    -- Whole credits that the ledger accounts for: where the application's table says otherwise, nobody told us.
    ADD COLUMN credits_seen bigint NOT NULL DEFAULT 0,
    ADD COLUMN period_ends  timestamptz,
    ADD COLUMN plan         text,
    -- What of the balance a plan brought.
    ADD COLUMN plan_micro   bigint NOT NULL DEFAULT 0;
-- The release before knew of every change, by its trigger.
DO $$ BEGIN
    IF EXISTS (SELECT FROM gateway.account) THEN
        UPDATE gateway.account a SET credits_seen = coalesce(c.credits, 0) FROM ai_credits c WHERE c.organization_id = a.org_id;
    END IF;
END $$;
CREATE INDEX account_lost ON gateway.account (lost_until) WHERE lost > 0 OR waiting <> '{}';

ALTER TABLE gateway.ledger DROP CONSTRAINT ledger_kind_check;
ALTER TABLE gateway.ledger ADD CONSTRAINT ledger_kind_check
    CHECK (kind IN ('opening', 'grant', 'external', 'settle', 'orphan', 'correction', 'expire'));

-- Holds taken here: of requests that came while Redis was away, and of all in the mode `through`.
CREATE TABLE gateway.hold (
    org_id     text NOT NULL,
    request_id text NOT NULL,
    amount     bigint NOT NULL CHECK (amount >= 0),
    used       bigint NOT NULL CHECK (used >= 0),
    -- The gateway that took it: for a person who looks.
    instance   text NOT NULL,
    deadline   timestamptz NOT NULL,
    PRIMARY KEY (org_id, request_id)
) WITH (fillfactor = 70);
CREATE INDEX hold_deadline ON gateway.hold (deadline);

-- Gateways that live, by the name each process gives itself.
CREATE TABLE gateway.instance (
    instance_id text PRIMARY KEY,
    seen_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- What gateway.bind made of the configuration; a row at most.
CREATE TABLE gateway.binding (
    single         boolean PRIMARY KEY DEFAULT true CHECK (single),
    -- As configured, and what was found by that name.
    table_name     text NOT NULL,
    org_column     text NOT NULL,
    credits_column text NOT NULL,
    mode           text NOT NULL CHECK (mode IN ('managed', 'attach', 'readonly')),
    relation       text NOT NULL
);

-- What a plan can still have brought of so many whole credits and the fraction beside them: a debt is nothing. What somebody
-- takes by hand is taken from what was purchased first, and what that does not cover is gone from the plan pocket for good.
CREATE FUNCTION gateway.worth(credits bigint, micro integer) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT greatest(0, least(9007199254740992, credits::numeric * 1000000 + micro))::bigint;
$$;

-- What the gateway has not been told of, found by comparing: changes of these orgs' credits become `external` entries and are
-- announced. The rows and accounts of `orgs` are locked by the caller. Returns the orgs that were changed.
CREATE FUNCTION gateway.note_unseen(orgs text[]) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    changed   text[];
    now_there bigint[];
    deltas    bigint[];
BEGIN
    SELECT array_agg(d.org_id), array_agg(d.credits), array_agg(d.credits - d.seen) INTO changed, now_there, deltas FROM (
        SELECT o.org_id, coalesce(c.credits, 0)::bigint AS credits, coalesce(a.credits_seen, 0) AS seen
        FROM (SELECT DISTINCT u FROM unnest(orgs) AS u) AS o (org_id)
        LEFT JOIN gateway.credit c ON c.org_id = o.org_id LEFT JOIN gateway.account a ON a.org_id = o.org_id
        WHERE coalesce(c.credits, 0) <> coalesce(a.credits_seen, 0) ORDER BY o.org_id
    ) AS d;
    IF changed IS NULL THEN
        RETURN;
    END IF;
    RETURN QUERY
        WITH bumped AS (
            INSERT INTO gateway.account AS a (org_id, version, credits_seen)
                SELECT d.org_id, 1, d.credits FROM unnest(changed, now_there) AS d (org_id, credits)
                ON CONFLICT (org_id) DO UPDATE SET version = a.version + 1, credits_seen = EXCLUDED.credits_seen,
                    plan_micro = least(a.plan_micro, gateway.worth(EXCLUDED.credits_seen, a.micro))
                RETURNING a.org_id, a.version
        ), noted AS (
            INSERT INTO gateway.ledger (org_id, request_id, kind, amount, meta)
                SELECT d.org_id, 'sql:' || b.version, 'external', d.delta * 1000000, '{"found": "by comparing"}'
                FROM unnest(changed, deltas) AS d (org_id, delta) JOIN bumped b ON b.org_id = d.org_id
        )
        SELECT c.org_id FROM unnest(changed) AS c (org_id), LATERAL pg_notify('gateway_credits', c.org_id);
END $$;

-- Whatever others changed is in the ledger, also where no trigger tells. Returns the orgs.
CREATE FUNCTION gateway.catch_up() RETURNS SETOF text LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    changed text[];
BEGIN
    SELECT array_agg(coalesce(c.org_id, a.org_id)) INTO changed
        FROM (SELECT v.* FROM gateway.credit v WHERE v.org_id IS NOT NULL) AS c
        FULL JOIN gateway.account a ON a.org_id = c.org_id
        WHERE coalesce(c.credits, 0) <> coalesce(a.credits_seen, 0);
    IF changed IS NULL THEN
        RETURN;
    END IF;
    PERFORM FROM gateway.credit c WHERE c.org_id = ANY (changed) ORDER BY c.org_id FOR UPDATE;
    PERFORM FROM gateway.account a WHERE a.org_id = ANY (changed) ORDER BY a.org_id FOR UPDATE;
    RETURN QUERY SELECT gateway.note_unseen(changed);
END $$;

-- The same, asked for again and again by every gateway: while one looks, the others need not.
CREATE FUNCTION gateway.poll_external() RETURNS SETOF text LANGUAGE plpgsql AS $$
BEGIN
    IF pg_try_advisory_xact_lock(hashtext('gateway.poll_external')) THEN
        RETURN QUERY SELECT gateway.catch_up();
    END IF;
END $$;

-- Any change of the application's table that the gateway did not make itself becomes an `external` entry and is announced.
-- A row that is given to another org leaves the one and comes to the other. No value at all counts as zero credits.
-- Arguments of the trigger: the columns of the org and of its credits.
CREATE FUNCTION gateway.note_external_change() RETURNS trigger LANGUAGE plpgsql
    -- The application that changes its table may have no rights on schema gateway.
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
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM gateway.note_unseen(ARRAY(SELECT a.org_id FROM gateway.account a WHERE a.credits_seen <> 0));
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        old_org := to_jsonb(OLD) ->> TG_ARGV[0];
        old_credits := coalesce((to_jsonb(OLD) ->> TG_ARGV[1])::bigint, 0);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        new_org := to_jsonb(NEW) ->> TG_ARGV[0];
        new_credits := coalesce((to_jsonb(NEW) ->> TG_ARGV[1])::bigint, 0);
    END IF;
    FOR the_org, delta IN
        SELECT c.org, sum(c.credits) FROM (VALUES (old_org, -old_credits), (new_org, new_credits)) AS c (org, credits)
        WHERE c.org IS NOT NULL GROUP BY c.org ORDER BY c.org
    LOOP
        CONTINUE WHEN delta = 0 AND old_org = new_org;
        INSERT INTO gateway.account AS a (org_id, version, credits_seen) VALUES (the_org, 1, delta)
            ON CONFLICT (org_id) DO UPDATE SET version = a.version + 1, credits_seen = a.credits_seen + delta,
                plan_micro = least(a.plan_micro, gateway.worth(a.credits_seen + delta, a.micro))
            RETURNING a.version INTO new_version;
        INSERT INTO gateway.ledger (org_id, request_id, kind, amount, meta)
            VALUES (the_org, 'sql:' || new_version, 'external', delta * 1000000,
                    jsonb_build_object('by', session_user, 'operation', lower(TG_OP)));
        PERFORM pg_notify('gateway_credits', the_org);
    END LOOP;
    RETURN NULL;
END $$;

-- The application's table, found by the name that is configured; made when it is missing and may be made. What cannot be
-- is an error GW001 that begins with the key of gateway.yaml at fault.
CREATE FUNCTION gateway.find_table(tab text, org_col text, credits_col text, new_mode text) RETURNS regclass
LANGUAGE plpgsql AS $$
DECLARE
    part  text[] := string_to_array(tab, '.');
    named text := (SELECT string_agg(quote_ident(p), '.' ORDER BY n) FROM unnest(part) WITH ORDINALITY AS u (p, n));
    -- Wherever the application has it; else in the first schema that is not ours. (For a role called `gateway` that is not
    -- the first of its search path.)
    target regclass := to_regclass(named);
    bound text := (SELECT b.table_name FROM gateway.binding b);
    type  text;
BEGIN
    IF target IS NULL AND new_mode = 'managed' THEN
        -- A name that was mistyped would take from every org what it has.
        IF EXISTS (SELECT FROM gateway.account a WHERE a.credits_seen <> 0) THEN
            RAISE EXCEPTION 'credits.table: there is no table %; the credits of the orgs are, or were, in %', tab, bound
                USING ERRCODE = 'GW001';
        END IF;
        IF cardinality(part) = 1 THEN
            named := quote_ident((SELECT s FROM unnest(current_schemas(false)) WITH ORDINALITY AS p (s, n)
                                  WHERE s <> 'gateway' ORDER BY n LIMIT 1)) || '.' || named;
        END IF;
        EXECUTE format('CREATE TABLE %s (%I text PRIMARY KEY, %I bigint NOT NULL DEFAULT 0,
                        updated_at timestamptz NOT NULL DEFAULT now())', named, org_col, credits_col);
        RETURN to_regclass(named);
    END IF;
    IF target IS NULL THEN
        RAISE EXCEPTION 'credits.table: there is no table %', tab USING ERRCODE = 'GW001';
    END IF;
    IF (SELECT r.relkind FROM pg_class r WHERE r.oid = target) NOT IN ('r', 'p') THEN
        RAISE EXCEPTION 'credits.table: % is not a table', tab USING ERRCODE = 'GW001';
    END IF;
    type := (SELECT format_type(c.atttypid, NULL) FROM pg_attribute c
             WHERE c.attrelid = target AND c.attname = org_col AND c.attnum > 0 AND NOT c.attisdropped);
    IF type IS NULL OR type NOT IN ('text', 'character varying') THEN
        RAISE EXCEPTION 'credits.org_column: %.% %', tab, org_col, coalesce('is ' || type || ', not text', 'is missing')
            USING ERRCODE = 'GW001';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_index i JOIN pg_attribute c ON c.attrelid = target AND c.attnum = i.indkey[0]
                   WHERE i.indrelid = target AND c.attname = org_col
                     AND i.indisunique AND i.indpred IS NULL AND i.indnkeyatts = 1) THEN
        RAISE EXCEPTION 'credits.org_column: %.% is not unique', tab, org_col USING ERRCODE = 'GW001';
    END IF;
    type := (SELECT format_type(c.atttypid, NULL) FROM pg_attribute c
             WHERE c.attrelid = target AND c.attname = credits_col AND c.attnum > 0 AND NOT c.attisdropped);
    IF type IS NULL OR type NOT IN ('bigint', 'integer') THEN
        RAISE EXCEPTION 'credits.credits_column: %.% %', tab, credits_col,
            coalesce('is ' || type || ', not bigint', 'is missing') USING ERRCODE = 'GW001';
    END IF;
    RETURN target;
END $$;

-- The triggers that tell of other writers are on the table `target`, or nowhere. Who may make one may not always drop it, so one
-- that is right stays.
CREATE FUNCTION gateway.set_triggers(target regclass, org_col text, credits_col text, new_mode text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    columns bytea := convert_to(org_col, 'UTF8') || '\x00' || convert_to(credits_col, 'UTF8') || '\x00';
    one     record;
    noting  boolean := false;
    emptied boolean := false;
BEGIN
    FOR one IN SELECT t.tgname, t.tgrelid::regclass AS relation, t.tgargs FROM pg_trigger t
               WHERE t.tgfoid = 'gateway.note_external_change'::regproc AND t.tgparentid = 0
    LOOP
        IF one.relation = target AND new_mode <> 'readonly' AND one.tgname = 'note_external_change' AND one.tgargs = columns THEN
            noting := true;
        ELSIF one.relation = target AND new_mode <> 'readonly' AND one.tgname = 'note_emptied' THEN
            emptied := true;
        ELSE
            EXECUTE format('DROP TRIGGER %I ON %s', one.tgname, one.relation);
        END IF;
    END LOOP;
    IF new_mode <> 'readonly' AND NOT noting THEN
        -- Not only of these columns: the application may have triggers of its own that change them.
        EXECUTE format('CREATE TRIGGER note_external_change AFTER INSERT OR UPDATE OR DELETE ON %s
                        FOR EACH ROW EXECUTE FUNCTION gateway.note_external_change(%L, %L)', target, org_col, credits_col);
    END IF;
    IF new_mode <> 'readonly' AND NOT emptied THEN
        EXECUTE format('CREATE TRIGGER note_emptied AFTER TRUNCATE ON %s
                        FOR EACH STATEMENT EXECUTE FUNCTION gateway.note_external_change()', target);
    END IF;
    -- A trigger that is off tells of nothing.
    IF new_mode <> 'readonly' AND EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = target AND t.tgenabled NOT IN ('O', 'A')
                                          AND t.tgfoid = 'gateway.note_external_change'::regproc) THEN
        EXECUTE format('ALTER TABLE %s ENABLE TRIGGER note_external_change', target);
        EXECUTE format('ALTER TABLE %s ENABLE TRIGGER note_emptied', target);
    END IF;
END $$;

-- From now on the application's table is `tab` with these columns. What is there on the day the gateway arrives is each
-- org's opening balance; what changed while the gateway was bound to nothing, or elsewhere, is `external`.
--   managed   it is created when it is missing, and has a trigger that notes what others change
--   attach    the same, but that it must be there
--   readonly  no trigger; what others changed is found by comparing (gateway.poll_external)
CREATE FUNCTION gateway.bind(tab text, org_col text, credits_col text, new_mode text) RETURNS void LANGUAGE plpgsql
    -- A trigger is made when nobody is writing. Those who come after us wait as long as we do.
    SET lock_timeout = '5s' AS $$
DECLARE
    target  regclass;
    rights text := 'SELECT, INSERT, UPDATE' || CASE new_mode WHEN 'readonly' THEN '' ELSE ', TRIGGER' END;
BEGIN
    target := gateway.find_table(tab, org_col, credits_col, new_mode);
    DROP VIEW IF EXISTS gateway.credit;
    EXECUTE format('CREATE VIEW gateway.credit AS SELECT %I AS org_id, %I AS credits FROM %s', org_col, credits_col, target);
    PERFORM gateway.set_triggers(target, org_col, credits_col, new_mode);
    DELETE FROM gateway.binding;
    INSERT INTO gateway.binding (table_name, org_column, credits_column, mode, relation)
        SELECT tab, org_col, credits_col, new_mode, format('%I.%I', n.nspname, r.relname)
        FROM pg_class r JOIN pg_namespace n ON n.oid = r.relnamespace WHERE r.oid = target;
    WITH fresh AS (
        INSERT INTO gateway.account (org_id, version, credits_seen)
            SELECT c.org_id, 1, coalesce(c.credits, 0) FROM gateway.credit c WHERE c.org_id IS NOT NULL ORDER BY c.org_id
            ON CONFLICT DO NOTHING RETURNING org_id, credits_seen
    )
    INSERT INTO gateway.ledger (org_id, request_id, kind, amount)
        SELECT f.org_id, 'opening', 'opening', f.credits_seen * 1000000 FROM fresh f;
    PERFORM gateway.catch_up();
EXCEPTION WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'credits.schema: %; on %, the gateway''s role needs %', SQLERRM, tab, rights USING ERRCODE = 'GW001';
END $$;

-- What the configuration says is handed over by whoever migrates.
SELECT gateway.bind(
    coalesce(nullif(current_setting('gateway.credits_table', true), ''), 'ai_credits'),
    coalesce(nullif(current_setting('gateway.org_column', true), ''), 'organization_id'),
    coalesce(nullif(current_setting('gateway.credits_column', true), ''), 'credits'),
    coalesce(nullif(current_setting('gateway.credits_mode', true), ''), 'managed'));

-- The states of these orgs; of one without a row in the application's table too: it has nothing.
CREATE FUNCTION gateway.states(orgs text[])
RETURNS TABLE (org_id text, balance bigint, version bigint, set_aside bigint, cap bigint, epoch bigint, birth text,
               period_ends_ms bigint, present boolean) LANGUAGE sql STABLE AS $$
    SELECT o.org_id,
           -- No balance is so absurd that it fails the statement, and with it all the other orgs: 2^53 is as far as Redis
           -- counts.
           CASE WHEN c.org_id IS NULL THEN 0
                ELSE greatest(-9007199254740992, least(9007199254740992,
                     coalesce(c.credits, 0)::numeric * 1000000 + coalesce(a.micro, 0)))::bigint END,
           coalesce(a.version, 0), coalesce(a.lost + a.held, 0), coalesce(a.cap, 0), coalesce(a.epoch, 1),
           coalesce(a.birth, ''), coalesce(floor(extract(epoch FROM a.period_ends) * 1000), 0)::bigint, c.org_id IS NOT NULL
    FROM unnest(orgs) AS o (org_id)
    LEFT JOIN gateway.credit c ON c.org_id = o.org_id LEFT JOIN gateway.account a ON a.org_id = o.org_id;
$$;

-- Post entries, any number of times with one effect, and return the state of every org named.
-- A `settle` after an `orphan` of the same request posts the difference; an `orphan` after a `settle` posts nothing. Either
-- ends the request's hold, if it has one here.
-- Rows are locked in the order of org_id, so that posters never wait for each other in a circle. Only orgs whose row was
-- there to be locked are posted to; one that comes into being meanwhile is dealt with as it was when we began.
CREATE FUNCTION gateway.post(orgs text[], request_ids text[], kinds text[], amounts bigint[], metas text[])
RETURNS TABLE (org_id text, balance bigint, version bigint, set_aside bigint, cap bigint, epoch bigint, birth text,
               period_ends_ms bigint, present boolean) LANGUAGE plpgsql SET lock_timeout = '1s'
    -- Plans are kept: one that was made for a ledger of a few rows would read all of it for each entry, until it is analyzed.
    SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    named   text[] := ARRAY(SELECT DISTINCT o FROM unnest(orgs) AS o);
    there   text[];
    all_there boolean;
    -- What was posted, entry by entry; a settle's amount is what its orphan has not charged yet.
    p_orgs  text[];
    p_kinds text[];
    p_sums  bigint[];
    s_orgs  text[];
    s_sums  bigint[];
    charged record;
BEGIN
    PERFORM set_config('gateway.posting', 'on', true);
    SELECT coalesce(array_agg(c.org_id), '{}') INTO there FROM (
        SELECT v.org_id FROM gateway.credit v WHERE v.org_id = ANY (named) ORDER BY v.org_id FOR UPDATE
    ) AS c;
    INSERT INTO gateway.account (org_id)
        SELECT t.org_id FROM unnest(there) AS t (org_id)
        WHERE NOT EXISTS (SELECT FROM gateway.account a WHERE a.org_id = t.org_id) ORDER BY t.org_id ON CONFLICT DO NOTHING;
    PERFORM FROM gateway.account a WHERE a.org_id = ANY (named) ORDER BY a.org_id FOR UPDATE;
    PERFORM gateway.note_unseen(named);

    all_there := cardinality(there) = cardinality(named);
    IF NOT all_there THEN
        INSERT INTO gateway.dead_letter (org_id, request_id, kind, amount, meta)
            SELECT e.org_id, e.request_id, e.kind, e.amount, e.meta::jsonb
            FROM unnest(orgs, request_ids, kinds, amounts, metas) AS e (org_id, request_id, kind, amount, meta)
            WHERE e.org_id <> ALL (there)
            ORDER BY e.org_id, e.request_id, e.kind ON CONFLICT DO NOTHING;
    END IF;

    WITH posted AS (
        INSERT INTO gateway.ledger AS l (org_id, request_id, kind, amount, meta)
        SELECT e.org_id, e.request_id, e.kind, e.amount, e.meta::jsonb
        FROM unnest(orgs, request_ids, kinds, amounts, metas) AS e (org_id, request_id, kind, amount, meta)
        WHERE e.kind <> 'settle' AND (all_there OR e.org_id = ANY (there))
          AND NOT (e.kind = 'orphan' AND EXISTS (
              SELECT FROM gateway.ledger s
              WHERE s.org_id = e.org_id AND s.request_id = e.request_id AND s.kind = 'settle'))
        ON CONFLICT DO NOTHING RETURNING l.org_id, l.kind, l.amount
    ) SELECT array_agg(p.org_id), array_agg(p.kind), array_agg(p.amount) INTO p_orgs, p_kinds, p_sums FROM posted p;

    -- A second statement, so that it sees the orphans which the first one posted.
    WITH posted AS (
        INSERT INTO gateway.ledger AS l (org_id, request_id, kind, amount, meta)
        SELECT e.org_id, e.request_id, e.kind, e.amount - coalesce(o.amount, 0), e.meta::jsonb
        FROM unnest(orgs, request_ids, kinds, amounts, metas) AS e (org_id, request_id, kind, amount, meta)
        LEFT JOIN gateway.ledger o
            ON o.org_id = e.org_id AND o.request_id = e.request_id AND o.kind = 'orphan'
        WHERE e.kind = 'settle' AND (all_there OR e.org_id = ANY (there))
        ON CONFLICT DO NOTHING RETURNING l.org_id, l.amount
    ) SELECT array_agg(p.org_id), array_agg(p.amount) INTO s_orgs, s_sums FROM posted p;

    WITH over AS MATERIALIZED (
        SELECT h.org_id, h.request_id FROM gateway.hold h
        JOIN unnest(orgs, request_ids, kinds) AS e (org_id, request_id, kind)
            ON e.org_id = h.org_id AND e.request_id = h.request_id AND e.kind IN ('settle', 'orphan')
        ORDER BY h.org_id, h.request_id FOR UPDATE OF h
    ), ended AS (
        DELETE FROM gateway.hold h USING over o WHERE h.org_id = o.org_id AND h.request_id = o.request_id
        RETURNING h.org_id, h.amount
    ), sums AS (
        SELECT e.org_id, sum(e.amount) AS amount FROM ended e GROUP BY e.org_id
    )
    UPDATE gateway.account a SET held = a.held - s.amount, version = a.version + 1 FROM sums s WHERE a.org_id = s.org_id;

    FOR charged IN
        WITH deltas AS (
            SELECT p.org_id, sum(p.amount)::bigint AS amount,
                   sum(p.amount) FILTER (WHERE p.kind IN ('settle', 'orphan', 'correction'))::bigint AS charge
            FROM (
                SELECT * FROM unnest(p_orgs, p_kinds, p_sums)
                UNION ALL SELECT s.org_id, 'settle', s.amount FROM unnest(s_orgs, s_sums) AS s (org_id, amount)
            ) AS p (org_id, kind, amount) GROUP BY p.org_id
        ), after AS (
            SELECT d.org_id, d.charge, a.plan, coalesce(c.credits, 0)::bigint * 1000000 + a.micro + d.amount AS ucredits
            FROM deltas d JOIN gateway.credit c ON c.org_id = d.org_id JOIN gateway.account a ON a.org_id = d.org_id
        ), accounts AS (
            -- floor division keeps 0 <= micro < 1,000,000 for debts as well
            UPDATE gateway.account a
            SET micro = n.ucredits - floor(n.ucredits / 1000000.0) * 1000000, version = a.version + 1,
                credits_seen = floor(n.ucredits / 1000000.0)
            FROM after n WHERE a.org_id = n.org_id
        ), credits AS (
            UPDATE gateway.credit c SET credits = floor(n.ucredits / 1000000.0) FROM after n
            WHERE c.org_id = n.org_id AND c.credits IS DISTINCT FROM floor(n.ucredits / 1000000.0)
        )
        SELECT n.org_id, n.charge, n.ucredits FROM after n WHERE n.plan IS NOT NULL AND n.charge <> 0
    LOOP
        PERFORM gateway.on_charged(charged.org_id, charged.charge, charged.ucredits);
    END LOOP;

    PERFORM set_config('gateway.posting', '', true);
    -- An org whose row is gone has nothing, as of the version that its going made.
    RETURN QUERY SELECT * FROM gateway.states(named);
END $$;

-- Those of the orgs whose rows nobody has locked, or that have none.
CREATE FUNCTION gateway.unlocked(orgs text[]) RETURNS SETOF text LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    mine text[];
BEGIN
    mine := ARRAY(SELECT c.org_id FROM gateway.credit c WHERE c.org_id = ANY (orgs) ORDER BY c.org_id FOR UPDATE SKIP LOCKED);
    mine := mine || ARRAY(SELECT o FROM unnest(orgs) AS o WHERE NOT EXISTS (SELECT FROM gateway.credit c WHERE c.org_id = o));
    RETURN QUERY SELECT a.org_id FROM gateway.account a WHERE a.org_id = ANY (mine) ORDER BY a.org_id FOR UPDATE SKIP LOCKED;
    RETURN QUERY SELECT m FROM unnest(mine) AS m WHERE NOT EXISTS (SELECT FROM gateway.account a WHERE a.org_id = m);
END $$;

-- Give an org credits, once per grant id; the org's row is created when there is none.
CREATE FUNCTION gateway.grant_credits(the_org text, grant_id text, amount bigint, meta text)
RETURNS TABLE (org_id text, balance bigint, version bigint, set_aside bigint, cap bigint, epoch bigint, birth text,
               period_ends_ms bigint, present boolean) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('gateway.posting', 'on', true);
    INSERT INTO gateway.credit (org_id, credits) VALUES (the_org, 0) ON CONFLICT DO NOTHING;
    RETURN QUERY SELECT * FROM gateway.post(ARRAY[the_org], ARRAY[grant_id], ARRAY['grant'], ARRAY[amount], ARRAY[meta]);
    PERFORM pg_notify('gateway_credits', the_org);
END $$;

-- The account's row, locked, and made when there is none.
CREATE FUNCTION gateway.locked(the_org text) RETURNS gateway.account LANGUAGE plpgsql AS $$
DECLARE
    acc gateway.account;
BEGIN
    SELECT a.* INTO acc FROM gateway.account a WHERE a.org_id = the_org FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO gateway.account (org_id) VALUES (the_org) ON CONFLICT DO NOTHING;
        SELECT a.* INTO acc FROM gateway.account a WHERE a.org_id = the_org FOR UPDATE;
    END IF;
    RETURN acc;
END $$;

-- What the org has here now: whole micro-credits. After gateway.locked, so that nobody changes the other parts.
CREATE FUNCTION gateway.balance(the_org text) RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT s.balance FROM gateway.states(ARRAY[the_org]) s;
$$;

-- Gateways that have been heard of lately.
CREATE FUNCTION gateway.living() RETURNS SETOF text LANGUAGE sql AS $$
    SELECT i.instance_id FROM gateway.instance i WHERE i.seen_at > clock_timestamp() - interval '15 s';
$$;

-- From now on the cap is that of the Redis hash born as `new_birth`. If another one had a cap, that one is lost, and with
-- it the knowledge of what it owed. One epoch belongs to one hash, so that a late call of a dead one never counts.
CREATE FUNCTION gateway.adopt(acc gateway.account, new_birth text, grace_ms bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    living text[];
BEGIN
    IF acc.birth = new_birth THEN
        RETURN;
    END IF;
    IF acc.cap = 0 AND acc.lost = 0 AND acc.waiting = '{}' THEN
        -- The first of all needs no epoch of its own: there is none that it must be told from.
        UPDATE gateway.account a
            SET birth = new_birth, epoch = a.epoch + CASE a.birth WHEN '' THEN 0 ELSE 1 END, version = a.version + 1
            WHERE a.org_id = acc.org_id;
        RETURN;
    END IF;
    living := ARRAY(SELECT l FROM gateway.living() AS l ORDER BY l);
    UPDATE gateway.account a
        SET birth = new_birth, epoch = a.epoch + 1, version = a.version + 1, lost = a.lost + a.cap, cap = 0,
            lost_until = clock_timestamp() + grace_ms * interval '1 ms', waiting = living
        WHERE a.org_id = acc.org_id;
    PERFORM pg_notify('gateway_epochs', acc.org_id || ' ' || acc.epoch + 1);
END $$;

-- Redis needs to owe `need`: its cap is that, or more so that it need not ask again soon, or all there is to have: twice as
-- much, `least_cap`, or `percent` of what there is, whichever is the most. Nothing changes for a hash of another epoch.
CREATE FUNCTION gateway.raise_cap(the_org text, the_epoch bigint, the_birth text, need bigint, least_cap bigint, grace_ms bigint,
                                  percent integer DEFAULT 0)
RETURNS TABLE (org_id text, balance bigint, version bigint, set_aside bigint, cap bigint, epoch bigint, birth text,
               period_ends_ms bigint, present boolean) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    acc  gateway.account := gateway.locked(the_org);
    free bigint;
BEGIN
    IF acc.epoch = the_epoch AND the_birth <> '' THEN
        PERFORM gateway.adopt(acc, the_birth, grace_ms);
        acc := gateway.locked(the_org);
        free := gateway.balance(the_org) - acc.lost - acc.held;
        free := least(free, greatest(2 * need, least_cap, free / 100 * percent));
        -- Also when it had enough: then Redis has lowered its own, and this version says that it need not have.
        IF free > acc.cap OR need <= acc.cap THEN
            UPDATE gateway.account a SET cap = greatest(a.cap, free), version = a.version + 1 WHERE a.org_id = the_org;
        END IF;
    END IF;
    RETURN QUERY SELECT * FROM gateway.states(ARRAY[the_org]);
END $$;

-- Redis has lowered the cap of this hash to `new_cap`, as of this version: so it is here, unless anything has changed since.
-- A row when it is.
CREATE FUNCTION gateway.lower_cap(the_org text, the_epoch bigint, the_birth text, the_version bigint, new_cap bigint)
RETURNS TABLE (org_id text, balance bigint, version bigint, set_aside bigint, cap bigint, epoch bigint, birth text,
               period_ends_ms bigint, present boolean) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    UPDATE gateway.account a SET cap = new_cap, version = a.version + 1
        WHERE a.org_id = the_org AND a.epoch = the_epoch AND a.birth = the_birth AND a.version = the_version
          AND a.cap > new_cap;
    IF FOUND THEN
        RETURN QUERY SELECT * FROM gateway.states(ARRAY[the_org]);
    END IF;
END $$;

-- Redis has a version of the account that this database never gave out, or has forgotten: it was restored, or a standby that
-- had not got everything took over. It goes on after that one, so that whatever is still under way of what is lost counts for
-- nothing. Nothing changes when it already has.
CREATE FUNCTION gateway.go_on_after(the_org text, the_version bigint, the_epoch bigint)
RETURNS TABLE (org_id text, balance bigint, version bigint, set_aside bigint, cap bigint, epoch bigint, birth text,
               period_ends_ms bigint, present boolean) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    PERFORM gateway.locked(the_org);
    UPDATE gateway.account a SET version = greatest(a.version, the_version) + 1, epoch = greatest(a.epoch, the_epoch)
        WHERE a.org_id = the_org AND (a.version <= the_version OR a.epoch < the_epoch);
    RETURN QUERY SELECT * FROM gateway.states(ARRAY[the_org]);
END $$;

-- The instance has registered again, in the hash born as `the_birth`, what it knows of the org, and Redis now owes `owed`
-- in all. An empty birth: it knew of nothing. When the last has said so, nothing is lost any more. Nothing changes when
-- nobody waits for this instance, or the epoch is another one.
CREATE FUNCTION gateway.acknowledge(the_instance text, the_org text, the_epoch bigint, the_birth text, owed bigint, grace_ms bigint)
RETURNS TABLE (org_id text, balance bigint, version bigint, set_aside bigint, cap bigint, epoch bigint, birth text,
               period_ends_ms bigint, present boolean) LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
#variable_conflict use_column
DECLARE
    acc gateway.account := gateway.locked(the_org);
BEGIN
    IF acc.epoch = the_epoch AND the_instance = ANY (acc.waiting) THEN
        IF the_birth <> '' AND the_birth <> acc.birth THEN
            -- It registered in a hash that nobody knows yet: a loss of its own, for which all register again.
            PERFORM gateway.adopt(acc, the_birth, grace_ms);
        ELSE
            acc.waiting := array_remove(acc.waiting, the_instance);
            UPDATE gateway.account a
                SET cap = CASE the_birth WHEN '' THEN a.cap ELSE greatest(a.cap, owed) END, waiting = acc.waiting,
                    lost = CASE acc.waiting WHEN '{}' THEN 0 ELSE a.lost END, version = a.version + 1
                WHERE a.org_id = the_org;
            IF acc.waiting = '{}' THEN
                PERFORM pg_notify('gateway_credits', the_org);
            END IF;
        END IF;
    END IF;
    RETURN QUERY SELECT * FROM gateway.states(ARRAY[the_org]);
END $$;

-- The instance lives. Returns how many do, and for each org that waits for it the epoch (a row without org otherwise). What
-- was lost longer ago than anybody may take to tell of it is there again.
CREATE FUNCTION gateway.beat(the_instance text) RETURNS TABLE (instances bigint, org_id text, epoch bigint)
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
#variable_conflict use_column
DECLARE
    living  bigint;
    the_org text;
BEGIN
    INSERT INTO gateway.instance (instance_id) VALUES (the_instance)
        ON CONFLICT (instance_id) DO UPDATE SET seen_at = clock_timestamp();
    -- Not one that another is about to delete, or that beats again: its row may wait for ours.
    DELETE FROM gateway.instance i WHERE i.instance_id IN (
        SELECT o.instance_id FROM gateway.instance o WHERE o.seen_at < clock_timestamp() - interval '1 day'
        FOR UPDATE SKIP LOCKED);
    SELECT count(*) INTO living FROM gateway.living();
    FOR the_org IN
        WITH due AS (
            SELECT a.org_id FROM gateway.account a
            WHERE (a.lost > 0 OR a.waiting <> '{}') AND a.lost_until < clock_timestamp()
            ORDER BY a.org_id FOR UPDATE SKIP LOCKED
        )
        UPDATE gateway.account a SET lost = 0, waiting = '{}', version = a.version + 1 FROM due d
        WHERE a.org_id = d.org_id RETURNING a.org_id
    LOOP
        PERFORM pg_notify('gateway_credits', the_org);
    END LOOP;
    RETURN QUERY SELECT living, a.org_id, a.epoch FROM gateway.account a
        WHERE (a.lost > 0 OR a.waiting <> '{}') AND the_instance = ANY (a.waiting);
    IF NOT FOUND THEN
        RETURN QUERY SELECT living, NULL::text, NULL::bigint;
    END IF;
END $$;

-- The instance has ended, and left nothing behind: nobody waits for it.
CREATE FUNCTION gateway.leave(the_instance text) RETURNS void LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    the_org text;
BEGIN
    FOR the_org IN
        SELECT a.org_id FROM gateway.account a
        WHERE (a.lost > 0 OR a.waiting <> '{}') AND the_instance = ANY (a.waiting) ORDER BY a.org_id
    LOOP
        PERFORM gateway.acknowledge(the_instance, the_org, a.epoch, '', 0, 0) FROM gateway.account a WHERE a.org_id = the_org;
    END LOOP;
    DELETE FROM gateway.instance i WHERE i.instance_id = the_instance;
END $$;

-- Hold `want` for a request, or what there is of it down to `least`: of what Redis may not spend. capped: false leaves out
-- of account what Redis may owe. Repeating it returns what was taken (DUP); GONE: the request has ended already.
CREATE FUNCTION gateway.take_hold(the_org text, the_request text, want bigint, least_hold bigint, owed bigint,
                                  the_instance text, lease_ms bigint, capped boolean)
RETURNS TABLE (status text, taken bigint, available bigint, owned bigint,
               org_id text, balance bigint, version bigint, set_aside bigint, cap bigint, epoch bigint, birth text,
               period_ends_ms bigint, present boolean) LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
#variable_conflict use_column
DECLARE
    acc     gateway.account;
    has     bigint;
    free    bigint;
    amount  bigint;
    before  bigint;
    verdict text := 'OK';
BEGIN
    IF NOT EXISTS (SELECT FROM gateway.credit c WHERE c.org_id = the_org) THEN
        RETURN QUERY SELECT 'NOCREDIT', 0::bigint, 0::bigint, 0::bigint, s.* FROM gateway.states(ARRAY[the_org]) s;
        RETURN;
    END IF;
    acc := gateway.locked(the_org);
    has := gateway.balance(the_org);
    free := has - acc.held - CASE WHEN capped THEN acc.cap + acc.lost ELSE 0 END;
    amount := least(want, free);
    before := (SELECT h.amount FROM gateway.hold h WHERE h.org_id = the_org AND h.request_id = the_request);
    IF before IS NOT NULL THEN
        verdict := 'DUP';
        amount := before;
    ELSIF EXISTS (SELECT FROM gateway.ledger l WHERE l.org_id = the_org AND l.request_id = the_request
                  AND l.kind IN ('settle', 'orphan')) THEN
        verdict := 'GONE';
        amount := 0;
    ELSIF amount < least_hold THEN
        verdict := CASE WHEN has < least_hold THEN 'NOCREDIT' ELSE 'INFLIGHT' END;
        amount := 0;
    ELSE
        INSERT INTO gateway.hold (org_id, request_id, amount, used, instance, deadline)
            VALUES (the_org, the_request, amount, least(owed, amount), the_instance,
                    clock_timestamp() + lease_ms * interval '1 ms');
        UPDATE gateway.account a SET held = a.held + amount, version = a.version + 1 WHERE a.org_id = the_org;
    END IF;
    RETURN QUERY SELECT verdict, amount, free, has, s.* FROM gateway.states(ARRAY[the_org]) s;
END $$;

-- A running request that holds here needs `more`, or what there is of it. OK | REFUSED | GONE. Said twice it holds more, never
-- less; what is not used comes back when the request ends.
CREATE FUNCTION gateway.extend_hold(the_org text, the_request text, more bigint, capped boolean)
RETURNS TABLE (status text, taken bigint, available bigint, owned bigint,
               org_id text, balance bigint, version bigint, set_aside bigint, cap bigint, epoch bigint, birth text,
               period_ends_ms bigint, present boolean) LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
#variable_conflict use_column
DECLARE
    acc     gateway.account := gateway.locked(the_org);
    has     bigint := gateway.balance(the_org);
    free    bigint := has - acc.held - CASE WHEN capped THEN acc.cap + acc.lost ELSE 0 END;
    granted bigint := greatest(0, least(more, free));
    verdict text := 'OK';
BEGIN
    UPDATE gateway.hold h SET amount = h.amount + granted WHERE h.org_id = the_org AND h.request_id = the_request;
    IF NOT FOUND THEN
        verdict := 'GONE';
        granted := 0;
    ELSIF granted = 0 THEN
        verdict := 'REFUSED';
    ELSE
        UPDATE gateway.account a SET held = a.held + granted, version = a.version + 1 WHERE a.org_id = the_org;
    END IF;
    RETURN QUERY SELECT verdict, granted, free, has, s.* FROM gateway.states(ARRAY[the_org]) s;
END $$;

-- Holds last another lease, those of them that are still there. `used` never goes back, nor beyond what is held.
CREATE FUNCTION gateway.renew_holds(orgs text[], request_ids text[], used_now bigint[], lease_ms bigint) RETURNS void
LANGUAGE sql SET lock_timeout = '1s' AS $$
    WITH mine AS MATERIALIZED (
        SELECT h.org_id, h.request_id, e.used FROM gateway.hold h
        JOIN unnest(orgs, request_ids, used_now) AS e (org_id, request_id, used)
            ON e.org_id = h.org_id AND e.request_id = h.request_id
        ORDER BY h.org_id, h.request_id FOR UPDATE OF h
    )
    UPDATE gateway.hold h SET used = greatest(h.used, least(h.amount, m.used)),
           deadline = clock_timestamp() + lease_ms * interval '1 ms'
    FROM mine m WHERE h.org_id = m.org_id AND h.request_id = m.request_id;
$$;

-- Holds whose lease is over become `orphan` entries, at most `most` of them. on_expiry: checkpoint | hold | release.
CREATE FUNCTION gateway.sweep_holds(on_expiry text, most integer) RETURNS TABLE (org_id text, request_id text, charged bigint)
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
#variable_conflict use_column
DECLARE
    due      text[];
    orgs     text[];
    requests text[];
    charges  bigint[];
BEGIN
    due := ARRAY(SELECT DISTINCT d.org_id FROM (
        SELECT h.org_id FROM gateway.hold h WHERE h.deadline < clock_timestamp() ORDER BY h.deadline LIMIT most) AS d);
    IF due = '{}' THEN
        RETURN;
    END IF;
    -- As posting does. Then a hold that is still due stays so: nobody can renew, extend or end it any more.
    PERFORM FROM gateway.credit c WHERE c.org_id = ANY (due) ORDER BY c.org_id FOR UPDATE;
    PERFORM FROM gateway.account a WHERE a.org_id = ANY (due) ORDER BY a.org_id FOR UPDATE;
    SELECT array_agg(d.org_id), array_agg(d.request_id), array_agg(d.charge) INTO orgs, requests, charges FROM (
        SELECT h.org_id, h.request_id, CASE on_expiry WHEN 'hold' THEN h.amount WHEN 'release' THEN 0 ELSE h.used END AS charge
        FROM gateway.hold h WHERE h.org_id = ANY (due) AND h.deadline < clock_timestamp()
        ORDER BY h.org_id, h.request_id LIMIT most FOR UPDATE
    ) AS d;
    IF orgs IS NULL THEN
        RETURN;
    END IF;
    PERFORM gateway.post(orgs, requests, array_fill('orphan'::text, ARRAY[cardinality(orgs)]),
                         ARRAY(SELECT -c FROM unnest(charges) WITH ORDINALITY AS u (c, n) ORDER BY n),
                         array_fill(jsonb_build_object('basis', on_expiry)::text, ARRAY[cardinality(orgs)]));
    RETURN QUERY SELECT * FROM unnest(orgs, requests, charges);
END $$;
