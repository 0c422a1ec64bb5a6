-- migrate:up

-- A budget that is used up may stop batches.
GRANT SELECT ON billing_api.capped_batches_v1 TO roundhouse_batch;

-- migrate:down
REVOKE SELECT ON billing_api.capped_batches_v1 FROM roundhouse_batch;
