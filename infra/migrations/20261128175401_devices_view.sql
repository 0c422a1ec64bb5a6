-- migrate:up

-- The devices that node agents reported last, and whether a worker has them.
CREATE VIEW scheduler_api.devices_v1 AS
    SELECT n.node_id, d.device ->> 'device' AS device, d.device ->> 'kind' AS kind,
           d.device ->> 'incarnation' IS NULL AS is_free, n.reported_at
    FROM scheduler.nodes n CROSS JOIN LATERAL jsonb_array_elements(n.devices) AS d (device);
GRANT SELECT ON scheduler_api.devices_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW scheduler_api.devices_v1;
