-- migrate:up

-- What each job was charged by the token, as the ledger has it: written in the same transaction, kept for good (request
-- records are not). `first_*` is what the first transaction charged, the rest what all of them come to. Jobs charged
-- before this table are filled in by billing from their facts.
CREATE TABLE billing.job_charges (
    job_id text PRIMARY KEY,
    request_id text NOT NULL,
    team_id text NOT NULL,
    key_id text NOT NULL,
    model_type text NOT NULL,
    model_name text NOT NULL,
    work_class text NOT NULL,
    price_id text NOT NULL REFERENCES billing.prices,
    accepted_at timestamptz NOT NULL,
    first_prompt_tokens int NOT NULL,
    first_completion_tokens int NOT NULL,
    first_nanousd bigint NOT NULL,
    prompt_tokens int NOT NULL,
    completion_tokens int NOT NULL,
    amount_nanousd bigint NOT NULL CHECK (amount_nanousd >= 0)
);
CREATE INDEX job_charges_of_team ON billing.job_charges (team_id, accepted_at, job_id);
CREATE INDEX minute_charges_of_team ON billing.minute_charges (team_id, hour);
-- What is neither tokens nor minutes: few rows among many.
CREATE INDEX transactions_other ON billing.transactions (team_id, created_at) WHERE job_id IS NULL AND hour IS NULL;

CREATE VIEW billing_api.job_charges_v1 AS SELECT * FROM billing.job_charges;
-- Credits, payments and their corrections; the amount is what the team got.
CREATE VIEW billing_api.money_in_v1 AS
    SELECT t.transaction_id, t.unique_key, t.kind, t.team_id, t.words, t.created_at, e.amount_nanousd
    FROM billing.transactions t JOIN billing.entries e USING (transaction_id)
    WHERE t.job_id IS NULL AND t.hour IS NULL AND e.account_id = 'team:' || t.team_id;

GRANT SELECT, INSERT, UPDATE ON billing.job_charges TO roundhouse_billing;
GRANT SELECT ON billing_api.job_charges_v1, billing_api.money_in_v1, billing_api.hour_costs_v1, billing_api.request_costs_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
REVOKE SELECT ON billing_api.hour_costs_v1, billing_api.request_costs_v1 FROM roundhouse_scheduler, roundhouse_billing;
DROP VIEW billing_api.money_in_v1, billing_api.job_charges_v1;
DROP INDEX billing.transactions_other, billing.minute_charges_of_team;
DROP TABLE billing.job_charges;
