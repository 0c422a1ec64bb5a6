-- migrate:up

-- A worker found that a model's files, its image or its answers are not what they were, and took it out.
CREATE TABLE scheduler.model_alarms (
    event_id text PRIMARY KEY,
    resource_id text NOT NULL REFERENCES scheduler.resources,
    worker_id text NOT NULL,
    model_id text NOT NULL,
    revision int NOT NULL CHECK (revision > 0),
    reason text NOT NULL,
    found_at timestamptz NOT NULL
);
CREATE INDEX model_alarms_of_resource ON scheduler.model_alarms (resource_id, found_at DESC);
CREATE INDEX model_alarms_by_age ON scheduler.model_alarms (found_at);

CREATE VIEW scheduler_api.model_alarms_v1 AS
    SELECT event_id, resource_id, worker_id, model_id, revision, reason, found_at FROM scheduler.model_alarms;

GRANT SELECT, INSERT, UPDATE, DELETE ON scheduler.model_alarms TO roundhouse_scheduler;
GRANT SELECT ON scheduler_api.model_alarms_v1 
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW scheduler_api.model_alarms_v1;
DROP TABLE scheduler.model_alarms;
