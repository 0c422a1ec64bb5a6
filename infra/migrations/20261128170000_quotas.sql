-- migrate:up

-- How many places may be taken at once: by each team, by one team in particular, and by all together. Only the leader
-- grants places, and all its writes hold the lease's row, so two grants never count past each other.
CREATE TABLE scheduler.quotas (
    scope text PRIMARY KEY,                    -- 'every_team', 'platform', or a team's id
    places int NOT NULL CHECK (places BETWEEN 0 AND 100000)
);
INSERT INTO scheduler.quotas VALUES ('every_team', 64), ('platform', 1024);

CREATE FUNCTION scheduler.check_quota() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    team text;
    allowed int;
    taken int;
BEGIN
    SELECT team_id INTO team FROM scheduler.resources WHERE resource_id = NEW.resource_id;
    SELECT places INTO allowed FROM scheduler.quotas WHERE scope IN (team, 'every_team')
        ORDER BY scope = 'every_team' LIMIT 1;
    SELECT count(*) INTO taken FROM scheduler.places p JOIN scheduler.resources r USING (resource_id) WHERE r.team_id = team;
    IF taken > allowed THEN
        RAISE EXCEPTION 'team % has % of % places', team, taken, allowed USING ERRCODE = 'check_violation';
    END IF;
    SELECT places INTO allowed FROM scheduler.quotas WHERE scope = 'platform';
    SELECT count(*) INTO taken FROM scheduler.places;
    IF taken > allowed THEN
        RAISE EXCEPTION '% of the platform''s % places', taken, allowed USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER place_within_quota AFTER INSERT ON scheduler.places
    FOR EACH ROW EXECUTE FUNCTION scheduler.check_quota();

CREATE VIEW scheduler_api.quotas_v1 AS SELECT scope, places FROM scheduler.quotas;
GRANT SELECT, INSERT, UPDATE, DELETE ON scheduler.quotas TO roundhouse_scheduler;
GRANT SELECT ON scheduler_api.quotas_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW scheduler_api.quotas_v1;
DROP TRIGGER place_within_quota ON scheduler.places;
DROP FUNCTION scheduler.check_quota();
DROP TABLE scheduler.quotas;
