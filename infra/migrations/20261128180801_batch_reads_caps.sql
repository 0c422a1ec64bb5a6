-- migrate:up

-- A budget that refuses shared GPUs keeps batches from them as well.
GRANT SELECT ON billing_api.budgets_v1 TO roundhouse_batch;

-- migrate:down
REVOKE SELECT ON billing_api.budgets_v1 FROM roundhouse_batch;
