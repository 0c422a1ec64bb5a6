-- migrate:up

-- What a file's lines would take and cost. Counted beside the batches; kept for a day.
CREATE TABLE batch.quotes (
    quote_id text PRIMARY KEY,
    team_id text NOT NULL,
    key_id text NOT NULL,
    endpoint text NOT NULL CHECK (endpoint IN ('/v1/chat/completions', '/v1/completions', '/v1/embeddings')),
    input_file_id text NOT NULL,
    input_path text NOT NULL,
    deadline_s int NOT NULL CHECK (deadline_s > 0),
    option_name text,                              -- NULL: every option of the model's type
    max_gpus int CHECK (max_gpus BETWEEN 1 AND 64),
    state text NOT NULL DEFAULT 'counting' CHECK (state IN ('counting', 'ready', 'failed')),
    errors jsonb NOT NULL DEFAULT '[]',
    quote jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz,
    CHECK ((state = 'ready') = (quote IS NOT NULL) AND (state = 'counting') = (ended_at IS NULL))
);
CREATE INDEX quotes_counting ON batch.quotes (quote_id) WHERE state = 'counting';
CREATE INDEX quotes_of_team ON batch.quotes (team_id) WHERE state = 'counting';
GRANT SELECT, INSERT, UPDATE, DELETE ON batch.quotes TO roundhouse_batch;

CREATE VIEW batch_api.quotes_v1 AS
    SELECT quote_id, team_id, endpoint, input_file_id, deadline_s, option_name, max_gpus, state, errors, quote, created_at,
           ended_at
    FROM batch.quotes;
GRANT SELECT ON batch_api.quotes_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit, roundhouse_batch;

-- How long a worker of each option took from being granted to being ready: the median of its latest starts of a week.
CREATE VIEW scheduler_api.start_times_v1 AS
    SELECT option_id, count(*)::int AS starts,
           percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM ended_at - granted_at))::float8 AS start_s
    FROM (
        SELECT option_id, granted_at, ended_at,
               row_number() OVER (PARTITION BY option_id ORDER BY ended_at DESC) AS newest
        FROM scheduler.starts WHERE succeeded AND ended_at > now() - interval '7 days'
    ) AS recent
    WHERE newest <= 20 GROUP BY option_id;
GRANT SELECT ON scheduler_api.start_times_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

GRANT SELECT ON scheduler_api.start_times_v1, scheduler_api.options_v1, scheduler_api.devices_v1, scheduler_api.quotas_v1,
    billing_api.rates_v1, billing_api.requests_v1, billing_api.hour_counts_v1, billing_api.hour_busy_v1
    TO roundhouse_batch;

-- migrate:down
REVOKE SELECT ON scheduler_api.options_v1, scheduler_api.devices_v1, scheduler_api.quotas_v1,
    billing_api.rates_v1, billing_api.requests_v1, billing_api.hour_counts_v1, billing_api.hour_busy_v1
    FROM roundhouse_batch;
DROP VIEW scheduler_api.start_times_v1;
DROP VIEW batch_api.quotes_v1;
DROP TABLE batch.quotes;
