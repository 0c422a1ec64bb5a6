-- migrate:up

-- version counts every change of a model's row: readers know by the sum whether they have the latest, and an ETag is made
-- of it. last_revision: numbers are given once, also to a revision that was refused in the end.
ALTER TABLE gateway.models
    ADD COLUMN version int NOT NULL DEFAULT 1,
    ADD COLUMN last_revision int NOT NULL DEFAULT 1;
UPDATE gateway.models SET last_revision = current_revision;
ALTER TABLE gateway.models ADD CONSTRAINT current_was_given CHECK (current_revision BETWEEN 1 AND last_revision);
-- A removed revision can be chosen no more; its files stay for as long as a job may name them.
ALTER TABLE gateway.model_revisions ADD COLUMN removed_at timestamptz;

-- migrate:down
ALTER TABLE gateway.model_revisions DROP COLUMN removed_at;
ALTER TABLE gateway.models DROP CONSTRAINT current_was_given, DROP COLUMN last_revision, DROP COLUMN version;
