-- migrate:up

DO $$
BEGIN
    BEGIN
        CREATE ROLE roundhouse_batch NOLOGIN;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
        NULL; -- made by another database on this server
    END;
    GRANT roundhouse_batch TO CURRENT_USER;
END
$$;

CREATE SCHEMA batch;
CREATE SCHEMA batch_api;
GRANT USAGE ON SCHEMA batch TO roundhouse_batch;
GRANT USAGE ON SCHEMA batch_api TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit, roundhouse_batch;
GRANT USAGE ON SCHEMA gateway_api, scheduler_api, billing_api TO roundhouse_batch;
GRANT SELECT ON gateway_api.teams_v1, scheduler_api.resources_v1, billing_api.prices_v1, billing_api.spendable_v1
    TO roundhouse_batch;

-- Files that clients sent. What batches wrote is batch.files: each service writes its own.
CREATE TABLE gateway.files (
    file_id text PRIMARY KEY,
    team_id text NOT NULL REFERENCES gateway.teams,
    key_id text NOT NULL,
    filename text NOT NULL CHECK (length(filename) BETWEEN 1 AND 255),
    purpose text NOT NULL CHECK (purpose IN ('batch')),
    bytes bigint NOT NULL CHECK (bytes >= 0),
    storage_path text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    deleted_at timestamptz
);
CREATE INDEX files_of_team ON gateway.files (team_id, file_id) WHERE deleted_at IS NULL;
CREATE INDEX files_to_sweep ON gateway.files (expires_at) WHERE deleted_at IS NULL AND expires_at IS NOT NULL;
GRANT SELECT, INSERT, UPDATE ON gateway.files TO roundhouse_gateway;

CREATE VIEW gateway_api.files_v1 AS
    SELECT file_id, team_id, filename, purpose, bytes, storage_path, created_at, expires_at FROM gateway.files
    WHERE deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now());

-- Every revision, not the current one alone: a batch keeps the one that it began with.
CREATE VIEW gateway_api.model_revisions_v1 AS
    SELECT m.model_id, r.revision, m.team_id, t.slug AS team_slug, t.is_platform, m.name, m.signature, y.name AS model_type,
           r.folder, r.context_tokens, (r.manifest->>'vocab_size')::int AS vocab_size,
           r.manifest->'eos_token_ids' AS eos_token_ids, m.created_at, r.revision = m.current_revision AS is_current,
           r.base_model_id, r.base_revision, bt.slug || '/' || b.name AS base_name, br.folder AS base_folder
    FROM gateway.models m
    JOIN gateway.teams t USING (team_id)
    JOIN gateway.model_types y USING (signature)
    JOIN gateway.model_revisions r USING (model_id)
    LEFT JOIN gateway.model_revisions br ON br.model_id = r.base_model_id AND br.revision = r.base_revision
    LEFT JOIN gateway.models b ON b.model_id = r.base_model_id
    LEFT JOIN gateway.teams bt ON bt.team_id = b.team_id
    WHERE m.deleted_at IS NULL;
GRANT SELECT ON gateway_api.files_v1, gateway_api.model_revisions_v1 TO roundhouse_batch;

-- One batch service acts, the others stand by: its epoch fences every write.
CREATE TABLE batch.lease (
    name text PRIMARY KEY,
    owner text NOT NULL,
    epoch bigint NOT NULL,
    expires_at timestamptz NOT NULL
);

CREATE TABLE batch.batches (
    batch_id text PRIMARY KEY,
    team_id text NOT NULL,
    key_id text NOT NULL,
    endpoint text NOT NULL CHECK (endpoint IN ('/v1/chat/completions', '/v1/completions', '/v1/embeddings')),
    input_file_id text NOT NULL,
    input_path text NOT NULL,
    completion_window text NOT NULL,
    metadata jsonb NOT NULL,
    output_expires_after_s int CHECK (output_expires_after_s > 0),
    state text NOT NULL DEFAULT 'validating' CHECK (state IN ('validating', 'failed', 'in_progress', 'finalizing',
        'completed', 'expired', 'cancelling', 'cancelled')),
    errors jsonb NOT NULL DEFAULT '[]',
    model_id text,
    revision int,
    model_name text,
    model_type text,
    total int NOT NULL DEFAULT 0,
    completed int NOT NULL DEFAULT 0,
    failed int NOT NULL DEFAULT 0,
    prompt_tokens bigint NOT NULL DEFAULT 0,
    completion_tokens bigint NOT NULL DEFAULT 0,
    lines_per_s real NOT NULL DEFAULT 0,
    tokens_per_s real NOT NULL DEFAULT 0,
    waiting_for text NOT NULL DEFAULT '',          -- why nothing runs now, for people
    output_file_id text,
    error_file_id text,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    in_progress_at timestamptz,
    finalizing_at timestamptz,
    completed_at timestamptz,
    failed_at timestamptz,
    expired_at timestamptz,
    cancelling_at timestamptz,
    cancelled_at timestamptz,
    CHECK (completed >= 0 AND failed >= 0 AND completed + failed <= total)
);
CREATE INDEX batches_of_team ON batch.batches (team_id, batch_id);
CREATE INDEX batches_open ON batch.batches (batch_id)
    WHERE state IN ('validating', 'in_progress', 'finalizing', 'cancelling');

CREATE FUNCTION batch.check_batch_state() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state <> OLD.state AND NOT (OLD.state || '>' || NEW.state = ANY (ARRAY[
        'validating>failed', 'validating>in_progress', 'validating>cancelling',
        'in_progress>finalizing', 'in_progress>cancelling',
        'finalizing>completed', 'finalizing>expired', 'cancelling>cancelled'
    ])) THEN
        RAISE EXCEPTION 'batch % cannot go from % to %', OLD.batch_id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER batch_state BEFORE UPDATE OF state ON batch.batches
    FOR EACH ROW EXECUTE FUNCTION batch.check_batch_state();

-- One row per line; it ends once. The text of a line stays in its file, the row knows where.
-- Rows change in place twice in their life: the room for it is left in each page.
CREATE TABLE batch.lines (
    batch_id text NOT NULL REFERENCES batch.batches,
    line int NOT NULL CHECK (line > 0),
    custom_id text NOT NULL,
    byte_offset bigint NOT NULL,
    byte_length int NOT NULL,
    state text NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled', 'expired')),
    job_id text,                                   -- the first of its jobs, while and after it runs
    jobs int NOT NULL DEFAULT 0,
    resource_id text,
    billing text,
    accepted_unix_ms bigint,
    request_id text,
    status_code int,
    response bytea,                                -- the answer's body, JSON
    prompt_tokens int NOT NULL DEFAULT 0,
    completion_tokens int NOT NULL DEFAULT 0,
    PRIMARY KEY (batch_id, line)
) WITH (fillfactor = 75);

CREATE FUNCTION batch.check_line_state() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state IN ('succeeded', 'failed', 'cancelled', 'expired') THEN
        RAISE EXCEPTION 'line % of % is over', OLD.line, OLD.batch_id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER line_state BEFORE UPDATE OF state ON batch.lines
    FOR EACH ROW EXECUTE FUNCTION batch.check_line_state();

-- What batches wrote: outputs and errors.
CREATE TABLE batch.files (
    file_id text PRIMARY KEY,
    team_id text NOT NULL,
    batch_id text NOT NULL REFERENCES batch.batches,
    filename text NOT NULL,
    bytes bigint NOT NULL,
    storage_path text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    deleted_at timestamptz
);
CREATE INDEX batch_files_of_team ON batch.files (team_id, file_id) WHERE deleted_at IS NULL;

CREATE TABLE batch.command_results (
    command_id text PRIMARY KEY,
    result jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Facts that must reach billing: written with the change that makes them true, published by a relay.
CREATE TABLE batch.outbox (
    event_id text PRIMARY KEY,
    payload jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    sent_at timestamptz
);
CREATE INDEX outbox_unsent ON batch.outbox (created_at) WHERE sent_at IS NULL;

CREATE VIEW batch_api.batches_v1 AS SELECT * FROM batch.batches;
CREATE VIEW batch_api.files_v1 AS
    SELECT file_id, team_id, filename, 'batch_output' AS purpose, bytes, storage_path, created_at, expires_at FROM batch.files
    WHERE deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now());
CREATE VIEW batch_api.results_v1 AS
    SELECT l.batch_id, b.team_id, l.line, l.custom_id, l.state, l.request_id, l.status_code, l.response
    FROM batch.lines l JOIN batch.batches b USING (batch_id);

GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA batch TO roundhouse_batch;
GRANT DELETE ON batch.outbox, batch.command_results, batch.lines TO roundhouse_batch;
GRANT SELECT ON batch_api.batches_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit, roundhouse_batch;
GRANT SELECT ON batch_api.files_v1, batch_api.results_v1 TO roundhouse_gateway; -- a team's text

-- migrate:down
DROP VIEW batch_api.results_v1, batch_api.files_v1, batch_api.batches_v1;
DROP TABLE batch.outbox, batch.command_results, batch.files, batch.lines, batch.batches, batch.lease;
DROP FUNCTION batch.check_line_state(), batch.check_batch_state();
DROP VIEW gateway_api.model_revisions_v1, gateway_api.files_v1;
DROP TABLE gateway.files;
REVOKE ALL ON gateway_api.teams_v1, scheduler_api.resources_v1, billing_api.prices_v1, billing_api.spendable_v1
    FROM roundhouse_batch;
REVOKE USAGE ON SCHEMA gateway_api, scheduler_api, billing_api FROM roundhouse_batch;
DROP SCHEMA batch_api, batch;
