-- migrate:up

-- What people want to be resident, beside what jobs ask for: written by commands.
CREATE TABLE scheduler.model_pins (
    resource_id text NOT NULL REFERENCES scheduler.resources,
    model_id text NOT NULL,
    copies int CHECK (copies BETWEEN 1 AND 64),  -- NULL: on every worker
    pinned_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (resource_id, model_id)
);
CREATE TABLE scheduler.model_preloads (          -- asked for once; forgotten after a while
    resource_id text NOT NULL REFERENCES scheduler.resources,
    model_id text NOT NULL,
    asked_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (resource_id, model_id)
);

-- How much room a worker has for models, as it reports.
CREATE TABLE scheduler.worker_memory (
    incarnation text PRIMARY KEY REFERENCES scheduler.places (incarnation) ON DELETE CASCADE,
    model_memory_bytes bigint NOT NULL
);

ALTER TABLE scheduler.worker_models
    ADD COLUMN pinned boolean NOT NULL DEFAULT false,
    ADD COLUMN preload boolean NOT NULL DEFAULT false;
CREATE OR REPLACE VIEW scheduler_api.worker_models_v1 AS
    SELECT p.resource_id, p.place, p.worker_id, p.state AS place_state, m.model_id, m.revision, m.state, m.reason,
           m.weight_bytes, m.loads, m.load_ms_p50, m.load_ms_p95, m.hits, m.misses, m.changed_at, m.pinned, m.preload
    FROM scheduler.worker_models m JOIN scheduler.places p USING (incarnation);
CREATE VIEW scheduler_api.model_pins_v1 AS SELECT resource_id, model_id, copies, pinned_at FROM scheduler.model_pins;

GRANT SELECT, INSERT, UPDATE, DELETE ON scheduler.model_pins, scheduler.model_preloads TO roundhouse_scheduler;
GRANT SELECT, INSERT, UPDATE ON scheduler.worker_memory TO roundhouse_scheduler;
GRANT SELECT ON scheduler_api.model_pins_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW scheduler_api.model_pins_v1;
DROP VIEW scheduler_api.worker_models_v1;
ALTER TABLE scheduler.worker_models DROP COLUMN pinned, DROP COLUMN preload;
CREATE VIEW scheduler_api.worker_models_v1 AS
    SELECT p.resource_id, p.place, p.worker_id, p.state AS place_state, m.model_id, m.revision, m.state, m.reason,
           m.weight_bytes, m.loads, m.load_ms_p50, m.load_ms_p95, m.hits, m.misses, m.changed_at
    FROM scheduler.worker_models m JOIN scheduler.places p USING (incarnation);
GRANT SELECT ON scheduler_api.worker_models_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;
DROP TABLE scheduler.worker_memory, scheduler.model_preloads, scheduler.model_pins;
