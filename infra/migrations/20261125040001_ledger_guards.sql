-- migrate:up

-- A correction names the transaction that it corrects. Rows from before this rule are left as they are.
ALTER TABLE billing.transactions ADD COLUMN corrects text REFERENCES billing.transactions;
CREATE INDEX transactions_correcting ON billing.transactions (corrects) WHERE corrects IS NOT NULL;
ALTER TABLE billing.transactions ADD CONSTRAINT corrections_name_what_they_correct
    CHECK ((kind = 'correction') = (corrects IS NOT NULL)) NOT VALID;

CREATE FUNCTION billing.check_corrected() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM billing.transactions
                   WHERE transaction_id = NEW.corrects AND team_id = NEW.team_id AND kind <> 'correction'
                     AND job_id IS NOT DISTINCT FROM NEW.job_id
                     AND resource_id IS NOT DISTINCT FROM NEW.resource_id) THEN
        RAISE EXCEPTION 'transaction % corrects nothing that it could be about', NEW.transaction_id
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER corrected_is_there AFTER INSERT ON billing.transactions
    FOR EACH ROW WHEN (NEW.corrects IS NOT NULL) EXECUTE FUNCTION billing.check_corrected();

-- Entries belong to the database transaction that posts theirs: a posted one gets no more, even if they sum to zero.
ALTER TABLE billing.transactions ADD COLUMN posted_in xid8 NOT NULL DEFAULT pg_current_xact_id();

-- What each team has, kept by the ledger's own trigger and by nobody else. Revenue is summed when somebody asks: one
-- row that every charge has to change would make all of them wait for each other.
CREATE TABLE billing.balances (
    account_id text PRIMARY KEY REFERENCES billing.accounts,
    balance_nanousd bigint NOT NULL,
    entries bigint NOT NULL CHECK (entries > 0)
);
INSERT INTO billing.balances
    SELECT e.account_id, sum(e.amount_nanousd), count(*)
    FROM billing.entries e JOIN billing.accounts a USING (account_id) WHERE a.kind = 'team' GROUP BY e.account_id;

-- Its definer's rights, because services may not write balances. Rows are locked in one order: no deadlock.
CREATE FUNCTION billing.add_to_balances() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM added e JOIN billing.transactions t USING (transaction_id)
               WHERE t.posted_in <> pg_current_xact_id()) THEN
        RAISE EXCEPTION 'a posted transaction gets no more entries' USING ERRCODE = 'restrict_violation';
    END IF;
    INSERT INTO billing.balances AS b (account_id, balance_nanousd, entries)
        SELECT e.account_id, sum(e.amount_nanousd), count(*)
        FROM added e JOIN billing.accounts a USING (account_id) WHERE a.kind = 'team'
        GROUP BY e.account_id ORDER BY e.account_id
    ON CONFLICT (account_id) DO UPDATE
        SET balance_nanousd = b.balance_nanousd + EXCLUDED.balance_nanousd, entries = b.entries + EXCLUDED.entries;
    RETURN NULL;
END
$$;
CREATE TRIGGER entries_move_balances AFTER INSERT ON billing.entries
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION billing.add_to_balances();
CREATE TRIGGER balances_follow_entries BEFORE INSERT OR UPDATE OR DELETE ON billing.balances
    FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION public.refuse_change();

CREATE TRIGGER accounts_stay BEFORE UPDATE OR DELETE ON billing.accounts
    FOR EACH ROW EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER accounts_never_emptied BEFORE TRUNCATE ON billing.accounts
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER balances_never_emptied BEFORE TRUNCATE ON billing.balances
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER entries_never_emptied BEFORE TRUNCATE ON billing.entries
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER transactions_never_emptied BEFORE TRUNCATE ON billing.transactions
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER usage_events_never_emptied BEFORE TRUNCATE ON billing.usage_events
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER prices_never_emptied BEFORE TRUNCATE ON billing.prices
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();

CREATE OR REPLACE VIEW billing_api.balances_v1 AS
    SELECT a.team_id, coalesce(b.balance_nanousd, 0)::bigint AS balance_nanousd
    FROM billing.accounts a LEFT JOIN billing.balances b USING (account_id) WHERE a.kind = 'team';

GRANT SELECT ON billing.balances TO roundhouse_billing;

-- migrate:down
CREATE OR REPLACE VIEW billing_api.balances_v1 AS
    SELECT a.team_id, coalesce(sum(e.amount_nanousd), 0)::bigint AS balance_nanousd
    FROM billing.accounts a LEFT JOIN billing.entries e USING (account_id) WHERE a.kind = 'team' GROUP BY a.team_id;
DROP TRIGGER prices_never_emptied ON billing.prices;
DROP TRIGGER usage_events_never_emptied ON billing.usage_events;
DROP TRIGGER transactions_never_emptied ON billing.transactions;
DROP TRIGGER entries_never_emptied ON billing.entries;
DROP TRIGGER accounts_never_emptied ON billing.accounts;
DROP TRIGGER accounts_stay ON billing.accounts;
DROP TRIGGER entries_move_balances ON billing.entries;
DROP TABLE billing.balances;
DROP FUNCTION billing.add_to_balances();
DROP TRIGGER corrected_is_there ON billing.transactions;
DROP FUNCTION billing.check_corrected();
ALTER TABLE billing.transactions DROP COLUMN posted_in, DROP COLUMN corrects;
