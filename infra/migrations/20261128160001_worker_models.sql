-- migrate:up

-- Which models each worker holds, and what it measured of them: written from the workers' reports. The rows go with the
-- worker's place; how many a worker may have is bounded by who writes them.
CREATE TABLE scheduler.worker_models (
    incarnation text NOT NULL REFERENCES scheduler.places (incarnation) ON DELETE CASCADE,
    model_id text NOT NULL,
    revision int NOT NULL,
    state text NOT NULL CHECK (state IN ('absent', 'loading', 'ready', 'evicting', 'failed')),
    reason text NOT NULL DEFAULT '',           -- why it failed
    weight_bytes bigint NOT NULL DEFAULT 0,    -- in the worker's memory, or when it last was there
    loads bigint NOT NULL DEFAULT 0,
    load_ms_p50 bigint NOT NULL DEFAULT 0,     -- of the latest loads
    load_ms_p95 bigint NOT NULL DEFAULT 0,
    hits bigint NOT NULL DEFAULT 0,            -- jobs that found it ready
    misses bigint NOT NULL DEFAULT 0,
    changed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (incarnation, model_id, revision)
);

CREATE VIEW scheduler_api.worker_models_v1 AS
    SELECT p.resource_id, p.place, p.worker_id, p.state AS place_state, m.model_id, m.revision, m.state, m.reason,
           m.weight_bytes, m.loads, m.load_ms_p50, m.load_ms_p95, m.hits, m.misses, m.changed_at
    FROM scheduler.worker_models m JOIN scheduler.places p USING (incarnation);

GRANT SELECT, INSERT, UPDATE, DELETE ON scheduler.worker_models TO roundhouse_scheduler;
GRANT SELECT ON scheduler_api.worker_models_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW scheduler_api.worker_models_v1;
DROP TABLE scheduler.worker_models;
