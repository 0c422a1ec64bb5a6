-- migrate:up

-- Replies are looked for team by team: those of a team whose reply queues take nothing are not passed over again and again.
CREATE INDEX queue_lines_due_of_team ON batch.queue_lines (team_id, batch_id, line) WHERE reply = 'due';
DROP INDEX batch.queue_lines_due;

-- migrate:down
CREATE INDEX queue_lines_due ON batch.queue_lines (batch_id, line) WHERE reply = 'due';
DROP INDEX batch.queue_lines_due_of_team;
