-- migrate:up

CREATE TABLE gateway.teams (
    team_id text PRIMARY KEY,
    slug text NOT NULL UNIQUE CHECK (slug ~ '^[a-z0-9][a-z0-9-]{0,38}$'),
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    is_platform boolean NOT NULL DEFAULT false,
    ppt_fallback boolean NOT NULL DEFAULT false,
    suspended boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX one_platform_team ON gateway.teams (is_platform) WHERE is_platform;

CREATE TABLE gateway.api_keys (
    key_id text PRIMARY KEY,
    team_id text NOT NULL REFERENCES gateway.teams,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    prefix text NOT NULL,                      -- shown in lists, never enough to use
    secret_sha256 bytea NOT NULL UNIQUE,       -- 256 random bits need no slow hash
    scopes text[] NOT NULL CHECK (scopes <@ ARRAY['inference', 'manage', 'platform'] AND cardinality(scopes) > 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);
CREATE INDEX api_keys_of_team ON gateway.api_keys (team_id);

-- A type is known by the signature of its canonical config; the name is for people.
CREATE TABLE gateway.model_types (
    signature text PRIMARY KEY CHECK (signature ~ '^[0-9a-f]{16}$'),
    name text NOT NULL UNIQUE CHECK (name ~ '^[a-z0-9][a-z0-9.-]{0,62}$'),
    architecture text NOT NULL,
    parameter_count bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE gateway.models (
    model_id text PRIMARY KEY,
    team_id text NOT NULL REFERENCES gateway.teams,
    name text NOT NULL CHECK (name ~ '^[a-z0-9][a-z0-9._-]{0,95}$'),
    signature text NOT NULL REFERENCES gateway.model_types,
    current_revision int NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX model_name_in_team ON gateway.models (team_id, name) WHERE deleted_at IS NULL;

CREATE TABLE gateway.model_revisions (
    model_id text NOT NULL REFERENCES gateway.models,
    revision int NOT NULL CHECK (revision > 0),
    folder text NOT NULL,                      -- below the model store
    manifest jsonb NOT NULL,                   -- files with sizes and checksums, shapes, stop tokens
    context_tokens int NOT NULL CHECK (context_tokens > 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (model_id, revision)
);

-- Facts that must reach billing although the request is over: written first, published by a relay.
CREATE TABLE gateway.outbox (
    event_id text PRIMARY KEY,
    payload jsonb NOT NULL,
    headers jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    sent_at timestamptz
);
CREATE INDEX outbox_unsent ON gateway.outbox (created_at) WHERE sent_at IS NULL;

CREATE TABLE gateway.idempotency_keys (
    team_id text NOT NULL,
    key text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    request_sha256 bytea NOT NULL,
    status int,                                -- NULL while the first request still runs
    response jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (team_id, key)
);

CREATE VIEW gateway_api.teams_v1 AS
    SELECT team_id, slug, name, is_platform, ppt_fallback, suspended, created_at FROM gateway.teams;
CREATE VIEW gateway_api.model_types_v1 AS SELECT signature, name, architecture, parameter_count FROM gateway.model_types;
CREATE VIEW gateway_api.models_v1 AS
    SELECT m.team_id, t.is_platform, m.model_id, m.current_revision AS revision, t.slug || '/' || m.name AS name,
           r.folder, m.signature, mt.name AS model_type, m.created_at
    FROM gateway.models m
    JOIN gateway.teams t USING (team_id)
    JOIN gateway.model_types mt USING (signature)
    JOIN gateway.model_revisions r ON r.model_id = m.model_id AND r.revision = m.current_revision
    WHERE m.deleted_at IS NULL;

GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA gateway TO roundhouse_gateway;
GRANT DELETE ON gateway.outbox, gateway.idempotency_keys TO roundhouse_gateway;
GRANT SELECT ON ALL TABLES IN SCHEMA gateway_api
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW gateway_api.models_v1, gateway_api.model_types_v1, gateway_api.teams_v1;
DROP TABLE gateway.idempotency_keys, gateway.outbox, gateway.model_revisions, gateway.models, gateway.model_types,
    gateway.api_keys, gateway.teams;
