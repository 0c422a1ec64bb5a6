-- migrate:up

-- The adviser's last answer for each team: computed from other tables, and again every hour.
CREATE TABLE billing.advice (
    team_id text PRIMARY KEY,
    document jsonb NOT NULL,
    computed_at timestamptz NOT NULL DEFAULT now()
);
CREATE VIEW billing_api.advice_v1 AS SELECT * FROM billing.advice;
GRANT SELECT, INSERT, UPDATE ON billing.advice TO roundhouse_billing;
GRANT SELECT ON billing_api.advice_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW billing_api.advice_v1;
DROP TABLE billing.advice;
