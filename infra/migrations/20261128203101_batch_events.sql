-- migrate:up

-- Each state that a batch comes to, once and in order. Written by the database with the change itself.
CREATE TABLE batch.batch_events (
    event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    batch_id text NOT NULL REFERENCES batch.batches,
    team_id text NOT NULL,
    state text NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX batch_events_of_team ON batch.batch_events (team_id, event_id);
CREATE INDEX batch_events_of_batch ON batch.batch_events (batch_id, event_id);

CREATE FUNCTION batch.note_state() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' OR NEW.state <> OLD.state THEN
        INSERT INTO batch.batch_events (batch_id, team_id, state) VALUES (NEW.batch_id, NEW.team_id, NEW.state);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER batch_state_noted AFTER INSERT OR UPDATE OF state ON batch.batches
    FOR EACH ROW EXECUTE FUNCTION batch.note_state();
INSERT INTO batch.batch_events (batch_id, team_id, state) SELECT batch_id, team_id, state FROM batch.batches ORDER BY batch_id;
GRANT SELECT, INSERT, UPDATE ON batch.batch_events TO roundhouse_batch;

CREATE VIEW batch_api.batch_events_v1 AS SELECT event_id, batch_id, team_id, state, at FROM batch.batch_events;
GRANT SELECT ON batch_api.batch_events_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit, roundhouse_batch;

-- migrate:down
DROP VIEW batch_api.batch_events_v1;
DROP TRIGGER batch_state_noted ON batch.batches;
DROP FUNCTION batch.note_state();
DROP TABLE batch.batch_events;
