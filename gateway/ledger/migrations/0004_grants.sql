-- What plans bring, and which part of a balance it is: plan credits are spent first and may end with their period, all
-- other credits were purchased and never expire.

ALTER TABLE gateway.account
    -- When the gateway first heard of the org.
    ADD COLUMN created_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN period_starts timestamptz,
    -- What was charged since the last grant of a plan, by the pocket it came out of: a refund goes back where it came from.
    ADD COLUMN plan_spent bigint NOT NULL DEFAULT 0,
    ADD COLUMN purchased_spent bigint NOT NULL DEFAULT 0,
    ADD CONSTRAINT plan_pocket CHECK (plan_micro >= 0);

-- After charges of `delta` in all, negative when they were more than what was given back: `balance` is what came of it.
CREATE FUNCTION gateway.on_charged(the_org text, delta bigint, balance bigint) RETURNS void LANGUAGE sql AS $$
    UPDATE gateway.account a
    SET plan_micro = least(a.plan_micro + p.change, greatest(0, balance)),
        plan_spent = a.plan_spent - p.change,
        purchased_spent = greatest(0, a.purchased_spent - delta + p.change)
    FROM (
        SELECT CASE WHEN delta < 0 THEN -least(b.plan_micro, -delta)
                    -- What was spent last comes back first, and that is what was purchased.
                    ELSE least(b.plan_spent, greatest(0, delta - b.purchased_spent)) END AS change
        FROM gateway.account b WHERE b.org_id = the_org
    ) AS p WHERE a.org_id = the_org;
$$;

-- The org's grant for a period of its plan, once per `grant_id`, whoever asks and however often; then the org's state. Without
-- a grant id only the period is noted; a plan without periods has null bounds. Times are ms since 1970, by the caller's clock.
-- A period that ends before the one that is noted for the plan was slept over: whoever still asks for it changes nothing.
--   kind     set_initial | add: `amount` on top; set_initial only for an org that no plan has given anything.
--            top_up: what the balance lacks to `amount`.
--            reset: `amount`, in place of what is left of the plan pocket.
--   owed     what Redis owes, as far as the caller knows. It may owe more, up to its cap.
--   lowered  {version, epoch, cap}: what Redis may owe was lowered to `cap` in the account as of that version. It is so here,
--            too, if nobody has changed the account meanwhile. If somebody has, Redis may owe more again: nothing is granted.
-- What Redis may owe, what a lost state of it may have owed and what is held here is taken to be spent out of the plan pocket,
-- so that much of it does not expire. An org without a row in the application's table gets one with `provision` only.
-- granted, expired: micro-credits; null when nothing was granted now. again: because it is to be lowered once more.
CREATE FUNCTION gateway.turn(the_org text, plan_name text, kind text, amount bigint, grant_id text, starts_ms bigint,
                             ends_ms bigint, provision boolean, owed bigint, lowered bigint[])
RETURNS TABLE (granted bigint, expired bigint, again boolean,
               org_id text, balance bigint, version bigint, set_aside bigint, cap bigint, epoch bigint, birth text,
               period_ends_ms bigint, present boolean) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    acc       gateway.account;
    brought   bigint;
    gone      bigint := 0;
    -- It was lowered in another state of the account than this.
    moved     boolean;
    meta      text := jsonb_build_object('plan', plan_name, 'grant', kind)::text;
    starts_at timestamptz := to_timestamp(starts_ms / 1000.0);
    ends_at   timestamptz := to_timestamp(ends_ms / 1000.0);
BEGIN
    PERFORM set_config('gateway.posting', 'on', true);
    IF provision THEN
        INSERT INTO gateway.credit (org_id, credits) VALUES (the_org, 0) ON CONFLICT DO NOTHING;
    END IF;
    -- In the order of every poster: the application's row, then the account.
    PERFORM FROM gateway.credit c WHERE c.org_id = the_org FOR UPDATE;
    IF NOT FOUND THEN
        PERFORM set_config('gateway.posting', '', true);
        RETURN QUERY SELECT NULL::bigint, NULL::bigint, false, s.* FROM gateway.states(ARRAY[the_org]) s;
        RETURN;
    END IF;
    acc := gateway.locked(the_org);
    moved := coalesce(acc.version <> lowered[1] AND acc.epoch = lowered[2] AND acc.cap > lowered[3], false);
    IF acc.version = lowered[1] AND acc.epoch = lowered[2] AND acc.cap > lowered[3] THEN
        UPDATE gateway.account a SET cap = lowered[3], version = a.version + 1 WHERE a.org_id = the_org;
    END IF;
    PERFORM gateway.note_unseen(ARRAY[the_org]);
    acc := gateway.locked(the_org);
    PERFORM set_config('gateway.posting', '', true);
    IF acc.plan = plan_name AND acc.period_ends > ends_at THEN
        RETURN QUERY SELECT NULL::bigint, NULL::bigint, false, s.* FROM gateway.states(ARRAY[the_org]) s;
        RETURN;
    END IF;

    IF grant_id IS NOT NULL AND NOT (kind = 'set_initial' AND acc.plan IS NOT NULL) AND NOT EXISTS (
        SELECT FROM gateway.ledger l WHERE l.org_id = the_org AND l.request_id = grant_id AND l.kind = 'grant') THEN
        IF moved THEN
            RETURN QUERY SELECT NULL::bigint, NULL::bigint, true, s.* FROM gateway.states(ARRAY[the_org]) s;
            RETURN;
        END IF;
        IF kind = 'reset' THEN
            gone := greatest(0, acc.plan_micro - greatest(acc.cap, owed) - acc.lost - acc.held);
        END IF;
        -- The grant's name is taken even when it brings nothing: a period brings once what it brings.
        brought := CASE kind WHEN 'top_up' THEN greatest(0, amount - gateway.balance(the_org)) ELSE amount END;
        IF gone > 0 THEN
            PERFORM gateway.post(ARRAY[the_org, the_org], ARRAY[grant_id, grant_id], ARRAY['expire', 'grant'],
                                 ARRAY[-gone, brought], ARRAY[meta, meta]);
        ELSE
            PERFORM gateway.post(ARRAY[the_org], ARRAY[grant_id], ARRAY['grant'], ARRAY[brought], ARRAY[meta]);
        END IF;
        UPDATE gateway.account a
            SET plan_micro = least(a.plan_micro - gone + brought, greatest(0, gateway.balance(the_org))),
                plan_spent = 0, purchased_spent = 0
            WHERE a.org_id = the_org;
        PERFORM pg_notify('gateway_credits', the_org);
    END IF;
    -- Also when another has turned it, or the org is back at a plan that it had: then nobody need ask again.
    UPDATE gateway.account a
        SET plan = plan_name, period_starts = starts_at, period_ends = ends_at, version = a.version + 1
        WHERE a.org_id = the_org AND (a.plan, a.period_starts, a.period_ends) IS DISTINCT FROM (plan_name, starts_at, ends_at);
    RETURN QUERY SELECT brought, CASE WHEN brought IS NOT NULL THEN gone END, false, s.* FROM gateway.states(ARRAY[the_org]) s;
END $$;
