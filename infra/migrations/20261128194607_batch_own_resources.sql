-- migrate:up

-- A resource that is there for one piece of work takes no requests of its type, and stays on only for as long as whoever
-- turned it on says so again and again: `on_until` is when it is turned off by itself; NULL: when somebody turns it off.
ALTER TABLE scheduler.resources
    ADD COLUMN takes_traffic boolean NOT NULL DEFAULT true,
    ADD COLUMN on_until timestamptz;

CREATE VIEW scheduler_api.holds_v1 AS SELECT resource_id, takes_traffic, on_until FROM scheduler.resources;
GRANT SELECT ON scheduler_api.holds_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit, roundhouse_batch;

-- The resource that a batch has for itself. `held`: it may be there, and has to go when the batch is over.
CREATE TABLE batch.own_resources (
    batch_id text PRIMARY KEY REFERENCES batch.batches,
    team_id text NOT NULL,
    option_name text,                              -- NULL: the cheapest that is in time
    max_gpus int CHECK (max_gpus BETWEEN 1 AND 64),
    quote_id text,
    state text NOT NULL DEFAULT 'wanted' CHECK (state IN ('wanted', 'held', 'released')),
    option_id text,
    max_batch int,
    gpus int CHECK (gpus BETWEEN 1 AND 64),
    gpus_at_most int,
    start_s double precision,
    counted jsonb,
    quoted jsonb,
    resource_id text,
    created_at timestamptz NOT NULL DEFAULT now(),
    held_at timestamptz,
    released_at timestamptz,
    CHECK (state = 'wanted' OR state = 'released' OR (option_id IS NOT NULL AND gpus IS NOT NULL)),
    CHECK ((state = 'released') = (released_at IS NOT NULL))
);
CREATE INDEX own_resources_to_mind ON batch.own_resources (batch_id) WHERE state <> 'released';
GRANT SELECT, INSERT, UPDATE ON batch.own_resources TO roundhouse_batch;

CREATE VIEW batch_api.own_resources_v1 AS SELECT * FROM batch.own_resources;
GRANT SELECT ON batch_api.own_resources_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit, roundhouse_batch;
GRANT SELECT ON billing_api.capped_resources_v1, scheduler_api.scaling_v1 TO roundhouse_batch;

-- migrate:down
REVOKE SELECT ON billing_api.capped_resources_v1, scheduler_api.scaling_v1 FROM roundhouse_batch;
DROP VIEW batch_api.own_resources_v1;
DROP TABLE batch.own_resources;
DROP VIEW scheduler_api.holds_v1;
ALTER TABLE scheduler.resources DROP COLUMN takes_traffic, DROP COLUMN on_until;
