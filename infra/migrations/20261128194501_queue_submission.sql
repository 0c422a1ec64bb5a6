-- migrate:up

-- Submission of lines through the broker. A team's names there hold its tag, which is random and known to it alone.
CREATE TABLE batch.queue_teams (
    team_id text PRIMARY KEY,
    tag text NOT NULL UNIQUE CHECK (tag ~ '^[0-9a-f]{24}$'),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Users of the teams' vhost, as they should be; the batch service makes the broker agree. Of passwords only what the
-- broker keeps of them as well.
CREATE TABLE batch.queue_credentials (
    credential_id text PRIMARY KEY,
    team_id text NOT NULL REFERENCES batch.queue_teams,
    key_id text NOT NULL,                          -- who made it, and is charged
    name text NOT NULL CHECK (name ~ '^[a-z0-9][a-z0-9-]{0,38}$'),
    password_hash text NOT NULL CHECK (password_hash ~ '^[A-Za-z0-9+/]{48}$'),
    created_at timestamptz NOT NULL DEFAULT now(),
    rotated_at timestamptz,
    revoked_at timestamptz,
    applied_at timestamptz,                        -- since when the broker has it, with this password
    gone_at timestamptz                            -- since when the broker does not have it any more
);
CREATE UNIQUE INDEX queue_credential_names ON batch.queue_credentials (team_id, name) WHERE gone_at IS NULL;

CREATE FUNCTION batch.check_queue_credential() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.gone_at IS NOT NULL OR (OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS NULL) THEN
        RAISE EXCEPTION 'credential % is revoked', OLD.credential_id USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.gone_at IS NOT NULL AND NEW.revoked_at IS NULL THEN
        RAISE EXCEPTION 'credential % is not revoked', OLD.credential_id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER queue_credential BEFORE UPDATE ON batch.queue_credentials
    FOR EACH ROW EXECUTE FUNCTION batch.check_queue_credential();

CREATE VIEW batch_api.queue_credentials_v1 AS
    SELECT c.credential_id, c.team_id, c.key_id, c.name, t.tag, c.created_at, c.rotated_at, c.applied_at IS NOT NULL AS ready
    FROM batch.queue_credentials c JOIN batch.queue_teams t USING (team_id)
    WHERE c.revoked_at IS NULL;

-- Messages by the client's own id: a message that comes again is the same one.
CREATE TABLE batch.submissions (
    team_id text NOT NULL,
    submission_id text NOT NULL CHECK (length(submission_id) BETWEEN 1 AND 128),
    digest bytea NOT NULL,
    credential_id text NOT NULL REFERENCES batch.queue_credentials,
    reply_queue text NOT NULL,
    batch_id text NOT NULL REFERENCES batch.batches,
    first_line int NOT NULL CHECK (first_line > 0),
    lines int NOT NULL CHECK (lines > 0),
    is_told boolean NOT NULL DEFAULT false,        -- that its lines are kept
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (team_id, submission_id)
);
CREATE INDEX submissions_to_tell ON batch.submissions (created_at) WHERE NOT is_told;
CREATE INDEX submissions_of_batch ON batch.submissions (batch_id);

-- Batches whose lines come through the queue; they have no file. Lines join as long as it collects.
CREATE TABLE batch.queue_batches (
    batch_id text PRIMARY KEY REFERENCES batch.batches,
    credential_id text NOT NULL REFERENCES batch.queue_credentials,
    collects_until timestamptz NOT NULL,
    latest_at timestamptz NOT NULL DEFAULT now(),  -- when lines came last
    size_bytes bigint NOT NULL DEFAULT 0
);
CREATE INDEX queue_batches_collecting ON batch.queue_batches (credential_id, collects_until);

-- The text of each such line, and whether its submitter was told what became of it.
CREATE TABLE batch.queue_lines (
    batch_id text NOT NULL,
    line int NOT NULL,
    team_id text NOT NULL,
    submission_id text NOT NULL,
    content bytea NOT NULL,
    reply text NOT NULL DEFAULT 'none' CHECK (reply IN ('none', 'due', 'told')),
    PRIMARY KEY (batch_id, line),
    FOREIGN KEY (batch_id, line) REFERENCES batch.lines ON DELETE CASCADE,
    FOREIGN KEY (team_id, submission_id) REFERENCES batch.submissions DEFERRABLE INITIALLY DEFERRED
) WITH (fillfactor = 75);
CREATE INDEX queue_lines_due ON batch.queue_lines (batch_id, line) WHERE reply = 'due';

-- Whatever ends a line that came through the queue: a reply is due. Lines of files, which have an offset there, pay nothing.
CREATE FUNCTION batch.reply_is_due() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE batch.queue_lines SET reply = 'due' WHERE batch_id = NEW.batch_id AND line = NEW.line;
    RETURN NULL;
END
$$;
CREATE TRIGGER replies_due AFTER UPDATE OF state ON batch.lines FOR EACH ROW
    WHEN (NEW.byte_offset = -1 AND NEW.state IN ('succeeded', 'failed', 'cancelled', 'expired'))
    EXECUTE FUNCTION batch.reply_is_due();

GRANT SELECT, INSERT, UPDATE ON batch.submissions, batch.queue_batches, batch.queue_lines TO roundhouse_batch;
GRANT DELETE ON batch.submissions TO roundhouse_batch;
GRANT SELECT, INSERT, UPDATE ON batch.queue_teams, batch.queue_credentials TO roundhouse_batch;
GRANT SELECT ON batch_api.queue_credentials_v1 TO roundhouse_gateway;

-- migrate:down
DROP VIEW batch_api.queue_credentials_v1;
DROP TRIGGER replies_due ON batch.lines;
DROP TABLE batch.queue_lines, batch.queue_batches, batch.submissions, batch.queue_credentials, batch.queue_teams;
DROP FUNCTION batch.reply_is_due(), batch.check_queue_credential();
