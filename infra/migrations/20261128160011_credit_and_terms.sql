-- migrate:up

-- Money comes in from two sides: what the platform grants, and what teams pay. Each is an account of its own, so that
-- the books tell a gift from cash.
ALTER TABLE billing.accounts DROP CONSTRAINT accounts_kind_check;
ALTER TABLE billing.accounts ADD CONSTRAINT accounts_kind_check
    CHECK (kind IN ('team', 'revenue', 'credits', 'payments'));
ALTER TABLE billing.transactions DROP CONSTRAINT transactions_kind_check;
ALTER TABLE billing.transactions ADD CONSTRAINT transactions_kind_check
    CHECK (kind IN ('tokens', 'minutes', 'correction', 'credit', 'payment'));

-- How a team pays, from when, and who said so: never changed, the newest row of a team counts. A team without one is
-- postpaid without a limit.
CREATE TABLE billing.team_terms (
    terms_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    team_id text NOT NULL,
    pays text NOT NULL CHECK (pays IN ('prepaid', 'postpaid')),
    credit_limit_nanousd bigint CHECK (credit_limit_nanousd >= 0),  -- what a postpaid team may owe; NULL: any amount
    actor text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CHECK (pays = 'postpaid' OR credit_limit_nanousd IS NULL)
);
CREATE INDEX team_terms_of_team ON billing.team_terms (team_id, terms_id DESC);
CREATE TRIGGER team_terms_stay BEFORE UPDATE OR DELETE ON billing.team_terms
    FOR EACH ROW EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER team_terms_never_emptied BEFORE TRUNCATE ON billing.team_terms
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();

-- What each team that has terms may still spend; NULL: without a bound, as for teams that are not in here.
-- The same rule as services/billing/spendable.py, which a test compares.
CREATE VIEW billing_api.spendable_v1 AS
    SELECT t.team_id, t.pays, t.credit_limit_nanousd, coalesce(b.balance_nanousd, 0)::bigint AS balance_nanousd,
           CASE WHEN t.pays = 'prepaid' THEN greatest(coalesce(b.balance_nanousd, 0), 0)
                WHEN t.credit_limit_nanousd IS NOT NULL
                    THEN greatest(coalesce(b.balance_nanousd, 0) + t.credit_limit_nanousd, 0)
           END::bigint AS spendable_nanousd
    FROM (SELECT DISTINCT ON (team_id) team_id, pays, credit_limit_nanousd
          FROM billing.team_terms ORDER BY team_id, terms_id DESC) t
    LEFT JOIN billing.balances b ON b.account_id = 'team:' || t.team_id;

GRANT SELECT, INSERT ON billing.team_terms TO roundhouse_billing;
GRANT SELECT ON billing_api.spendable_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW billing_api.spendable_v1;
DROP TABLE billing.team_terms;
ALTER TABLE billing.transactions DROP CONSTRAINT transactions_kind_check;
ALTER TABLE billing.transactions ADD CONSTRAINT transactions_kind_check
    CHECK (kind IN ('tokens', 'minutes', 'correction', 'credit'));
ALTER TABLE billing.accounts DROP CONSTRAINT accounts_kind_check;
ALTER TABLE billing.accounts ADD CONSTRAINT accounts_kind_check CHECK (kind IN ('team', 'revenue'));
