-- migrate:up

-- What was posted, by day (UTC), for each thing that may have a budget. A job counts on the day it was accepted,
-- minutes on the day they belong to. Written in the transaction that posts.
CREATE TABLE billing.spend_days (
    team_id text NOT NULL,
    scope text NOT NULL CHECK (scope IN ('team', 'resource', 'model', 'key')),
    scope_id text NOT NULL,
    day date NOT NULL,
    posted_nanousd bigint NOT NULL,
    PRIMARY KEY (team_id, scope, scope_id, day)
);
INSERT INTO billing.spend_days
    SELECT team_id, scope, scope_id, day, sum(amount)::bigint FROM (
        SELECT r.team_id, s.scope, s.scope_id, (r.accepted_at AT TIME ZONE 'UTC')::date AS day, r.charged_nanousd AS amount
        FROM billing.requests r CROSS JOIN LATERAL (VALUES
            ('team', r.team_id), ('resource', r.resource_id), ('model', r.model_id), ('key', r.key_id)) s (scope, scope_id)
        WHERE r.charged_nanousd <> 0
        UNION ALL
        SELECT m.team_id, s.scope, s.scope_id, (m.hour AT TIME ZONE 'UTC')::date, m.posted_nanousd
        FROM billing.minute_charges m CROSS JOIN LATERAL (VALUES
            ('team', m.team_id), ('resource', m.resource_id)) s (scope, scope_id)
        WHERE m.posted_nanousd <> 0
    ) posted GROUP BY 1, 2, 3, 4;

CREATE TABLE billing.budgets (
    budget_id text PRIMARY KEY,
    team_id text NOT NULL,
    scope text NOT NULL CHECK (scope IN ('team', 'resource', 'model', 'key')),
    scope_id text NOT NULL,
    period text NOT NULL CHECK (period IN ('day', 'month')),
    limit_nanousd bigint NOT NULL CHECK (limit_nanousd >= 0),
    alert_percents int[] NOT NULL,
    actions text[] NOT NULL
        CHECK (actions <@ ARRAY['refuse_ppt', 'stop_scale_up', 'stop_batches', 'turn_off']),
    created_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX budgets_one_for_each ON billing.budgets (team_id, scope, scope_id, period)
    WHERE deleted_at IS NULL;

-- Slices of what is left, in the hands of gateways. What one holds is what it still may cost beyond what is posted.
CREATE TABLE billing.budget_leases (
    lease_id text PRIMARY KEY,
    budget_id text NOT NULL REFERENCES billing.budgets,
    period_start date NOT NULL,
    gateway_id text NOT NULL,
    granted_nanousd bigint NOT NULL CHECK (granted_nanousd >= 0),
    refused int[] NOT NULL,
    unposted_nanousd bigint NOT NULL,           -- what was answered, for an ask that comes again
    spent_nanousd bigint CHECK (spent_nanousd BETWEEN 0 AND granted_nanousd),  -- NULL until its gateway closes it
    settled_nanousd bigint NOT NULL DEFAULT 0,
    written_off boolean NOT NULL DEFAULT false,
    horizon_at timestamptz NOT NULL,           -- from then on none of its jobs can run any more
    created_at timestamptz NOT NULL DEFAULT now(),
    held_nanousd bigint NOT NULL GENERATED ALWAYS AS (
        CASE WHEN written_off THEN 0
             ELSE greatest(coalesce(spent_nanousd, granted_nanousd) - settled_nanousd, 0) END) STORED
);
CREATE INDEX budget_leases_holding ON billing.budget_leases (budget_id, period_start) WHERE held_nanousd > 0;
CREATE INDEX budget_leases_by_age ON billing.budget_leases (created_at) WHERE held_nanousd = 0;

CREATE VIEW billing_api.budgets_v1 AS
    SELECT b.budget_id, b.team_id, b.scope, b.scope_id, b.period, b.limit_nanousd, b.alert_percents, b.actions,
           b.created_at, b.changed_at, p.period_start,
           (SELECT coalesce(sum(s.posted_nanousd), 0)::bigint FROM billing.spend_days s
            WHERE s.team_id = b.team_id AND s.scope = b.scope AND s.scope_id = b.scope_id
              AND s.day >= p.period_start AND s.day < p.period_end) AS posted_nanousd,
           (SELECT coalesce(sum(l.held_nanousd), 0)::bigint FROM billing.budget_leases l
            WHERE l.budget_id = b.budget_id AND l.period_start = p.period_start AND l.held_nanousd > 0) AS reserved_nanousd
    FROM billing.budgets b CROSS JOIN LATERAL (
        SELECT date_trunc(b.period, now() AT TIME ZONE 'UTC')::date AS period_start,
               (date_trunc(b.period, now() AT TIME ZONE 'UTC') + ('1 ' || b.period)::interval)::date AS period_end) p
    WHERE b.deleted_at IS NULL;

GRANT SELECT, INSERT, UPDATE ON billing.spend_days, billing.budgets, billing.budget_leases TO roundhouse_billing;
GRANT DELETE ON billing.budget_leases TO roundhouse_billing;
GRANT SELECT ON billing_api.budgets_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW billing_api.budgets_v1;
DROP TABLE billing.budget_leases, billing.budgets, billing.spend_days;
