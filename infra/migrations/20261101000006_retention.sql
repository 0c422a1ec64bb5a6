-- migrate:up

-- Dead letters about jobs are forgotten in the end; facts about money stay until an operator has dealt with them.
GRANT DELETE ON scheduler.dead_letters TO roundhouse_scheduler;
CREATE INDEX dead_letters_by_age ON scheduler.dead_letters (received_at) WHERE body IS NULL;

-- migrate:down
DROP INDEX scheduler.dead_letters_by_age;
REVOKE DELETE ON scheduler.dead_letters FROM roundhouse_scheduler;
