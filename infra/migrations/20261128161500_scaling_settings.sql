-- migrate:up

-- What a team set for the scaling of a resource, and the bounds that a window of time makes of it. `min_now`, `max_now`
-- and `bounds_until` are written with the settings and by the leader at each turn of a window; without windows they
-- are null, and the settings themselves are in force. What is in force ends at `bounds_until`, whatever a leader thinks.
ALTER TABLE scheduler.resources
    ADD COLUMN autoscaling boolean NOT NULL DEFAULT false,
    ADD COLUMN min_count int CHECK (min_count BETWEEN 0 AND 64),
    ADD COLUMN max_count int CHECK (max_count BETWEEN 0 AND 64),
    ADD COLUMN idle_timeout_s int NOT NULL DEFAULT 600 CHECK (idle_timeout_s BETWEEN 10 AND 604800),
    ADD COLUMN when_asleep text NOT NULL DEFAULT 'wake' CHECK (when_asleep IN ('wake', 'refuse')),
    ADD COLUMN windows jsonb NOT NULL DEFAULT '[]',
    ADD COLUMN scaling_version int NOT NULL DEFAULT 1,
    ADD COLUMN min_now int CHECK (min_now BETWEEN 0 AND 64),
    ADD COLUMN max_now int CHECK (max_now BETWEEN 0 AND 64),
    ADD COLUMN window_now text,
    ADD COLUMN bounds_until timestamptz,
    ADD COLUMN wanted_count int CHECK (wanted_count BETWEEN 0 AND 64),
    ADD COLUMN wanted_why text NOT NULL DEFAULT '',
    ADD CONSTRAINT autoscaling_has_bounds CHECK (
        autoscaling = (min_count IS NOT NULL) AND autoscaling = (max_count IS NOT NULL) AND min_count <= max_count),
    ADD CONSTRAINT windows_have_bounds CHECK (
        (windows = '[]') = (bounds_until IS NULL) AND (bounds_until IS NULL) = (min_now IS NULL)
        AND (bounds_until IS NULL) = (max_now IS NULL) AND min_now <= max_now);

CREATE OR REPLACE FUNCTION scheduler.check_place() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    maximum int;
    taken int;
    current_epoch bigint;
BEGIN
    SELECT epoch INTO current_epoch FROM scheduler.lease WHERE name = 'leader';
    IF current_epoch IS NULL OR NEW.epoch <> current_epoch THEN
        RAISE EXCEPTION 'epoch % is not the leader''s', NEW.epoch USING ERRCODE = 'check_violation';
    END IF;
    IF TG_OP = 'INSERT' THEN
        SELECT CASE WHEN wanted = 'on' AND deleted_at IS NULL
                         AND (bounds_until IS NULL OR bounds_until > clock_timestamp())
                    THEN coalesce(max_now, max_count, fixed_count) ELSE 0 END INTO maximum
            FROM scheduler.resources WHERE resource_id = NEW.resource_id FOR SHARE;
        SELECT count(*) INTO taken FROM scheduler.places WHERE resource_id = NEW.resource_id;
        IF maximum IS NULL OR NEW.place >= maximum OR taken >= maximum THEN
            RAISE EXCEPTION 'resource % has no place % (% of % taken)', NEW.resource_id, NEW.place, taken, maximum
                USING ERRCODE = 'check_violation';
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

CREATE VIEW scheduler_api.scaling_v1 AS
    SELECT resource_id, autoscaling, coalesce(min_count, fixed_count) AS min_count,
           coalesce(max_count, fixed_count) AS max_count, idle_timeout_s, when_asleep, windows, scaling_version,
           coalesce(min_now, min_count, fixed_count) AS min_now, coalesce(max_now, max_count, fixed_count) AS max_now,
           window_now, bounds_until, wanted_count, wanted_why
    FROM scheduler.resources;
GRANT SELECT ON scheduler_api.scaling_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW scheduler_api.scaling_v1;
CREATE OR REPLACE FUNCTION scheduler.check_place() RETURNS trigger LANGUAGE plpgsql AS $$
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
ALTER TABLE scheduler.resources
    DROP CONSTRAINT windows_have_bounds, DROP CONSTRAINT autoscaling_has_bounds, DROP COLUMN wanted_why,
    DROP COLUMN wanted_count, DROP COLUMN bounds_until, DROP COLUMN window_now, DROP COLUMN max_now,
    DROP COLUMN min_now, DROP COLUMN scaling_version, DROP COLUMN windows, DROP COLUMN when_asleep,
    DROP COLUMN idle_timeout_s, DROP COLUMN max_count, DROP COLUMN min_count, DROP COLUMN autoscaling;
