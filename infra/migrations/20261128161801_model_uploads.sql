-- migrate:up

-- A model's files on their way in, over HTTP: what is not registered before it expires is swept.
CREATE TABLE gateway.model_uploads (
    upload_id text PRIMARY KEY,
    team_id text NOT NULL REFERENCES gateway.teams,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);
CREATE INDEX uploads_of_team ON gateway.model_uploads (team_id);

-- One row for each file that is whole, and one for each that is being written: its bytes count from the first on.
CREATE TABLE gateway.upload_files (
    writer text PRIMARY KEY,
    upload_id text NOT NULL REFERENCES gateway.model_uploads ON DELETE CASCADE,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 160),
    size_bytes bigint NOT NULL CHECK (size_bytes >= 0),
    sha256 text CHECK (sha256 ~ '^[0-9a-f]{64}$')      -- NULL while it is written
);
CREATE UNIQUE INDEX one_whole_file ON gateway.upload_files (upload_id, name) WHERE sha256 IS NOT NULL;
CREATE UNIQUE INDEX one_writer ON gateway.upload_files (upload_id, name) WHERE sha256 IS NULL;

GRANT SELECT, INSERT, UPDATE, DELETE ON gateway.model_uploads, gateway.upload_files TO roundhouse_gateway;

-- migrate:down
DROP TABLE gateway.upload_files, gateway.model_uploads;
