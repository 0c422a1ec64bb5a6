-- migrate:up

-- What requests were like, minute by minute, from their records. A statement that writes records marks the minutes that
-- it touches (also those that a request had the GPU in, and those that it has left); billing computes marked minutes
-- anew. Forgetting old records marks nothing: what was computed of them stays.
CREATE INDEX requests_of_resource_by_end ON billing.requests (resource_id, finished_at);

CREATE TABLE billing.histogram_marks (
    mark_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    resource_id text NOT NULL,
    minute timestamptz NOT NULL
);

-- From when to when a request had a GPU, as far as is known: an hour at most, so that a wrong clock marks no year.
CREATE FUNCTION billing.gpu_time(swap_ms double precision, prefill_ms double precision, decode_ms double precision)
    RETURNS interval IMMUTABLE LANGUAGE sql
    RETURN least(greatest(coalesce(swap_ms, 0) + coalesce(prefill_ms, 0) + coalesce(decode_ms, 0), 0), 3600000)
           * interval '1 millisecond';

CREATE FUNCTION billing.mark_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO billing.histogram_marks (resource_id, minute)
    SELECT DISTINCT resource_id, minute FROM new_rows r, generate_series(
        date_trunc('minute', r.finished_at - billing.gpu_time(r.swap_ms, r.prefill_ms, r.decode_ms), 'UTC'),
        date_trunc('minute', r.finished_at, 'UTC'), interval '1 minute') minute;
    RETURN NULL;
END
$$;
CREATE FUNCTION billing.mark_updated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO billing.histogram_marks (resource_id, minute)
    SELECT DISTINCT resource_id, minute FROM (SELECT * FROM old_rows UNION ALL SELECT * FROM new_rows) r, generate_series(
        date_trunc('minute', r.finished_at - billing.gpu_time(r.swap_ms, r.prefill_ms, r.decode_ms), 'UTC'),
        date_trunc('minute', r.finished_at, 'UTC'), interval '1 minute') minute;
    RETURN NULL;
END
$$;
CREATE TRIGGER requests_mark_inserted AFTER INSERT ON billing.requests
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION billing.mark_inserted();
CREATE TRIGGER requests_mark_updated AFTER UPDATE ON billing.requests
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION billing.mark_updated();

INSERT INTO billing.histogram_marks (resource_id, minute)
SELECT DISTINCT resource_id, minute FROM billing.requests r, generate_series(
    date_trunc('minute', r.finished_at - billing.gpu_time(r.swap_ms, r.prefill_ms, r.decode_ms), 'UTC'),
    date_trunc('minute', r.finished_at, 'UTC'), interval '1 minute') minute;

-- A request counts in the minute that it ended in.
CREATE TABLE billing.minute_counts (
    resource_id text NOT NULL,
    minute timestamptz NOT NULL,
    model_id text NOT NULL,
    work_class text NOT NULL,
    model_name text NOT NULL,
    requests bigint NOT NULL CHECK (requests > 0),
    errors bigint NOT NULL CHECK (errors BETWEEN 0 AND requests),
    cancelled bigint NOT NULL CHECK (cancelled BETWEEN 0 AND requests),
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    PRIMARY KEY (resource_id, minute, model_id, work_class)
);
CREATE INDEX minute_counts_by_age ON billing.minute_counts (minute);

-- Buckets are those of shared/log_buckets.py; only those that hold anything are kept.
CREATE TABLE billing.minute_histograms (
    resource_id text NOT NULL,
    minute timestamptz NOT NULL,
    model_id text NOT NULL,
    work_class text NOT NULL,
    measure text NOT NULL CHECK (measure IN ('response', 'queue', 'swap', 'first_token')),
    buckets int[] NOT NULL,
    counts bigint[] NOT NULL,
    PRIMARY KEY (resource_id, minute, model_id, work_class, measure),
    CHECK (cardinality(buckets) = cardinality(counts) AND cardinality(buckets) > 0)
);
CREATE INDEX minute_histograms_by_age ON billing.minute_histograms (minute);

-- For how long workers ran anything: what runs side by side on one counts once.
CREATE TABLE billing.minute_busy (
    resource_id text NOT NULL,
    minute timestamptz NOT NULL,
    busy_ms bigint NOT NULL CHECK (busy_ms > 0),
    PRIMARY KEY (resource_id, minute)
);
CREATE INDEX minute_busy_by_age ON billing.minute_busy (minute);

-- The same by the hour, merged from the minutes: longer windows read these.
CREATE TABLE billing.hour_counts (LIKE billing.minute_counts INCLUDING ALL);
ALTER TABLE billing.hour_counts RENAME COLUMN minute TO hour;
CREATE TABLE billing.hour_histograms (LIKE billing.minute_histograms INCLUDING ALL);
ALTER TABLE billing.hour_histograms RENAME COLUMN minute TO hour;
CREATE TABLE billing.hour_busy (LIKE billing.minute_busy INCLUDING ALL);
ALTER TABLE billing.hour_busy RENAME COLUMN minute TO hour;

CREATE VIEW billing_api.minute_counts_v1 AS SELECT * FROM billing.minute_counts;
CREATE VIEW billing_api.minute_histograms_v1 AS SELECT * FROM billing.minute_histograms;
CREATE VIEW billing_api.minute_busy_v1 AS SELECT * FROM billing.minute_busy;
CREATE VIEW billing_api.hour_counts_v1 AS SELECT * FROM billing.hour_counts;
CREATE VIEW billing_api.hour_histograms_v1 AS SELECT * FROM billing.hour_histograms;
CREATE VIEW billing_api.hour_busy_v1 AS SELECT * FROM billing.hour_busy;

-- Live GPUs of a resource are read by time, too.
CREATE INDEX intervals_of_resource ON scheduler.state_intervals (resource_id, proved_until);

GRANT SELECT, INSERT, DELETE ON billing.histogram_marks, billing.minute_counts, billing.minute_histograms,
    billing.minute_busy, billing.hour_counts, billing.hour_histograms, billing.hour_busy TO roundhouse_billing;
GRANT SELECT ON billing_api.minute_counts_v1, billing_api.minute_histograms_v1, billing_api.minute_busy_v1,
    billing_api.hour_counts_v1, billing_api.hour_histograms_v1, billing_api.hour_busy_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP INDEX scheduler.intervals_of_resource;
DROP VIEW billing_api.minute_counts_v1, billing_api.minute_histograms_v1, billing_api.minute_busy_v1,
    billing_api.hour_counts_v1, billing_api.hour_histograms_v1, billing_api.hour_busy_v1;
DROP TABLE billing.hour_busy, billing.hour_histograms, billing.hour_counts, billing.minute_busy, billing.minute_histograms,
    billing.minute_counts;
DROP TRIGGER requests_mark_updated ON billing.requests;
DROP TRIGGER requests_mark_inserted ON billing.requests;
DROP FUNCTION billing.mark_updated(), billing.mark_inserted(), billing.gpu_time(double precision, double precision, double precision);
DROP TABLE billing.histogram_marks;
DROP INDEX billing.requests_of_resource_by_end;
