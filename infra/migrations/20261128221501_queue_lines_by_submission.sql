-- migrate:up

-- Submissions are forgotten when none of their lines is left, and lines leave with their submission.
CREATE INDEX queue_lines_of_submission ON batch.queue_lines (team_id, submission_id);

-- migrate:down
DROP INDEX batch.queue_lines_of_submission;
