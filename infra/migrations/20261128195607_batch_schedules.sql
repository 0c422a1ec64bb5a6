-- migrate:up

-- Batches that come again and again: what each is made of, and when the next one is due.
CREATE TABLE batch.schedules (
    schedule_id text PRIMARY KEY,
    team_id text NOT NULL,
    key_id text NOT NULL,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    cron text NOT NULL,
    time_zone text NOT NULL,
    batch jsonb NOT NULL,                          -- what each batch is made of
    input_file_id text NOT NULL,
    paused boolean NOT NULL DEFAULT false,
    next_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX schedules_by_name ON batch.schedules (team_id, name) WHERE deleted_at IS NULL;
CREATE INDEX schedules_due ON batch.schedules (next_at) WHERE deleted_at IS NULL AND NOT paused;

-- One row for each time that was due, whatever came of it: it is what makes a time have one batch.
CREATE TABLE batch.schedule_runs (
    schedule_id text NOT NULL REFERENCES batch.schedules,
    due_at timestamptz NOT NULL,
    batch_id text REFERENCES batch.batches,
    problem text,                                  -- why there is no batch
    made_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (schedule_id, due_at),
    CHECK ((batch_id IS NULL) = (problem IS NOT NULL))
);
GRANT SELECT, INSERT, UPDATE ON batch.schedules, batch.schedule_runs TO roundhouse_batch;

CREATE VIEW batch_api.schedules_v1 AS
    SELECT schedule_id, team_id, name, cron, time_zone, batch, input_file_id, paused, next_at, created_at
    FROM batch.schedules WHERE deleted_at IS NULL;
CREATE VIEW batch_api.schedule_runs_v1 AS
    SELECT r.schedule_id, s.team_id, r.due_at, r.batch_id, r.problem, r.made_at
    FROM batch.schedule_runs r JOIN batch.schedules s USING (schedule_id);
GRANT SELECT ON batch_api.schedules_v1, batch_api.schedule_runs_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit, roundhouse_batch;

-- migrate:down
DROP VIEW batch_api.schedule_runs_v1, batch_api.schedules_v1;
DROP TABLE batch.schedule_runs, batch.schedules;
