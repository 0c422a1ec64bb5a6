-- migrate:up

-- What autoscaling has learned of a resource: the next leader, or the next waking, begins with it.
ALTER TABLE scheduler.resources
    ADD COLUMN job_tokens float8 CHECK (job_tokens >= 0),
    ADD COLUMN worker_tokens_per_s float8 CHECK (worker_tokens_per_s > 0);

-- Asleep means on, and no worker. Looked at when a transaction ends: one that wakes a resource grants its place first.
CREATE FUNCTION scheduler.check_asleep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM scheduler.resources r WHERE r.resource_id = NEW.resource_id AND r.state = 'asleep'
               AND EXISTS (SELECT 1 FROM scheduler.places p WHERE p.resource_id = r.resource_id)) THEN
        RAISE EXCEPTION 'resource % is asleep and has a worker', NEW.resource_id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER asleep_has_no_worker AFTER UPDATE OF state ON scheduler.resources
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.state = 'asleep') EXECUTE FUNCTION scheduler.check_asleep();
CREATE CONSTRAINT TRIGGER no_worker_for_asleep AFTER INSERT ON scheduler.places
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION scheduler.check_asleep();

-- migrate:down
DROP TRIGGER no_worker_for_asleep ON scheduler.places;
DROP TRIGGER asleep_has_no_worker ON scheduler.resources;
DROP FUNCTION scheduler.check_asleep();
ALTER TABLE scheduler.resources DROP COLUMN worker_tokens_per_s, DROP COLUMN job_tokens;
