-- migrate:up

-- Requests that came in crowds, and how many of them would have waited for too long with how many workers: the next
-- leader, or the next waking, begins with it.
ALTER TABLE scheduler.resources ADD COLUMN crowds jsonb;

-- migrate:down
ALTER TABLE scheduler.resources DROP COLUMN crowds;
