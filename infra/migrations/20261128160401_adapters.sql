-- migrate:up

-- An adapter's revision names exactly which weights it stands on: another revision of the base would change its answers.
ALTER TABLE gateway.model_revisions
    ADD COLUMN base_model_id text,
    ADD COLUMN base_revision int,
    ADD CONSTRAINT base_is_whole CHECK ((base_model_id IS NULL) = (base_revision IS NULL)),
    ADD CONSTRAINT base_is_another CHECK (base_model_id <> model_id),
    ADD CONSTRAINT base_exists FOREIGN KEY (base_model_id, base_revision) REFERENCES gateway.model_revisions;
CREATE INDEX adapters_of_model ON gateway.model_revisions (base_model_id) WHERE base_model_id IS NOT NULL;

CREATE OR REPLACE VIEW gateway_api.models_v1 AS
    SELECT m.team_id, t.is_platform, m.model_id, m.current_revision AS revision, t.slug || '/' || m.name AS name,
           r.folder, m.signature, mt.name AS model_type, m.created_at,
           r.base_model_id, r.base_revision, bt.slug || '/' || b.name AS base_name, br.folder AS base_folder
    FROM gateway.models m
    JOIN gateway.teams t USING (team_id)
    JOIN gateway.model_types mt USING (signature)
    JOIN gateway.model_revisions r ON r.model_id = m.model_id AND r.revision = m.current_revision
    LEFT JOIN gateway.model_revisions br ON br.model_id = r.base_model_id AND br.revision = r.base_revision
    LEFT JOIN gateway.models b ON b.model_id = r.base_model_id
    LEFT JOIN gateway.teams bt ON bt.team_id = b.team_id
    WHERE m.deleted_at IS NULL;

-- migrate:down
DROP VIEW gateway_api.models_v1;
CREATE VIEW gateway_api.models_v1 AS
    SELECT m.team_id, t.is_platform, m.model_id, m.current_revision AS revision, t.slug || '/' || m.name AS name,
           r.folder, m.signature, mt.name AS model_type, m.created_at
    FROM gateway.models m
    JOIN gateway.teams t USING (team_id)
    JOIN gateway.model_types mt USING (signature)
    JOIN gateway.model_revisions r ON r.model_id = m.model_id AND r.revision = m.current_revision
    WHERE m.deleted_at IS NULL;
GRANT SELECT ON gateway_api.models_v1 TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;
DROP INDEX gateway.adapters_of_model;
ALTER TABLE gateway.model_revisions DROP CONSTRAINT base_exists, DROP CONSTRAINT base_is_another, DROP CONSTRAINT base_is_whole,
    DROP COLUMN base_revision, DROP COLUMN base_model_id;
