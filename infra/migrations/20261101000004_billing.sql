-- migrate:up

-- All amounts are integer nano-USD: 0.02 USD for a million tokens is 20 nano-USD for one.
CREATE TABLE billing.prices (
    price_id text PRIMARY KEY,
    model_type text NOT NULL,
    work_class text NOT NULL CHECK (work_class IN ('live', 'batch')),
    prompt_nanousd bigint NOT NULL CHECK (prompt_nanousd >= 0),
    completion_nanousd bigint NOT NULL CHECK (completion_nanousd >= 0),
    starts_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (model_type, work_class, starts_at)
);

-- Raw facts as they came; everything else can be computed from them again.
CREATE TABLE billing.usage_events (
    event_id text PRIMARY KEY,
    event_type text NOT NULL,
    job_id text NOT NULL,
    team_id text NOT NULL,
    payload jsonb NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX usage_events_of_job ON billing.usage_events (job_id);

-- What is known of each job: recomputed from its facts whenever one arrives. No text.
CREATE TABLE billing.requests (
    job_id text PRIMARY KEY,
    request_id text NOT NULL,
    team_id text NOT NULL,
    key_id text NOT NULL,
    resource_id text NOT NULL,
    billing_mode text NOT NULL CHECK (billing_mode IN ('ppt', 'resource')),
    work_class text NOT NULL,
    operation text NOT NULL,
    model_type text NOT NULL,
    model_id text NOT NULL,
    model_name text NOT NULL,
    revision int NOT NULL,
    outcome text NOT NULL CHECK (outcome IN ('succeeded', 'failed', 'cancelled', 'expired')),
    error_code text,
    attempt int NOT NULL,
    prompt_tokens int NOT NULL,
    completion_tokens int NOT NULL,            -- delivered to the client, as far as is known
    charged_nanousd bigint NOT NULL,
    price_id text REFERENCES billing.prices,
    queue_ms double precision,
    swap_ms double precision,
    prefill_ms double precision,
    decode_ms double precision,
    first_token_at timestamptz,
    accepted_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL
);
CREATE INDEX requests_of_team ON billing.requests (team_id, accepted_at DESC);
CREATE INDEX requests_of_resource ON billing.requests (resource_id, accepted_at DESC);

CREATE TABLE billing.accounts (
    account_id text PRIMARY KEY,               -- team:<team_id>, revenue:tokens, revenue:minutes
    team_id text,
    kind text NOT NULL CHECK (kind IN ('team', 'revenue'))
);

-- Double entry. The unique key of a transaction makes a duplicate a no-op.
CREATE TABLE billing.transactions (
    transaction_id text PRIMARY KEY,
    unique_key text NOT NULL UNIQUE,
    kind text NOT NULL CHECK (kind IN ('tokens', 'minutes', 'correction', 'credit')),
    team_id text NOT NULL,
    job_id text,
    resource_id text,
    place int,
    hour timestamptz,
    words text NOT NULL,
    trace_id text,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX transactions_of_team ON billing.transactions (team_id, created_at DESC);
CREATE INDEX transactions_of_job ON billing.transactions (job_id) WHERE job_id IS NOT NULL;

CREATE TABLE billing.entries (
    transaction_id text NOT NULL REFERENCES billing.transactions,
    account_id text NOT NULL REFERENCES billing.accounts,
    amount_nanousd bigint NOT NULL CHECK (amount_nanousd <> 0),
    PRIMARY KEY (transaction_id, account_id)
);
CREATE INDEX entries_of_account ON billing.entries (account_id);

CREATE FUNCTION billing.check_balanced() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT coalesce(sum(amount_nanousd), 0) FROM billing.entries WHERE transaction_id = NEW.transaction_id) <> 0
       OR (SELECT count(*) FROM billing.entries WHERE transaction_id = NEW.transaction_id) < 2 THEN
        RAISE EXCEPTION 'transaction % does not balance', NEW.transaction_id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER transaction_balances AFTER INSERT ON billing.transactions
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION billing.check_balanced();
CREATE CONSTRAINT TRIGGER entries_balance AFTER INSERT ON billing.entries
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION billing.check_balanced();

CREATE TRIGGER prices_stay BEFORE UPDATE OR DELETE ON billing.prices
    FOR EACH ROW EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER usage_events_stay BEFORE UPDATE OR DELETE ON billing.usage_events
    FOR EACH ROW EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER transactions_stay BEFORE UPDATE OR DELETE ON billing.transactions
    FOR EACH ROW EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER entries_stay BEFORE UPDATE OR DELETE ON billing.entries
    FOR EACH ROW EXECUTE FUNCTION public.refuse_change();

-- Minutes already posted for a seat, an hour and a rate: the next posting is the difference.
CREATE TABLE billing.minute_charges (
    resource_id text NOT NULL,
    place int NOT NULL,
    hour timestamptz NOT NULL CHECK (hour = date_trunc('hour', hour, 'UTC')),
    hourly_rate_nanousd bigint NOT NULL,
    team_id text NOT NULL,
    minutes int NOT NULL CHECK (minutes BETWEEN 0 AND 60),
    posted_nanousd bigint NOT NULL CHECK (posted_nanousd >= 0),
    postings int NOT NULL CHECK (postings > 0),
    PRIMARY KEY (resource_id, place, hour, hourly_rate_nanousd)
);

CREATE TABLE billing.command_results (
    command_id text PRIMARY KEY,
    result jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE VIEW billing_api.prices_v1 AS SELECT * FROM billing.prices;
CREATE VIEW billing_api.requests_v1 AS SELECT * FROM billing.requests;
CREATE VIEW billing_api.minutes_v1 AS SELECT * FROM billing.minute_charges;
CREATE VIEW billing_api.balances_v1 AS
    SELECT a.team_id, coalesce(sum(e.amount_nanousd), 0)::bigint AS balance_nanousd
    FROM billing.accounts a LEFT JOIN billing.entries e USING (account_id) WHERE a.kind = 'team' GROUP BY a.team_id;
CREATE VIEW billing_api.ledger_v1 AS
    SELECT t.transaction_id, t.unique_key, t.kind, t.team_id, t.job_id, t.resource_id, t.place, t.hour, t.words,
           t.trace_id, t.created_at, e.account_id, e.amount_nanousd
    FROM billing.transactions t JOIN billing.entries e USING (transaction_id);
CREATE VIEW billing_api.usage_events_v1 AS SELECT * FROM billing.usage_events;

GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA billing TO roundhouse_billing;
GRANT UPDATE ON billing.requests, billing.minute_charges TO roundhouse_billing;
GRANT DELETE ON billing.requests, billing.command_results TO roundhouse_billing;
GRANT SELECT ON billing_api.prices_v1, billing_api.requests_v1, billing_api.minutes_v1, billing_api.balances_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing;
GRANT SELECT ON ALL TABLES IN SCHEMA billing_api TO roundhouse_audit;

-- migrate:down
DROP VIEW billing_api.usage_events_v1, billing_api.ledger_v1, billing_api.balances_v1, billing_api.minutes_v1,
    billing_api.requests_v1, billing_api.prices_v1;
DROP TABLE billing.command_results, billing.minute_charges, billing.entries, billing.transactions, billing.accounts,
    billing.requests, billing.usage_events, billing.prices;
DROP FUNCTION billing.check_balanced();
