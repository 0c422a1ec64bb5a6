-- migrate:up

-- What requests cost on GPUs that are paid by the minute: shares of what the ledger has for the hour. They explain
-- charges and are none; they are computed again when the charges behind them change, and forgotten with the requests.
CREATE TABLE billing.hour_costs (
    resource_id text NOT NULL,
    hour timestamptz NOT NULL,
    team_id text NOT NULL,
    cost_nanousd bigint NOT NULL CHECK (cost_nanousd >= 0),
    idle_nanousd bigint NOT NULL CHECK (idle_nanousd BETWEEN 0 AND cost_nanousd),
    shared_at timestamptz NOT NULL,
    PRIMARY KEY (resource_id, hour)
);
CREATE INDEX hour_costs_by_age ON billing.hour_costs (hour);

CREATE TABLE billing.request_costs (
    resource_id text NOT NULL,
    hour timestamptz NOT NULL,
    job_id text NOT NULL,
    team_id text NOT NULL,
    key_id text NOT NULL,
    model_name text NOT NULL,
    gpu_us bigint NOT NULL CHECK (gpu_us >= 0),
    cost_nanousd bigint NOT NULL CHECK (cost_nanousd >= 0),
    PRIMARY KEY (resource_id, hour, job_id),
    FOREIGN KEY (resource_id, hour) REFERENCES billing.hour_costs ON DELETE CASCADE
);
CREATE INDEX request_costs_of_team ON billing.request_costs (team_id, hour);
CREATE INDEX request_costs_of_job ON billing.request_costs (job_id);

CREATE VIEW billing_api.hour_costs_v1 AS SELECT * FROM billing.hour_costs;
CREATE VIEW billing_api.request_costs_v1 AS SELECT * FROM billing.request_costs;

GRANT SELECT, INSERT, DELETE ON billing.hour_costs, billing.request_costs TO roundhouse_billing;
GRANT SELECT ON billing_api.hour_costs_v1, billing_api.request_costs_v1 TO roundhouse_gateway, roundhouse_audit;

-- migrate:down
DROP VIEW billing_api.request_costs_v1, billing_api.hour_costs_v1;
DROP TABLE billing.request_costs, billing.hour_costs;
