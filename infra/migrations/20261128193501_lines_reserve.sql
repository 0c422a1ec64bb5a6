-- migrate:up

-- What a line that is out holds of budgets, so that whoever takes over can free it: ids of leases, and nano-USD for each
-- of its jobs. NULL without a cap.
ALTER TABLE batch.lines ADD COLUMN reserved jsonb;

-- migrate:down
ALTER TABLE batch.lines DROP COLUMN reserved;
