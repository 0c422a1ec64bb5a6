-- migrate:up

-- Old request records are deleted by age; those that could not be charged yet are looked for again and again.
CREATE INDEX requests_by_age ON billing.requests (accepted_at);
CREATE INDEX requests_unpriced ON billing.requests (model_type, work_class)
    WHERE billing_mode = 'ppt' AND price_id IS NULL;

-- migrate:down
DROP INDEX billing.requests_unpriced, billing.requests_by_age;
