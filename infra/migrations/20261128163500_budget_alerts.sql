-- migrate:up

-- Told once for each budget, period, share and limit: who raises a limit is told again when that is nearly spent.
CREATE TABLE billing.alerts (
    alert_id text PRIMARY KEY,
    budget_id text NOT NULL REFERENCES billing.budgets,
    team_id text NOT NULL,
    scope text NOT NULL,
    scope_id text NOT NULL,
    period text NOT NULL,
    period_start date NOT NULL,
    percent int NOT NULL CHECK (percent BETWEEN 1 AND 100),
    limit_nanousd bigint NOT NULL,
    spent_nanousd bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    announced_at timestamptz,                  -- NULL until its event was sent
    UNIQUE (budget_id, period_start, percent, limit_nanousd)
);
CREATE INDEX alerts_of_team ON billing.alerts (team_id, alert_id DESC);
CREATE INDEX alerts_to_announce ON billing.alerts (alert_id) WHERE announced_at IS NULL;

CREATE VIEW billing_api.alerts_v1 AS
    SELECT alert_id, budget_id, team_id, scope, scope_id, period, period_start, percent, limit_nanousd, spent_nanousd,
           created_at
    FROM billing.alerts;

-- What a spent budget stops: for one resource, or for all dedicated resources of the team (resource_id NULL).
-- stop_scale_up: no more places are granted; turn_off: billing turns them off, and a start would end the same way.
CREATE VIEW billing_api.capped_resources_v1 AS
    SELECT b.budget_id, b.team_id, CASE WHEN b.scope = 'resource' THEN b.scope_id END AS resource_id, b.actions,
           b.period, b.period_start
    FROM billing_api.budgets_v1 b
    WHERE b.scope IN ('team', 'resource') AND b.actions && ARRAY['stop_scale_up', 'turn_off']
      AND b.posted_nanousd >= b.limit_nanousd;

-- What a spent budget stops of batches: for all of a team, one model, one key or one resource.
CREATE VIEW billing_api.capped_batches_v1 AS
    SELECT b.budget_id, b.team_id, b.scope, b.scope_id, b.period, b.period_start
    FROM billing_api.budgets_v1 b
    WHERE 'stop_batches' = ANY(b.actions) AND b.posted_nanousd >= b.limit_nanousd;

GRANT SELECT, INSERT, UPDATE ON billing.alerts TO roundhouse_billing;
GRANT SELECT ON billing_api.alerts_v1, billing_api.capped_resources_v1, billing_api.capped_batches_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW billing_api.capped_batches_v1, billing_api.capped_resources_v1, billing_api.alerts_v1;
DROP TABLE billing.alerts;
