-- migrate:up

-- The leader's lease. Its epoch fences every write: an old leader that wakes up writes with an old epoch, and fails.
CREATE TABLE scheduler.lease (
    name text PRIMARY KEY,
    owner text NOT NULL,
    epoch bigint NOT NULL,
    expires_at timestamptz NOT NULL
);

CREATE TABLE scheduler.performance_options (
    option_id text PRIMARY KEY,
    model_type text NOT NULL,
    name text NOT NULL CHECK (name ~ '^[a-z0-9][a-z0-9.-]{0,62}$'),
    device_kind text NOT NULL CHECK (device_kind IN ('cpu', 'cuda')),
    precision text NOT NULL CHECK (precision IN ('fp32', 'bf16', 'int8')),
    max_batch int NOT NULL CHECK (max_batch BETWEEN 1 AND 1024),
    max_context_tokens int NOT NULL CHECK (max_context_tokens BETWEEN 16 AND 1048576),
    kv_tokens int NOT NULL CHECK (kv_tokens >= max_context_tokens),
    hourly_rate_nanousd bigint NOT NULL CHECK (hourly_rate_nanousd >= 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (model_type, name)
);

CREATE TABLE scheduler.resources (
    resource_id text PRIMARY KEY,
    team_id text NOT NULL,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    model_type text NOT NULL,
    option_id text NOT NULL REFERENCES scheduler.performance_options,
    pool boolean NOT NULL DEFAULT false,
    wanted text NOT NULL DEFAULT 'off' CHECK (wanted IN ('on', 'off')),
    fixed_count int NOT NULL CHECK (fixed_count BETWEEN 0 AND 64),
    state text NOT NULL DEFAULT 'off' CHECK (state IN ('off', 'starting', 'live', 'draining', 'asleep', 'failed')),
    reason text NOT NULL DEFAULT '',
    expected_live_at timestamptz,              -- while starting: from the history of starts
    changed_at timestamptz NOT NULL DEFAULT now(),
    created_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX resource_name_in_team ON scheduler.resources (team_id, name) WHERE deleted_at IS NULL;
CREATE UNIQUE INDEX one_pool_per_type ON scheduler.resources (model_type) WHERE pool AND deleted_at IS NULL;

-- The state machine of a resource, said again by the database.
CREATE FUNCTION scheduler.check_resource_state() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state <> OLD.state AND NOT (OLD.state || '>' || NEW.state = ANY (ARRAY[
        'off>starting', 'off>asleep',
        'starting>live', 'starting>draining', 'starting>failed', 'starting>off', 'starting>asleep',
        'live>draining', 'live>starting', 'live>failed', 'live>asleep',
        'draining>off', 'draining>live', 'draining>starting', 'draining>asleep',
        'asleep>starting', 'asleep>off',
        'failed>starting', 'failed>off', 'failed>draining', 'failed>live'
    ])) THEN
        RAISE EXCEPTION 'resource % cannot go from % to %', OLD.resource_id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER resource_state BEFORE UPDATE OF state ON scheduler.resources
    FOR EACH ROW EXECUTE FUNCTION scheduler.check_resource_state();

CREATE TABLE scheduler.nodes (
    node_id text PRIMARY KEY,
    agent_id text NOT NULL,
    devices jsonb NOT NULL,
    reported_at timestamptz NOT NULL
);

-- A place is a numbered seat. The primary key makes it impossible that a seat is taken twice, by any number of
-- confused schedulers; the trigger refuses a start at a number that the resource does not have.
CREATE TABLE scheduler.places (
    resource_id text NOT NULL REFERENCES scheduler.resources,
    place int NOT NULL CHECK (place >= 0),
    state text NOT NULL CHECK (state IN ('starting', 'ready', 'draining', 'lost')),
    incarnation text NOT NULL UNIQUE,
    worker_id text NOT NULL UNIQUE,
    node_id text NOT NULL,
    device text NOT NULL,
    epoch bigint NOT NULL,
    phase text NOT NULL DEFAULT 'placing',     -- placing, then what the worker says: starting, loading, warming, ready
    start_attempt int NOT NULL DEFAULT 1,
    granted_at timestamptz NOT NULL DEFAULT now(),
    ready_at timestamptz,
    reported_at timestamptz,
    drain_sent_at timestamptz,
    PRIMARY KEY (resource_id, place)           -- a free place has no row
);

CREATE FUNCTION scheduler.check_place() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    maximum int;
    current_epoch bigint;
BEGIN
    SELECT epoch INTO current_epoch FROM scheduler.lease WHERE name = 'leader';
    IF current_epoch IS NULL OR NEW.epoch <> current_epoch THEN
        RAISE EXCEPTION 'epoch % is not the leader''s', NEW.epoch USING ERRCODE = 'check_violation';
    END IF;
    IF TG_OP = 'INSERT' THEN
        SELECT CASE WHEN wanted = 'on' AND deleted_at IS NULL THEN fixed_count ELSE 0 END INTO maximum
            FROM scheduler.resources WHERE resource_id = NEW.resource_id FOR SHARE;
        IF maximum IS NULL OR NEW.place >= maximum THEN
            RAISE EXCEPTION 'resource % has no place %', NEW.resource_id, NEW.place USING ERRCODE = 'check_violation';
        END IF;
        IF NEW.state <> 'starting' THEN
            RAISE EXCEPTION 'a place begins as starting' USING ERRCODE = 'check_violation';
        END IF;
    ELSIF NEW.state <> OLD.state AND NOT (OLD.state || '>' || NEW.state = ANY (ARRAY[
        'starting>ready', 'starting>draining', 'starting>lost', 'ready>draining', 'ready>lost', 'draining>ready',
        'draining>lost', 'lost>ready', 'lost>draining', 'lost>starting'
    ])) THEN
        RAISE EXCEPTION 'place %/% cannot go from % to %', OLD.resource_id, OLD.place, OLD.state, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER place_rules BEFORE INSERT OR UPDATE ON scheduler.places
    FOR EACH ROW EXECUTE FUNCTION scheduler.check_place();

-- One row per time that a replica was ready: what minutes are billed from. `proved_until` grows with the worker's
-- reports and is never ahead of them; an ended interval is never changed again. A replica that was lost and is heard
-- of again begins a new interval: the time between is not billed.
CREATE TABLE scheduler.state_intervals (
    incarnation text NOT NULL,
    resource_id text NOT NULL REFERENCES scheduler.resources,
    team_id text NOT NULL,
    place int NOT NULL,
    pool boolean NOT NULL,
    hourly_rate_nanousd bigint NOT NULL CHECK (hourly_rate_nanousd >= 0),
    started_at timestamptz NOT NULL,
    proved_until timestamptz NOT NULL,
    ended_at timestamptz,
    PRIMARY KEY (incarnation, started_at),
    CHECK (proved_until >= started_at),
    CHECK (ended_at IS NULL OR ended_at = proved_until)
);
CREATE UNIQUE INDEX one_open_interval ON scheduler.state_intervals (incarnation) WHERE ended_at IS NULL;
CREATE INDEX intervals_by_end ON scheduler.state_intervals (proved_until);
CREATE FUNCTION scheduler.check_interval() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.ended_at IS NOT NULL OR NEW.proved_until < OLD.proved_until
       OR (NEW.incarnation, NEW.resource_id, NEW.team_id, NEW.place, NEW.pool, NEW.hourly_rate_nanousd, NEW.started_at)
          IS DISTINCT FROM
          (OLD.incarnation, OLD.resource_id, OLD.team_id, OLD.place, OLD.pool, OLD.hourly_rate_nanousd, OLD.started_at)
    THEN
        RAISE EXCEPTION 'interval % only grows until it ends', OLD.incarnation USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER interval_grows BEFORE UPDATE ON scheduler.state_intervals
    FOR EACH ROW EXECUTE FUNCTION scheduler.check_interval();
CREATE TRIGGER interval_stays BEFORE DELETE ON scheduler.state_intervals
    FOR EACH ROW EXECUTE FUNCTION public.refuse_change();

-- How starts went: expected times and back-off come from here.
CREATE TABLE scheduler.starts (
    incarnation text PRIMARY KEY,
    resource_id text NOT NULL,
    option_id text NOT NULL,
    granted_at timestamptz NOT NULL,
    ended_at timestamptz NOT NULL,
    succeeded boolean NOT NULL,
    reason text NOT NULL DEFAULT ''
);
CREATE INDEX starts_recent ON scheduler.starts (resource_id, ended_at DESC);

CREATE TABLE scheduler.decisions (
    decision_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    resource_id text NOT NULL,
    decided_at timestamptz NOT NULL DEFAULT now(),
    action text NOT NULL,
    words text NOT NULL,
    inputs jsonb NOT NULL
);
CREATE INDEX decisions_of_resource ON scheduler.decisions (resource_id, decision_id DESC);
CREATE INDEX decisions_turned_on ON scheduler.decisions (resource_id, decided_at) WHERE action = 'turned_on';

-- Answers to commands: a repeated command gets the same answer.
CREATE TABLE scheduler.command_results (
    command_id text PRIMARY KEY,
    result jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE scheduler.dead_letters (
    dead_letter_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    queue text NOT NULL,
    reason text NOT NULL,
    message_type text NOT NULL,
    job_id text,
    team_id text,
    body bytea,                                -- facts about money only: they hold no text of a team
    received_at timestamptz NOT NULL DEFAULT now()
);

CREATE VIEW scheduler_api.options_v1 AS SELECT * FROM scheduler.performance_options;
CREATE VIEW scheduler_api.resources_v1 AS
    SELECT r.resource_id, r.team_id, r.name, r.model_type, r.option_id, r.pool, r.wanted, r.fixed_count, r.state,
           r.reason, r.expected_live_at, r.changed_at, r.created_at, r.deleted_at,
           o.name AS option_name, o.device_kind, o.precision, o.max_batch, o.max_context_tokens, o.kv_tokens,
           o.hourly_rate_nanousd,
           (SELECT count(*) FROM scheduler.places p WHERE p.resource_id = r.resource_id AND p.state = 'ready')::int
               AS live_count
    FROM scheduler.resources r JOIN scheduler.performance_options o USING (option_id);
CREATE VIEW scheduler_api.places_v1 AS
    SELECT resource_id, place, state, phase, node_id, device, worker_id, incarnation, granted_at, ready_at, reported_at
    FROM scheduler.places;
CREATE VIEW scheduler_api.intervals_v1 AS SELECT * FROM scheduler.state_intervals;
CREATE VIEW scheduler_api.decisions_v1 AS SELECT * FROM scheduler.decisions;

GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA scheduler TO roundhouse_scheduler;
GRANT DELETE ON scheduler.places, scheduler.command_results, scheduler.starts, scheduler.decisions, scheduler.nodes
    TO roundhouse_scheduler;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA scheduler TO roundhouse_scheduler;
GRANT SELECT ON ALL TABLES IN SCHEMA scheduler_api
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW scheduler_api.decisions_v1, scheduler_api.intervals_v1, scheduler_api.places_v1, scheduler_api.resources_v1,
    scheduler_api.options_v1;
DROP TABLE scheduler.dead_letters, scheduler.command_results, scheduler.decisions, scheduler.starts,
    scheduler.state_intervals, scheduler.places, scheduler.nodes, scheduler.resources, scheduler.performance_options,
    scheduler.lease;
DROP FUNCTION scheduler.check_interval(), scheduler.check_place(), scheduler.check_resource_state();
