-- migrate:up

-- How long a request may wait when a crowd comes like those of the last minutes; autoscaling keeps GPUs by it.
ALTER TABLE scheduler.resources
    ADD COLUMN target_wait_s int NOT NULL DEFAULT 10 CHECK (target_wait_s BETWEEN 1 AND 3600);

CREATE OR REPLACE VIEW scheduler_api.scaling_v1 AS
    SELECT resource_id, autoscaling, coalesce(min_count, fixed_count) AS min_count,
           coalesce(max_count, fixed_count) AS max_count, idle_timeout_s, when_asleep, windows, scaling_version,
           coalesce(min_now, min_count, fixed_count) AS min_now, coalesce(max_now, max_count, fixed_count) AS max_now,
           window_now, bounds_until, wanted_count, wanted_why, target_wait_s
    FROM scheduler.resources;

-- migrate:down
DROP VIEW scheduler_api.scaling_v1;
CREATE VIEW scheduler_api.scaling_v1 AS
    SELECT resource_id, autoscaling, coalesce(min_count, fixed_count) AS min_count,
           coalesce(max_count, fixed_count) AS max_count, idle_timeout_s, when_asleep, windows, scaling_version,
           coalesce(min_now, min_count, fixed_count) AS min_now, coalesce(max_now, max_count, fixed_count) AS max_now,
           window_now, bounds_until, wanted_count, wanted_why
    FROM scheduler.resources;
GRANT SELECT ON scheduler_api.scaling_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit, roundhouse_batch;
ALTER TABLE scheduler.resources DROP COLUMN target_wait_s;
