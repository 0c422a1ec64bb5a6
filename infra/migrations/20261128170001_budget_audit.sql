-- migrate:up

-- For the auditor alone: what was spent by day, and slices of budgets that still hold something.
CREATE VIEW billing_api.spend_days_v1 AS SELECT * FROM billing.spend_days;
CREATE VIEW billing_api.held_leases_v1 AS
    SELECT lease_id, budget_id, period_start, gateway_id, held_nanousd, horizon_at, created_at
    FROM billing.budget_leases WHERE held_nanousd > 0;
GRANT SELECT ON billing_api.spend_days_v1, billing_api.held_leases_v1 TO roundhouse_audit;

-- migrate:down
DROP VIEW billing_api.held_leases_v1, billing_api.spend_days_v1;
